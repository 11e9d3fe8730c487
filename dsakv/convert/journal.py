"""What of a conversion is on disk already, kept so that a killed one goes on.

Each line is the CRC-32 of its JSON, a space, the JSON. The first says what is converted; each other one that pieces of
a file are on the disk (with the XXH3 value of each), that a file is whole (with its digest), or that one starts over. A
line is written when what it says holds even if the machine fails; from the first bad line on the journal counts as
never written.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec import Struct

from dsakv.convert.record import ANOTHER_FOLDER, Order
from dsakv.errors import DsakvError

JOURNAL = "conversion.journal"


class _Line(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    rank: int
    pieces: list[tuple[int, int]] = []
    """Number and XXH3 value of pieces that are on the disk."""
    digest: str | None = None
    """The file is whole."""
    restart: bool = False
    """Whatever was said of the file before counts no more."""


class Journal:
    """An open journal, locked for this process."""

    def __init__(self, file: BinaryIO, n_ranks: int) -> None:
        self._file = file
        self.checksums: list[dict[int, int]] = [{} for _ in range(n_ranks)]
        """By rank: the XXH3 value of each piece that is on the disk."""
        self.digests: dict[int, str] = {}
        """By rank: the digest of each file that is whole."""

    def add_pieces(self, rank: int, checksums: Mapping[int, int]) -> None:
        """Note pieces of a file that have reached the disk."""
        self._append(_Line(rank=rank, pieces=list(checksums.items())))

    def add_digest(self, rank: int, digest: str) -> None:
        """Note that a file is whole on the disk."""
        self._append(_Line(rank=rank, digest=digest))

    def restart(self, rank: int) -> None:
        """Note that a file has to be written anew."""
        self._append(_Line(rank=rank, restart=True))

    def _append(self, line: _Line) -> None:
        self._apply(line)
        _write(self._file, msgspec.json.encode(line))

    def _apply(self, line: _Line) -> None:
        if line.restart:
            self.checksums[line.rank].clear()
            self.digests.pop(line.rank, None)
        self.checksums[line.rank].update(line.pieces)
        if line.digest is not None:
            self.digests[line.rank] = line.digest

    def replay(self, payloads: list[bytes]) -> None:
        for payload in payloads:
            self._apply(msgspec.json.decode(payload, type=_Line))


@contextmanager
def open_journal(folder: Path, order: Order) -> Iterator[Journal]:
    """The journal in ``folder``, begun where there is none, held for this process alone.

    Raises:
        DsakvError: another process holds it, it is of another conversion, or other files are there without one.
        OSError: the disk is full or not writable.
    """
    path = folder / JOURNAL
    file = _open(path)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(folder) from None
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
            raise _in_use(folder)  # it has just finished
        payloads = _read(file)
        if payloads:
            if other := _begun(payloads[0], folder).differs(order):
                raise DsakvError(f"{folder} holds the beginnings of another conversion ({other})", ANOTHER_FOLDER)
        else:
            foreign = sorted(entry.name for entry in folder.iterdir() if entry.name != JOURNAL)
            if foreign:
                raise foreign_files(folder, foreign)
            _write(file, msgspec.json.encode(order))
        journal = Journal(file, order.model_parallel)
        journal.replay(payloads[1:])
        yield journal


def foreign_files(folder: Path, names: list[str]) -> DsakvError:
    return DsakvError(f"{folder} is not empty: it holds {names[0]}", "name a new or empty folder with --save-path")


def _begun(payload: bytes, folder: Path) -> Order:
    try:
        return msgspec.json.decode(payload, type=Order)
    except msgspec.DecodeError as error:
        raise DsakvError(f"{folder} holds the beginnings of a conversion by another dsakv", ANOTHER_FOLDER) from error


def _in_use(folder: Path) -> DsakvError:
    return DsakvError(f"another process is converting into {folder}", "wait for it, or name another --save-path")


def _open(path: Path) -> BinaryIO:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    return os.fdopen(descriptor, "r+b", buffering=0)


def _read(file: BinaryIO) -> list[bytes]:
    """The JSON of each line up to the first bad one, which is cut off with what follows; leaves the file at its end."""
    payloads, good = [], 0
    for line in file.read().splitlines(keepends=True):
        stamp, _, payload = line.removesuffix(b"\n").partition(b" ")
        if not line.endswith(b"\n") or stamp != _stamp(payload):
            break
        payloads.append(payload)
        good += len(line)
    file.truncate(good)
    file.seek(good)
    return payloads


def _write(file: BinaryIO, payload: bytes) -> None:
    view = memoryview(_stamp(payload) + b" " + payload + b"\n")
    while view:
        view = view[file.write(view) :]
    os.fsync(file.fileno())


def _stamp(payload: bytes) -> bytes:
    return b"%08x" % zlib.crc32(payload)
