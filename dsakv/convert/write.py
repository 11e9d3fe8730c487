"""Write the files of a plan, or what an earlier attempt has left of them to be written.

Files grow in parallel under names that end in ``.partial``, and get their own when they are whole and on the disk. What
an earlier attempt has left is read back first: the checksum of each piece was noted with it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from xxhash import xxh3_64

from dsakv.convert.journal import Journal
from dsakv.convert.parallel import in_order
from dsakv.convert.plan import CHUNK, Plan
from dsakv.convert.record import ResultFile, digest

BATCH = 512 << 20
"""Bytes that are written before they are made durable and noted: what a kill can cost at most."""
AT_ONCE = 256 << 10
"""Bytes of a write: for larger ones the kernel takes longer to find memory."""
PARTIAL = ".partial"


class Writer:
    """The files of ``plan`` in ``folder``. Use as a context manager; everything raises OSError for a failing disk."""

    def __init__(self, plan: Plan, folder: Path, journal: Journal, workers: int, batch_bytes: int = BATCH) -> None:
        self._plan, self._folder, self._journal, self._workers = plan, folder, journal, workers
        self._batch_bytes = batch_bytes
        self._stack = ExitStack()
        self._files: dict[int, int] = {}
        self._inherited: list[tuple[int, int]] = []
        self._buffers = threading.local()

    def __enter__(self) -> Writer:
        """Lay the files out: each that is not whole yet has its full length."""
        with ExitStack() as stack:
            for rank, file in enumerate(self._plan.files):
                final, partial = self._folder / file.name, self._partial(rank)
                if rank in self._journal.digests:
                    if partial.exists():  # killed between the note and the new name
                        self._rename(rank)
                    if final.is_file() and final.stat().st_size == file.size:
                        continue
                descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
                stack.callback(os.close, descriptor)
                if os.fstat(descriptor).st_size != file.size:
                    if self._journal.checksums[rank]:
                        self._journal.restart(rank)
                    os.ftruncate(descriptor, file.size)
                self._files[rank] = descriptor
            self._inherited = [(rank, piece) for rank in self._files for piece in self._journal.checksums[rank]]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def bytes_left(self) -> int:
        """What is still to be written."""
        return sum(map(self._size, self._todo()))

    @property
    def bytes_inherited(self) -> int:
        """What an earlier attempt has left in files that are not whole."""
        return sum(map(self._size, self._inherited))

    def write(self, advance: Callable[[int], None]) -> None:
        """Write what is left; ``advance`` is told of bytes as they are written.

        However it ends, what was written until then is noted and not written again.
        """
        done: list[tuple[int, int, int]] = []  # as threads finish, so that one that fails loses no other's work

        def work(task: tuple[int, int]) -> None:
            done.append((*task, self._write_piece(task)))

        def note() -> None:
            written = done[:]
            self._note(written)  # interrupted here, they are noted once more
            del done[: len(written)]  # not clear(): threads go on

        size = 0
        try:
            for task, _ in in_order(self._todo(), work, self._workers):
                size += self._size(task)
                advance(self._size(task))
                if size >= self._batch_bytes:
                    note()
                    size = 0
        except BaseException:
            with suppress(OSError):  # a disk that is full takes no note either
                note()
            raise
        note()

    def check(self, advance: Callable[[int], None]) -> int:
        """Read back what was inherited; ``advance`` is told of bytes.

        Pieces that are not what was noted of them will be written again. Returns their bytes.
        """
        lost = 0
        for task, checksum in in_order(self._inherited, self._read_piece, self._workers):
            rank, piece = task
            if checksum != self._journal.checksums[rank][piece]:
                del self._journal.checksums[rank][piece]
                lost += self._size(task)
            advance(self._size(task))
        return lost

    def complete(self) -> list[ResultFile]:
        """Give each file its name, and return the facts of all."""
        for rank, file in enumerate(self._plan.files):
            if rank in self._files:
                os.fsync(self._files[rank])
                found = self._journal.checksums[rank]
                self._journal.add_digest(rank, digest([found[piece] for piece in range(file.n_pieces)]))
                self._rename(rank)
        return [
            ResultFile(name=file.name, bytes=file.size, digest=self._journal.digests[rank])
            for rank, file in enumerate(self._plan.files)
        ]

    def _todo(self) -> Iterator[tuple[int, int]]:
        for rank, piece in self._plan.pieces():
            if rank in self._files and piece not in self._journal.checksums[rank]:
                yield rank, piece

    def _write_piece(self, task: tuple[int, int]) -> int:
        """Compute and write a piece; its XXH3 value."""
        rank, piece = task
        file, checksum = self._plan.files[rank], xxh3_64()
        for at, size in file.chunks(piece):
            view = self._buffer[:size]
            file.fill(self._plan.source, at, view)
            checksum.update(view)
            while view:
                done = os.pwrite(self._files[rank], view[:AT_ONCE], at)
                view, at = view[done:], at + done
        return checksum.intdigest()

    def _read_piece(self, task: tuple[int, int]) -> int:
        """The XXH3 value of a piece as it stands in the file."""
        rank, piece = task
        checksum = xxh3_64()
        for at, size in self._plan.files[rank].chunks(piece):
            view = self._buffer[:size]
            checksum.update(view[: read_at(self._files[rank], at, view)])
        return checksum.intdigest()

    def _note(self, written: list[tuple[int, int, int]]) -> None:
        """Make pieces, given with rank and XXH3 value, durable, then say so."""
        batch: dict[int, dict[int, int]] = {}
        for rank, piece, checksum in written:
            batch.setdefault(rank, {})[piece] = checksum
        for rank in batch:
            os.fdatasync(self._files[rank])
        for rank, checksums in batch.items():
            self._journal.add_pieces(rank, checksums)

    def _rename(self, rank: int) -> None:
        os.replace(self._partial(rank), self._folder / self._plan.files[rank].name)
        sync_folder(self._folder)

    def _partial(self, rank: int) -> Path:
        return self._folder / f"{self._plan.files[rank].name}{PARTIAL}"

    def _size(self, task: tuple[int, int]) -> int:
        start, end = self._plan.files[task[0]].bounds(task[1])
        return end - start

    @property
    def _buffer(self) -> memoryview:
        """The thread's own memory for a chunk."""
        if not hasattr(self._buffers, "chunk"):
            self._buffers.chunk = memoryview(bytearray(CHUNK))
        chunk: memoryview = self._buffers.chunk
        return chunk


def read_at(file: int, at: int, view: memoryview) -> int:
    """Fill ``view`` from byte ``at`` on as far as the file goes; how many bytes there were. Raises OSError."""
    done = 0
    while got := os.preadv(file, [view[done:]], at + done):
        done += got
    return done


def sync_folder(folder: Path) -> None:
    """Make new names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
