"""How fast weights can come: plain reads of their files, one after the other, with nothing in between."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future

from dsakv.weights.direct import ALIGN, DirectFiles, Extent, read_memory

MEMORY = 64 << 20
"""Bytes to read into at most: of what a budget leaves to compute with."""
WINDOW = 64 << 20
"""Bytes over which speed is taken."""
SAMPLE = 1 << 30
"""Bytes that are read in all; files that have fewer are read again."""
SECONDS = 1.0
"""After which no further read begins."""


def disk_speed(files: DirectFiles) -> float:
    """Bytes a second of the fastest stretch of plain reads, as many at a time as ``files`` makes; 0 of empty files.

    What others do on the machine meanwhile only slows it down: that is why the fastest counts.

    Raises DsakvError where a file cannot be read, or has changed.
    """
    lanes = 2 * files.threads  # as many again wait, so that no thread ever does
    request = max(ALIGN, min(files.request, MEMORY // lanes) // ALIGN * ALIGN)
    memory = memoryview(read_memory(lanes * request))
    free = [memory[lane * request : (lane + 1) * request] for lane in range(lanes)]
    under_way: deque[tuple[memoryview, list[Future[int]], int]] = deque()
    begun, read, best = time.perf_counter(), 0, 0.0
    marks = deque([(begun, 0)])  # when so many bytes had been read
    for extent in _extents(files, request):
        if not free:
            lane, futures, file = under_way.popleft()
            read += files.wait(futures, [file])
            free.append(lane)
            marks.append((time.perf_counter(), read))
            while len(marks) > 1 and read - marks[1][1] >= WINDOW:
                marks.popleft()
            if read - marks[0][1] >= WINDOW:
                best = max(best, (read - marks[0][1]) / (marks[-1][0] - marks[0][0]))
        if read >= SAMPLE or time.perf_counter() - begun > SECONDS:
            break
        lane = free.pop()
        under_way.append((lane, files.read(extent, lane), extent.file))
    for _, futures, file in under_way:
        read += files.wait(futures, [file])
    return best or read / (time.perf_counter() - begun)


def _extents(files: DirectFiles, request: int) -> Iterator[Extent]:
    """All of the files, a request at a time, over and over; nothing of empty ones."""
    while any(files.sizes):
        for number, size in enumerate(files.sizes):
            for begin in range(0, size, request):
                yield Extent(number, begin, min(begin + request, size))
