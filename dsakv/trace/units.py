"""A trace in pieces that can be read side by side, whatever their format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsakv.errors import DsakvError
from dsakv.trace.batch import TraceBatch
from dsakv.trace.intake import Intake
from dsakv.trace.jsonl_reader import read_jsonl


@dataclass(frozen=True, slots=True)
class Unit:
    """The least piece of a trace that is read in one go: one shard."""

    path: Path
    bytes: int


def to_units(shards: Sequence[Path]) -> list[Unit]:
    """The pieces of ``shards``, in the order of the trace.

    Raises:
        DsakvError: a shard cannot be read.
    """
    try:
        return [Unit(path, path.stat().st_size) for path in shards]
    except OSError as error:
        raise DsakvError(
            f"cannot read {error.filename}: {error.strerror}", "check the disk and the permissions"
        ) from error


def read_unit(unit: Unit, intake: Intake) -> Iterator[TraceBatch]:
    """The records of one piece in batches, none without positions.

    Raises:
        InputError: a bad record, where ``intake`` is strict, or a damaged file.
        DsakvError: the file cannot be read.
    """
    return read_jsonl(unit.path, intake)
