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
    """The least piece of a trace that is read in one go: one shard, or some row groups of it."""

    path: Path
    bytes: int
    row_groups: tuple[int, ...] | None = None
    """Of a Parquet shard whose requests lie in separate row groups; None is the whole shard."""


def to_units(shards: Sequence[Path]) -> list[Unit]:
    """The pieces of ``shards``, in the order of the trace.

    Raises:
        InputError: a Parquet shard is damaged.
        DsakvError: a shard cannot be read.
    """
    try:
        return [unit for path in shards for unit in _split(path)]
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
    if unit.path.suffix == ".parquet":
        from dsakv.trace.parquet_reader import read_parquet  # pyarrow is not needed for lines

        return read_parquet(unit.path, unit.row_groups, intake)
    return read_jsonl(unit.path, intake)


def _split(path: Path) -> list[Unit]:
    if path.suffix == ".parquet":
        from dsakv.trace.row_groups import pieces

        return [Unit(path, size, row_groups) for row_groups, size in pieces(path)]
    return [Unit(path, path.stat().st_size)]
