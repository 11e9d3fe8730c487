"""How fast weights can come: plain reads of their files, one after the other, with nothing in between."""

from __future__ import annotations

import time

from dsakv.weights.direct import ALIGN, DirectFiles, Extent, read_memory

WINDOW = 32 << 20
"""Bytes of a reading."""
SAMPLE = 1 << 30
"""Bytes that are read in all, as far as the files have them."""
SECONDS = 2.0
"""After which no further reading begins."""


def disk_speed(files: DirectFiles) -> float:
    """Bytes a second of the fastest of several readings, in requests as ``files`` makes them; 0 where all are empty.

    Raises DsakvError where a file cannot be read, or has changed.
    """
    memory = memoryview(read_memory(WINDOW))  # of what a budget leaves to compute with
    best, read, begun = 0.0, 0, time.perf_counter()
    for number, size in enumerate(files.sizes):
        for begin in range(0, size // ALIGN * ALIGN, WINDOW):
            if read >= SAMPLE or time.perf_counter() - begun > SECONDS:
                return best
            extent = Extent(number, begin, min(begin + WINDOW, size))
            start = time.perf_counter()
            n_bytes = files.wait(files.read(extent, memory), [number])
            seconds = time.perf_counter() - start
            if read == 0 or n_bytes == WINDOW:  # the short end of a file says less
                best = max(best, n_bytes / seconds)
            read += n_bytes
    return best
