"""How shards hold records: one file and one class a format, one line in :data:`FORMATS`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from dsakv.config import TraceConfig
from dsakv.trace.batch import TraceBatch
from dsakv.trace.jsonl_format import JsonlFormat
from dsakv.trace.parquet_format import ParquetFormat
from dsakv.trace.records import Derived, PrefixFacts

Rows = Any
"""Records in the form of a format: what its ``encode`` returns and its shards take."""


class ShardWriter(Protocol):
    """One shard that is being written. Used by one thread."""

    @property
    def held(self) -> int:
        """Bytes of records that wait in memory."""

    def write(self, rows: Rows, which: Sequence[int]) -> None:
        """Add the rows ``which`` of ``rows``; raises OSError. After an error only ``discard`` is left to call."""

    def sync(self) -> bool:
        """Bring to the disk what was written; False where only ``close`` does."""

    def pause(self) -> None:
        """No request is half-written: a good place for readers to begin at. Raises OSError."""

    def spill(self) -> None:
        """Write what waits in memory. Raises OSError."""

    def close(self) -> None:
        """Complete the file; raises OSError, and then nothing is left to discard."""

    def discard(self) -> None:
        """Give up. What stood in the file before stays."""


class TraceFormat(Protocol):
    """Writes shards, and reads them back record by record for checks, resuming and conversion."""

    suffix: str
    shard_bytes: int
    """About the size of a shard beside its records."""

    def encode(
        self, batch: TraceBatch, derived: Derived, block_size: int, prefix: list[PrefixFacts], options: TraceConfig
    ) -> Rows:
        """The records of ``batch``; ``prefix`` [R] holds the facts of each one's request."""

    def open(self, path: Path, options: TraceConfig) -> ShardWriter:
        """A shard to add records to; those in ``path`` stay. Raises OSError, InputError where the file is damaged."""

    def records(self, path: Path, fields: Sequence[str] | None = None) -> Iterator[tuple[str, Any]]:
        """Each record with its place, ``file:line`` or ``file:row``; at least its ``fields``, by default all.

        Raises:
            InputError: the file is damaged.
            OSError: it cannot be read.
        """

    def complete(self, path: Path) -> bool:
        """Whether records can be added to the file as it stands."""

    def keep(self, path: Path, requests: Collection[int]) -> None:
        """Drop the records of all other requests. The file is the old or the new one whenever the program is killed.

        Raises:
            InputError, OSError: as ``records``; the disk is full or not writable.
        """

    def record_bytes(self, seq_len: int, selected: int, block_size: int, options: TraceConfig) -> float:
        """About the size of a record that selects ``selected`` positions spread evenly over ``seq_len``."""


FORMATS: Mapping[str, TraceFormat] = MappingProxyType({"jsonl": JsonlFormat(), "parquet": ParquetFormat()})
"""By ``--trace-format``."""

_SHARD = re.compile(r"trace_steps_(\d+)_(\d+)(\..+)")
_BY_SUFFIX = {format.suffix: format for format in FORMATS.values()}


def shard_path(trace_dir: Path, request_id: int, options: TraceConfig) -> Path:
    """The file of a request's records, which depends on nothing but its id."""
    start = request_id // options.requests_per_shard * options.requests_per_shard
    stem = f"trace_steps_{start}_{start + options.requests_per_shard}"
    return trace_dir / f"{stem}{FORMATS[options.format].suffix}"


def shard_paths(trace_dir: Path) -> list[Path]:
    """The shards of a trace that this program wrote, in numeric order."""
    found = [
        (int(m[1]), p)
        for p in trace_dir.iterdir()
        if (m := _SHARD.fullmatch(p.name)) is not None and m[3] in _BY_SUFFIX
    ]
    return [p for _, p in sorted(found)]


def format_of(shard: Path) -> TraceFormat:
    """The format that the name of a shard tells, compressed or not."""
    return _BY_SUFFIX[Path(shard.name.removesuffix(".zst")).suffix]


def read_records(shard: Path, fields: Sequence[str] | None = None) -> Iterator[tuple[str, Any]]:
    """:meth:`TraceFormat.records` of a shard, whatever its format."""
    return format_of(shard).records(shard, fields)
