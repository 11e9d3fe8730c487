"""Times sequential reads of files into one reused arena of aligned memory, as streamed weights are read. No torch.

Every size of request is tried with every number of threads, in another order each round, so that neither a slow moment
of the machine nor a slow part of the disk falls on one of them alone. Each reading goes on where the last one ended:
of a large source no part is read twice soon, which a cache in the disk or below a virtual one would make fast.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from dsakv.analysis.links_speeds import DiskSpeed, DiskSpeeds, PathKind
from dsakv.errors import DsakvError, InputError
from dsakv.layout import listed, shards
from dsakv.trace.files import disk_error, write_all
from dsakv.weights.direct import ALIGN, DirectFiles, Extent, Stamp, read_memory

REQUESTS = (1 << 20, 4 << 20, 8 << 20, 16 << 20)
THREADS = (1, 2, 4)
LARGEST = 256 << 20
"""Bytes of a reading at most, and of the file that is made where none is named."""
LEAST = 64 << 20
"""Bytes of a reading at least, where the source has as many: a request of the largest for each thread."""
SECONDS = 0.25
"""What a reading is to take in between."""
_PART = 8 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """What to read."""

    kind: PathKind
    paths: list[Path]
    scratch: io.FileIO | None = None
    """A file without a name, still empty, which ``paths`` leads to."""
    folder: Path = Path()
    """Where that lies."""

    def fill(self) -> None:
        """Put bytes on the disk, where this is for the bench to do. Raises DsakvError where there is no room."""
        if self.scratch is None:
            return
        rng = np.random.default_rng(0)  # not zeros, which some file systems do not store
        try:
            for at in range(0, LARGEST, _PART):
                write_all(self.scratch, rng.bytes(min(_PART, LARGEST - at)))
            os.fsync(self.scratch.fileno())
            os.posix_fadvise(self.scratch.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # takes no memory from others
        except OSError as error:
            raise disk_error(error, self.folder, "free space there, or name a large file with --disk") from error


@contextmanager
def disk_source(named: str | None, folder: Path) -> Iterator[Source]:
    """The file, or the safetensors files of the checkpoint folder, at ``named``; without that a file in ``folder``,
    which is made if need be. No name leads to that file: nothing is left, however the process ends.

    Raises:
        InputError: ``named`` leads to no file that can be read.
        DsakvError: no file can be made in ``folder``, or the disk fails.
    """
    if named is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            scratch = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            hint = "name a file in a directory that can be written to with --out"
            raise disk_error(error, folder, hint) from error
        with scratch:
            assert isinstance(scratch, io.FileIO)
            yield Source("temporary", [Path(f"/proc/self/fd/{scratch.fileno()}")], scratch, folder)
        return
    path = Path(named)
    found = Source("checkpoint", shards(path, listed(path))) if path.is_dir() else Source("file", [path])
    with closing(DirectFiles(found.paths, request=ALIGN, threads=1)) as files:
        if not sum(files.sizes):
            raise InputError(f"--disk {named} is empty", "name a large file, or the folder of a checkpoint")
    yield found


@dataclass(frozen=True, slots=True)
class Way:
    """One way to read."""

    request: int
    """In bytes."""
    threads: int
    gb_s: list[float] = field(default_factory=list)


class DiskBench:
    """All ways to read a source. Raises DsakvError where its file cannot be made, or cannot be read any more."""

    def __init__(self, source: Source) -> None:
        source.fill()
        self.kinds = [Way(request, threads) for request in REQUESTS for threads in THREADS]
        self._source, self._direct = source, True
        self._rng = np.random.default_rng(0)
        with self._opened(range(len(source.paths)), ALIGN, 1, None) as files:
            self._stamps, self._sizes = files.stamps, files.sizes
        self._begins = np.cumsum([0, *(-(-size // ALIGN) * ALIGN for size in self._sizes)]).tolist()
        """Where each file begins if all are laid one after another, each filled up to whole pages; and their end."""
        self._at, self._piece = 0, min(self._begins[-1], LEAST)
        self._arena = self._touched()
        fast = self._read(self.kinds[-1])
        self._piece = min(self._begins[-1], LARGEST, max(LEAST, int(fast * 1e9 * SECONDS) // ALIGN * ALIGN))
        self._arena = self._touched()

    def round(self, advance: Callable[[int], None] = lambda done: None, *, keep: bool = True) -> None:
        """Read once more in each way. ``keep`` False forgets the times."""
        for number in self._rng.permutation(len(self.kinds)).tolist():
            gb_s = self._read(self.kinds[number])
            if keep:
                self.kinds[number].gb_s.append(gb_s)
                advance(1)

    def speeds(self) -> DiskSpeeds:
        """The medians of all rounds."""
        found = [DiskSpeed(way.request, way.threads, median(way.gb_s)) for way in self.kinds]
        return DiskSpeeds(
            self._source.kind,
            self._direct,
            sum(self._sizes),
            self._piece,
            tuple((one.request_bytes, one.threads, one.gb_s) for one in found),
            max(found, key=lambda one: one.gb_s),
        )

    def _touched(self) -> memoryview:
        """Memory for a piece, whose pages are made now rather than while time is taken."""
        arena = read_memory(self._piece)
        np.frombuffer(arena, np.uint8)[::ALIGN] = 1
        return memoryview(arena)

    def _read(self, way: Way) -> float:
        """GB/s of the next piece."""
        extents = self._next()
        touched = sorted({extent.file for extent in extents})
        with self._opened(touched, way.request, way.threads, [self._stamps[number] for number in touched]) as files:
            self._direct &= files.direct
            if not files.direct:
                files.forget()
            at, futures = 0, []
            begin = time.perf_counter_ns()
            for number, first, end in extents:
                futures += files.read(Extent(touched.index(number), first, end), self._arena[at:])
                at += -(-(end - first) // ALIGN) * ALIGN
            files.wait(futures)
            taken = time.perf_counter_ns() - begin
            files.check(range(len(touched)))
            return files.bytes_read / max(taken, 1)

    def _next(self) -> list[Extent]:
        """The extents of the next piece, from the start again where the source ends."""
        found, left = [], self._piece
        while left:
            number = int(np.searchsorted(self._begins, self._at, "right")) - 1
            length = min(left, self._begins[number + 1] - self._at)
            first = self._at - self._begins[number]
            found.append(Extent(number, first, min(first + length, self._sizes[number])))
            left -= length
            self._at = (self._at + length) % self._begins[-1]
        return found

    @contextmanager
    def _opened(
        self, numbers: Sequence[int], request: int, threads: int, stamps: list[Stamp] | None
    ) -> Iterator[DirectFiles]:
        """These files, for reading; what goes wrong with one that has no name is told of its folder."""
        paths = [self._source.paths[number] for number in numbers]
        try:
            with closing(DirectFiles(paths, request=request, threads=threads, stamps=stamps)) as files:
                yield files
        except DsakvError as error:
            if self._source.scratch is None:
                raise
            unnamed = f"a temporary file in {self._source.folder}"
            raise DsakvError(error.message.replace(str(paths[0]), unnamed), error.hint) from error
