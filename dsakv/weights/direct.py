"""Byte ranges of files, read into page-aligned memory of the caller and past the page cache where that can be done.

Streamed weights are read once a step in the same order, which no page cache that is smaller than they are can help
with: it only costs a copy of every byte. Direct reads begin and end at pages, in the file as in memory. No torch.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsakv.errors import DsakvError, InputError

ALIGN = 4096
"""What reads begin and end at, in bytes: the page, which no disk's logical block exceeds."""
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)
_HINTS = {
    errno.EIO: "the disk fails: see the kernel's log, and copy the file to another one",
    errno.ESTALE: "the network file system has lost it: see that it is mounted, then run again",
    errno.ETIMEDOUT: "the network file system does not answer: see that it is mounted, then run again",
    errno.ENOMEM: "the system is out of memory: end other programs, or give the run a smaller budget",
    errno.EINVAL: "its file system refuses such reads: copy it to a local disk",
    errno.EACCES: "let this user read it",
    errno.EPERM: "let this user read it",
    errno.EMFILE: "allow more open files (ulimit -n), then run again",
    errno.ENFILE: "the system has too many open files: end other programs, then run again",
}
_WRONG_PATHS = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""Errors of opening that another path mends."""

Preadv = Callable[[int, list[memoryview], int], int]


class Extent(NamedTuple):
    """A range of bytes of a file by its number. It begins at a page, and ends at one or with the file."""

    file: int
    begin: int
    end: int


class Stamp(NamedTuple):
    """What a file is known by: as long as it stays, so does what the file holds."""

    device: int
    inode: int
    size: int
    """In bytes."""
    mtime_ns: int

    @classmethod
    def of(cls, facts: os.stat_result) -> Stamp:
        return cls(facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)


def aligned(begin: int, end: int, size: int) -> tuple[int, int]:
    """The least extent of a file of ``size`` bytes that holds ``begin`` to ``end``; an empty range has an empty one.

    Raises ValueError for a range that the file does not hold.
    """
    if not 0 <= begin <= end <= size:
        raise ValueError(f"bytes {begin} to {end} of a file of {size}")
    first = begin // ALIGN * ALIGN
    return first, min(_whole(end), size) if end > begin else first


def read_memory(size: int) -> mmap.mmap:
    """``size`` bytes to read into, from a page on. Raises OSError where there is no room.

    In huge pages where the system has them: a disk's driver has fewer to pin, which takes a third of the time on the
    processor, and the memory is faster to compute with. A mapping that can be shared, Python's default, gets none.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class DirectFiles:
    """Files held open for reading, by number. All methods may be called from any thread.

    What was opened is what is read: a file that is renamed or removed meanwhile stays the old one. One that is
    written to is told by :meth:`check`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        request: int,
        threads: int,
        direct: bool = True,
        stamps: Sequence[Stamp] | None = None,
        preadv: Preadv = os.preadv,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        """``request``: bytes of a read, a multiple of ``ALIGN``; as many reads are under way at a time as there are
        ``threads``. ``direct=False`` forbids to go past the page cache. ``stamps``: what the files were when they were
        opened before, and have to be still. ``preadv`` and ``clock`` (nanoseconds) are the system's unless given.

        Raises:
            InputError: a path leads to no file that this user may read.
            DsakvError: the disk or the system fails, or a file is not what its stamp says.
            ValueError: ``request`` or ``threads`` is not positive, or ``request`` no multiple of ``ALIGN``.
        """
        if request <= 0 or request % ALIGN:
            raise ValueError(f"a request of {request} bytes")
        self.request, self.threads = request, threads
        self._preadv, self._clock = preadv, clock
        self._pool = ThreadPoolExecutor(threads, "dsakv-direct")
        self._lock = threading.Lock()
        self._reading = 0
        self._since = self._busy_ns = 0
        self.most_at_once = 0
        """Most reads that were under way at a time."""
        self.bytes_read = 0
        """Bytes that the system has returned so far, those that were read to learn whether direct reads work aside."""
        self.paths = list(paths)
        self.stamps: list[Stamp] = []
        """Of each file when it was opened."""
        self._fds: list[int] = []
        self._direct: list[bool] = []
        try:
            for path in self.paths:
                self._open(path, direct and hasattr(os, "O_DIRECT"))
            for number, before in enumerate(stamps or ()):
                if self.stamps[number] != before:
                    raise _changed(self.paths[number])
        except BaseException:
            self.close()
            raise
        self.sizes = [stamp.size for stamp in self.stamps]
        """Bytes of each file when it was opened."""
        self.direct = all(self._direct)
        """Whether all of the files are read past the page cache."""

    def read(self, extent: Extent, into: memoryview) -> list[Future[int]]:
        """Begin to read ``extent`` to the start of ``into``, which must lie at a page and hold whole pages for it.

        A future for each request; they are done in the order in which they were asked for, as far as threads are
        free. Each ends with the bytes that it read, or raises DsakvError where the disk fails or the file ends too
        early. Of ``into`` the bytes past the end of the file may be anything. It must be left alone until all futures
        are done.

        Raises ValueError for an extent that is none of a file, and for memory that is too small or off a page.
        """
        number, begin, end = extent
        size = self.sizes[number] if 0 <= number < len(self.sizes) else -1
        if begin % ALIGN or not 0 <= begin <= end <= size or (end % ALIGN and end != size):
            raise ValueError(f"{extent} does not fit a file of {size} bytes")
        if begin == end:
            return []
        target, length = into.cast("B"), _whole(end - begin)
        if target.readonly or len(target) < length:
            raise ValueError(f"{len(target)} bytes of memory for {length}, or memory that cannot be written to")
        if np.frombuffer(target, np.uint8).ctypes.data % ALIGN:  # wrong with either kind of file, so that it is found
            raise ValueError("memory that does not begin at a page")
        return [
            self._pool.submit(self._fill, number, begin + at, target[at : min(at + self.request, length)])
            for at in range(0, length, self.request)
        ]

    def wait(self, futures: Iterable[Future[int]], files: Iterable[int] = ()) -> int:
        """Return the bytes that ``futures`` read when all are done, and ``files`` unchanged.

        Raises:
            DsakvError: a read failed, or a file was written to. No read of these is under way any more.
        """
        done = list(futures)
        wait(done)
        n_bytes = sum(future.result() for future in done)
        self.check(files)
        return n_bytes

    def check(self, files: Iterable[int]) -> None:
        """Raise DsakvError where one of ``files`` was written to since it was opened, or fails. Nothing is read.

        To be asked after the reads: what was read before a change is told, too, which costs no more than a run.
        """
        for number in files:
            if self._now(number) != self.stamps[number]:
                raise _changed(self.paths[number])

    def forget(self) -> None:
        """Take the files out of the page cache, so that what is read through it comes from the disk again."""
        for fd in self._fds:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def busy_us(self) -> float:
        """Microseconds so far in which at least one read was under way, up to now where one is."""
        with self._lock:
            going_on = self._clock() - self._since if self._reading else 0
            return (self._busy_ns + going_on) / 1e3

    def close(self) -> None:
        """Close the files when reads that are under way have ended; those not begun are cancelled."""
        self._pool.shutdown(cancel_futures=True)
        while self._fds:
            os.close(self._fds.pop())

    def _fill(self, number: int, at: int, view: memoryview) -> int:
        """Read to ``view``, or to the end of the file if that comes first; how many bytes. The system may give less at
        a time.
        """
        path, begin, until = self.paths[number], at, min(at + len(view), self.sizes[number])
        self._count(1)
        try:
            while at < until:
                try:
                    got = self._preadv(self._fds[number], [view], at)
                except OSError as error:
                    raise _failed("read", path, error) from error
                with self._lock:
                    self.bytes_read += got
                if at + got > until:  # it has grown
                    raise _changed(path)
                if at + got < until and self._direct[number]:
                    got -= got % ALIGN  # the next direct read, too, has to begin at a page
                if got <= 0:
                    raise self._stopped(number)
                at, view = at + got, view[got:]
            return at - begin
        finally:
            self._count(-1)

    def _stopped(self, number: int) -> DsakvError:
        """What to say of a file whose bytes end before it should."""
        if self._now(number).size < self.sizes[number]:
            return DsakvError(f"{self.paths[number]} was truncated since it was opened", "run again when it is whole")
        return DsakvError(f"only a part of {self.paths[number]} could be read", _HINTS[errno.EIO])

    def _now(self, number: int) -> Stamp:
        try:
            return Stamp.of(os.fstat(self._fds[number]))
        except OSError as error:
            raise _failed("read", self.paths[number], error) from error

    def _count(self, change: int) -> None:
        """Note that one more read, or one less, is under way."""
        with self._lock:
            now = self._clock()
            if self._reading:
                self._busy_ns += now - self._since
            self._since = now
            self._reading += change
            self.most_at_once = max(self.most_at_once, self._reading)

    def _open(self, path: Path, direct: bool) -> None:
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
                raise InputError(f"{path} is no file", "name a file on a disk")
            fd = self._direct_fd(path) if direct else None
            self._direct.append(fd is not None)
            self._fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC) if fd is None else fd)
            self.stamps.append(Stamp.of(os.fstat(self._fds[-1])))
        except FileNotFoundError:
            raise InputError(f"{path} is missing", "name a file that exists, or download it again") from None
        except OSError as error:
            raise _failed("opened", path, error) from error
        except ValueError as error:  # a NUL
            raise InputError(f"{str(path)!r} is no path: {error}", "name a file on a disk") from None

    def _direct_fd(self, path: Path) -> int | None:
        """None where direct reads are refused: some file systems do that at once, some when one is made."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno in _REFUSALS:
                return None
            raise
        try:
            self._preadv(fd, [memoryview(mmap.mmap(-1, ALIGN))], 0)
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError) and error.errno in _REFUSALS:
                return None
            raise
        return fd


def _whole(length: int) -> int:
    """``length`` in bytes, rounded up to pages."""
    return -(-length // ALIGN) * ALIGN


def _changed(path: Path) -> DsakvError:
    return DsakvError(f"{path} changed since it was opened", "run again when it is whole and nothing writes to it")


def _failed(what: str, path: Path, error: OSError) -> DsakvError:
    known = error.errno if error.errno is not None else 0
    kind = InputError if what == "opened" and known in _WRONG_PATHS else DsakvError
    return kind(
        f"{path} cannot be {what}: {os.strerror(known) if known else error}",
        _HINTS.get(known, "see that it and its disk can be used, then run again"),
    )
