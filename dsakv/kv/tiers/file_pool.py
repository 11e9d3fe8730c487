"""A remote pool in one file of a folder, on a local disk or what is mounted there."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import queue
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from dsakv.errors import DsakvError, InputError
from dsakv.kv.tiers.checked import CheckedPool

ALIGN = 4096
"""What direct reads and writes start and end at: the page, which no disk's logical block exceeds."""
THREADS = 4
CALL_BYTES = 4 << 20
CALL_BLOCKS = 1024
"""What one call moves at most; Linux takes 1,024 buffers."""
HINTS = {
    errno.ENOSPC: "free space there, or keep fewer blocks in the pool",
    errno.EDQUOT: "the user's quota is used up: raise it, or keep fewer blocks in the pool",
    errno.EFBIG: "no larger file may be written (see ulimit -f): keep fewer blocks in the pool",
    errno.EINVAL: "the file system refuses such calls, or ulimit -f cuts them: name another folder",
    errno.EIO: "the disk fails: see the kernel's log, and name a folder on another one",
    errno.EACCES: "let this user write there, or name another folder",
    errno.EPERM: "let this user write there, or name another folder",
    errno.EROFS: "it is mounted for reading only: name another folder",
}

Move = Callable[[int, list[memoryview], int], int]
Run = tuple[int, list[int]]
"""The first block's number, and the rows of adjacent blocks."""


def open_pool(url: str, *, n_blocks: int, block_bytes: int, timeout_s: float) -> FilePool:
    """The pool at ``file:///folder``. ``timeout_s`` bounds nothing here: a disk cannot be left waiting."""
    help_ = "write file:///path/to/a/folder; % ? # of the path are percent-encoded"
    try:
        parts = urlsplit(url)
    except ValueError:
        raise InputError("the URL of the file pool cannot be read", help_) from None
    folder = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not folder or "\0" in folder or parts.query or parts.fragment:
        raise InputError("the URL of the file pool names no folder of this machine", help_)
    return FilePool(folder, n_blocks, block_bytes)


class FilePool(CheckedPool):
    """Block i lies at i slots from the start of a file without a name: nothing is left, however the process ends.

    ``direct``: past the page cache, where the file system can do that and ``direct=False`` does not forbid it. Slots
    are then padded to 4,096 bytes. ``put`` returns when the system has taken all bytes, not when they are on disk:
    what survives no power cut need not. The file grows with the blocks that are put.
    """

    def __init__(self, folder: str, n_blocks: int, block_bytes: int, *, direct: bool = True, threads: int = THREADS):
        super().__init__(f"file://{folder}", n_blocks, block_bytes)
        self.folder = folder
        self._fd = self._opened()
        try:
            self.direct = direct and self._made_direct()
        except BaseException:
            os.close(self._fd)
            raise
        self._slot = -(-block_bytes // ALIGN) * ALIGN if self.direct else block_bytes
        self._run = max(1, min(CALL_BLOCKS, CALL_BYTES // self._slot))
        self._threads = ThreadPoolExecutor(threads, "dsakv-file-pool") if threads > 1 else None
        self._lanes = threads
        self._buffers: queue.SimpleQueue[mmap.mmap | None] = queue.SimpleQueue()
        """Aligned buffers of direct calls, one a lane, each made when it is first needed."""
        for _ in range(threads):
            self._buffers.put(None)

    def _write(self, numbers: NDArray[np.int64], payload: memoryview) -> None:
        size = self.block_bytes

        def write(runs: list[Run]) -> None:
            for first, rows in runs:
                views = [payload[row * size : (row + 1) * size] for row in rows]
                if not self.direct:
                    self._move(os.pwritev, "written", views, first)
                    continue
                with self._buffer() as buffer:
                    slots = np.frombuffer(buffer, np.uint8).reshape(-1, self._slot)
                    for slot, view in zip(slots, views, strict=False):
                        slot[:size] = view
                    self._move(os.pwritev, "written", [memoryview(buffer)[: len(rows) * self._slot]], first)

        self._spread(numbers, write)

    def _read(self, numbers: NDArray[np.int64], payload: memoryview, again: bool = False) -> list[int]:
        size = self.block_bytes

        def read(runs: list[Run]) -> None:
            for first, rows in runs:
                views = [payload[row * size : (row + 1) * size] for row in rows]
                if not self.direct:
                    self._move(os.preadv, "read", views, first)
                    continue
                with self._buffer() as buffer:
                    filled = memoryview(buffer)
                    self._move(os.preadv, "read", [filled[: len(rows) * self._slot]], first)
                    for i, view in enumerate(views):
                        view[:] = filled[i * self._slot : i * self._slot + size]

        self._spread(numbers, read)
        return []

    def _remove(self) -> None:
        if self._threads is not None:
            self._threads.shutdown()
        os.close(self._fd)

    def _spread(self, numbers: NDArray[np.int64], work: Callable[[list[Run]], None]) -> None:
        """``work`` on runs of adjacent blocks, shared out among the threads. Returns or raises when all have ended."""
        runs = list(self._runs(numbers))
        lanes = [runs[i :: self._lanes] for i in range(min(self._lanes, len(runs)))]
        if self._threads is None or len(lanes) == 1:
            for lane in lanes:
                work(lane)
            return
        tasks = [self._threads.submit(work, lane) for lane in lanes]
        errors = [error for task in tasks if (error := task.exception()) is not None]
        if errors:
            raise errors[0]

    def _runs(self, numbers: NDArray[np.int64]) -> Iterator[Run]:
        order = np.argsort(numbers, kind="stable")
        rows, ordered = order.tolist(), numbers[order].tolist()
        begin = 0
        for i in range(1, len(rows) + 1):
            if i == len(rows) or ordered[i] != ordered[i - 1] + 1 or i - begin == self._run:
                yield ordered[begin], rows[begin:i]
                begin = i

    def _move(self, call: Move, what: str, views: list[memoryview], first: int) -> None:
        """``call`` until all of ``views`` are moved: the system may take or give less than it was asked for."""
        left, at = deque(views), first * self._slot
        while left:
            try:
                moved = call(self._fd, list(left), at)
            except OSError as error:
                raise self._failed(what, error) from error
            if moved <= 0 or (self.direct and moved % ALIGN):
                raise DsakvError(
                    f"{self.name}: only a part of block {(at + moved) // self._slot} could be {what}",
                    "something cut it, or the disk is full or fails: check that, then run again",
                )
            at += moved
            while left and moved >= len(left[0]):
                moved -= len(left.popleft())
            if moved:
                left[0] = left[0][moved:]

    @contextmanager
    def _buffer(self) -> Iterator[mmap.mmap]:
        buffer = self._buffers.get()
        try:
            if buffer is None:
                buffer = mmap.mmap(-1, self._run * self._slot)  # on a page boundary
            yield buffer
        finally:
            self._buffers.put(buffer)

    def _opened(self) -> int:
        """A file that no name leads to."""
        try:
            return os.open(self.folder, getattr(os, "O_TMPFILE", os.O_DIRECTORY) | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise InputError(f"{self.name} is no folder", "make it, or name one that exists") from None
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise self._failed("made", error) from error
        try:
            fd, path = tempfile.mkstemp(prefix="dsakv-", dir=self.folder)
            os.unlink(path)
        except OSError as error:
            raise self._failed("made", error) from error
        return fd

    def _made_direct(self) -> bool:
        """Some file systems refuse direct calls when they are asked for, some when one is made: so one is made."""
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | getattr(os, "O_DIRECT", 0))
            os.pwritev(self._fd, [mmap.mmap(-1, ALIGN)], 0)
            os.ftruncate(self._fd, 0)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise self._failed("written", error) from error
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags)
            return False
        return hasattr(os, "O_DIRECT")

    def _failed(self, what: str, error: OSError) -> DsakvError:
        known = error.errno if error.errno is not None else 0
        return DsakvError(
            f"{self.name}: its file cannot be {what}: {os.strerror(known) if known else error}",
            HINTS.get(known, "see that the folder can be used, then run again"),
        )
