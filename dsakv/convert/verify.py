"""Compare a finished conversion with the checkpoint that it was made of, byte by byte."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from xxhash import xxh3_64

from dsakv.convert.companions import differing
from dsakv.convert.parallel import in_order
from dsakv.convert.plan import CHUNK, Plan, RankFile
from dsakv.convert.record import RECORD, Copied, Record, ResultFile, digest
from dsakv.convert.write import read_at
from dsakv.errors import DsakvError

_AGAIN = "check the disks, remove the folder, and convert again"


def check_present(plan: Plan, folder: Path, record: Record) -> None:
    """Raise DsakvError where a file that ``record`` names is missing, or has another size."""
    files: list[ResultFile | Copied] = [*record.files, *record.copied]
    for file in files:
        path = folder / file.name
        if not path.is_file():
            raise DsakvError(f"{path} is missing, though {RECORD} names it", _AGAIN)
        if path.stat().st_size != file.bytes:
            raise DsakvError(f"{path} has {path.stat().st_size} bytes, not {file.bytes} as it should", _AGAIN)
    if [(file.name, file.size) for file in plan.files] != [(file.name, file.bytes) for file in record.files]:
        raise DsakvError(f"{folder / RECORD} names other files than this checkpoint is converted to", _AGAIN)


def verify(plan: Plan, folder: Path, record: Record, workers: int, advance: Callable[[int], None]) -> None:
    """Compare all files; ``advance`` is told of bytes that are equal.

    Raises DsakvError with the first difference: the tensor, the file and the byte in it.
    """
    check_present(plan, folder, record)
    checksums: list[list[int]] = [[] for _ in plan.files]
    buffers = threading.local()
    with ExitStack() as stack:
        files = [stack.enter_context(open(folder / file.name, "rb", buffering=0)) for file in plan.files]

        def compare(task: tuple[int, int]) -> int:
            """The XXH3 value of a piece, which is the same in both places."""
            rank, piece = task
            file, checksum = plan.files[rank], xxh3_64()
            if not hasattr(buffers, "pair"):
                buffers.pair = tuple(np.empty(CHUNK, np.uint8) for _ in range(2))
            for at, size in file.chunks(piece):
                wanted, found = (whole[:size] for whole in buffers.pair)
                file.fill(plan.source, at, wanted.data)
                read = read_at(files[rank].fileno(), at, found.data)
                if not np.array_equal(wanted, found[:read]):
                    unequal = np.flatnonzero(wanted[:read] != found[:read])
                    raise _difference(file, at + (int(unequal[0]) if len(unequal) else read))
                checksum.update(wanted)
            return checksum.intdigest()

        for task, checksum in in_order(plan.pieces(), compare, workers):
            rank, piece = task
            checksums[rank].append(checksum)
            start, end = plan.files[rank].bounds(piece)
            advance(end - start)
    for noted, found in zip(record.files, checksums, strict=True):
        if noted.digest != digest(found):
            raise DsakvError(f"{folder / RECORD} has another digest for {noted.name} than its bytes", _AGAIN)
    if (path := differing(plan.source.directory, folder)) is not None:
        raise DsakvError(f"{folder / path} differs from {plan.source.directory / path}", _AGAIN)


def _difference(file: RankFile, offset: int) -> DsakvError:
    slot = file.slot_at(offset)
    where = "its header" if slot is None else f"tensor {slot.tensor.name}"
    return DsakvError(f"{file.name} differs from the checkpoint in {where}, at byte {offset} of the file", _AGAIN)
