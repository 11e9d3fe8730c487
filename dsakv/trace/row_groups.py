"""Which row groups of a Parquet shard can be read on their own, because they hold their requests alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsakv.errors import InputError
from dsakv.trace.parquet_file import ParquetTrace, damage

MOST_PIECES = 64
"""Of one file, or about so: each has the whole footer read once more."""


def pieces(path: Path) -> list[tuple[tuple[int, ...] | None, int]]:
    """The pieces of a shard that share no request, as row groups and bytes; None where all of it is one.

    As small as they can be, up to some number of them. Told from the statistics of ``request_id``: the least and the
    greatest of a row group. The bytes add up to the file's.

    Raises:
        InputError: the file is damaged.
        OSError: it cannot be read.
    """
    with ParquetTrace(path) as source, damage(path):
        runs = _joined(_runs(source), source.metadata.num_row_groups // MOST_PIECES)
        if len(runs) < 2:
            return [(None, piece_bytes(source, None))]
        return [(run, piece_bytes(source, run)) for run in runs]


def piece_bytes(source: ParquetTrace, row_groups: Sequence[int] | None) -> int:
    """Bytes of the file that count for these row groups; the first has the file's head and footer, None all.

    Raises:
        InputError: the footer tells sizes that cannot be.
    """
    size = source.path.stat().st_size
    if row_groups is None:
        return size
    total = sum(_bytes(source, group) for group in row_groups)
    if 0 in row_groups:
        total += size - sum(_bytes(source, group) for group in range(source.metadata.num_row_groups))
    if not 0 <= total <= size:
        raise InputError(f"{source.path}: the sizes of the row groups are damaged", "write the file again")
    return total


def _bytes(source: ParquetTrace, group: int) -> int:
    columns = source.metadata.row_group(group)
    return sum(columns.column(i).total_compressed_size for i in range(columns.num_columns))


def _runs(source: ParquetTrace) -> list[tuple[int, ...]]:
    """Maximal runs of row groups whose requests are in no other; empty where that cannot be told."""
    ranges = _request_ranges(source)
    if ranges is None:
        return []
    # Ranges that overlap directly or over others: the first and the last row group of each such family.
    families: list[tuple[int, int]] = []
    greatest: Any = None
    for low, high, group in sorted(ranges):
        if families and low <= greatest:
            first, last = families[-1]
            families[-1] = (min(first, group), max(last, group))
            greatest = max(greatest, high)
        else:
            families.append((group, group))
            greatest = high
    # A run must not be cut by a family that spans it, and takes along the empty row groups before the next.
    begins: list[int] = []
    reached = -1
    for first, last in sorted(families):
        if first > reached:
            begins.append(first)
        reached = max(reached, last)
    if not begins:
        return []
    begins[0] = 0
    ends = [*begins[1:], source.metadata.num_row_groups]
    return [tuple(range(begin, end)) for begin, end in zip(begins, ends, strict=True)]


def _joined(runs: list[tuple[int, ...]], least: int) -> list[tuple[int, ...]]:
    """Neighbouring runs taken together until they have ``least`` row groups."""
    joined: list[tuple[int, ...]] = []
    for run in runs:
        if joined and len(joined[-1]) < least:
            joined[-1] += run
        else:
            joined.append(run)
    return joined


def _request_ranges(source: ParquetTrace) -> list[tuple[Any, Any, int]] | None:
    """Least and greatest request and number of each row group that has rows; None where one does not tell."""
    found = []
    for group in range(source.metadata.num_row_groups):
        columns = source.metadata.row_group(group)
        if columns.num_rows == 0:
            continue
        statistics = next(
            (
                columns.column(i).statistics
                for i in range(columns.num_columns)
                if columns.column(i).path_in_schema == "request_id"
            ),
            None,
        )
        if statistics is None or not statistics.has_min_max:
            return None
        found.append((statistics.min, statistics.max, group))
    return found
