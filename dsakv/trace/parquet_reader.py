"""Parquet shards into column batches, by the rules of :mod:`dsakv.trace.jsonl_reader`.

Reads what the tracer writes and what pandas, polars and others wrote: integers of any width, lists of any kind, plain
or dictionary strings, selections in any order. A compiled pass tells which records are in order; every other one goes
as a JSON object to the reader of JSON lines, which decides what is wrong with it, so that both readers agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dsakv.compiled import compiled
from dsakv.errors import DsakvError, InputError
from dsakv.trace.batch import TraceBatch
from dsakv.trace.intake import BadRecordError, Intake
from dsakv.trace.jsonl_record import SCALARS, check_record
from dsakv.trace.parquet_file import ParquetTrace, damage
from dsakv.trace.row_groups import piece_bytes

BATCH_RECORDS = 1024
_POSITIONS = "selected_token_pos"
_OPTIONAL = ("event", "block_size_tokens", "engine_step")
_HINT = "write it with a column for each field of a record, integers as integers"


def read_parquet(path: Path, row_groups: Sequence[int] | None, intake: Intake) -> Iterator[TraceBatch]:
    """The records of some row groups of a shard, or all of it, in batches, none without positions.

    A row's place is its number in the file, from 1. A file without the column ``selected_token_pos`` is a trace
    without positions. Null in another optional column stands for a field that the record does not have.

    Raises:
        InputError: a bad record, where ``intake`` is strict; always a damaged file, and a column that is missing or
            does not hold what it must.
        DsakvError: the file cannot be read.
    """
    try:
        with ParquetTrace(path) as source:
            columns = _columns(source, intake)
            if row_groups is None or 0 in row_groups:
                intake.counts.files += 1
            groups = range(source.metadata.num_row_groups) if row_groups is None else row_groups
            left = piece_bytes(source, row_groups)
            rows_left = sum(source.metadata.row_group(group).num_rows for group in groups)
            for first, rows in source.batches(BATCH_RECORDS, columns, row_groups):
                read = left * len(rows) // rows_left
                left, rows_left = left - read, rows_left - len(rows)
                intake.counts.bytes += read
                with damage(path):
                    batch = _Rows(rows, first, path, intake).take()
                if batch is not None:
                    yield batch
            intake.counts.bytes += left
    except OSError as error:
        raise DsakvError(f"cannot read {path}: {error.strerror}", "check the disk and the permissions") from error


def _columns(source: ParquetTrace, intake: Intake) -> list[str]:
    """The columns to read, all of which hold what they must."""
    names = ["request_id", *(name for name, _, _ in SCALARS)]
    names += ["block_size_tokens"] if intake.block_sizes and "block_size_tokens" in source.schema.names else []
    names += ["engine_step"] if intake.engine_steps else []
    names += [name for name in ("event", _POSITIONS) if name in source.schema.names]
    for name in names:
        if name not in source.schema.names:
            raise InputError(f'{source.path}: "{name}" is missing: there is no such column', _HINT)
        found = source.schema.field(name).type
        wanted = "integers"
        if name == _POSITIONS:
            right, wanted = _is_list(found) and pa.types.is_integer(found.value_type), "lists of integers"
        elif name == "event":
            right, wanted = _is_string(_plain(found)) or pa.types.is_null(found), "strings"
        elif name == "request_id":
            right, wanted = pa.types.is_integer(_plain(found)) or _is_string(_plain(found)), "integers or strings"
        else:
            right = pa.types.is_integer(_plain(found))
        if not right:
            raise InputError(f'{source.path}: "{name}" is a column of {found}, not of {wanted}', _HINT)
    return names


class _Rows:
    """One batch of rows on its way to a batch of records."""

    def __init__(self, rows: pa.RecordBatch, first: int, path: Path, intake: Intake) -> None:
        self._rows, self._first, self._path, self._intake = rows, first, path, intake
        self._bad = np.zeros(len(rows), dtype=np.bool_)  # [R] not in order, as far as can be told from the row itself

    def take(self) -> TraceBatch | None:
        """Check and note every record; None where none is left."""
        intake = self._intake
        layer, step, seq_len = (self._integers(*bounds) for bounds in SCALARS)
        block_size = self._optional("block_size_tokens", 31, least=1) if intake.block_sizes else None
        engine_step = self._integers("engine_step", -(1 << 53), 1 << 53) if intake.engine_steps else None
        if "event" in self._rows.schema.names:
            event = self._rows["event"]
            right = pc.or_(
                pc.equal(_plain_array(event).cast(pa.string()), "dsa_topk").fill_null(False), pc.is_null(event)
            )
            self._bad |= ~_numpy(right)
        offsets, positions = self._positions(seq_len)
        ids: Any = _plain_array(self._rows["request_id"])
        if pa.types.is_integer(ids.type):
            request = self._integers("request_id", -(1 << 63), 1 << 63)
            keep = self._enter(request.tolist(), layer.tolist(), step.tolist())
        else:
            self._bad |= _numpy(pc.is_null(ids))
            names = ids.to_pylist()
            keep = self._enter(names, layer.tolist(), step.tolist())
            request = np.array([intake.number(n) if k else -1 for n, k in zip(names, keep, strict=True)], np.int64)
        accepted = int(np.count_nonzero(keep))
        intake.counts.accepted += accepted
        if block_size is not None:
            intake.counts.block_sizes |= set(np.unique(block_size[keep & (block_size > 0)]).tolist())
        if accepted == 0:
            return None
        if accepted < len(keep):
            counts = np.diff(offsets)
            positions = positions[np.repeat(keep, counts)]
            offsets = np.concatenate([[0], np.cumsum(counts[keep])])
        return TraceBatch(
            request_id=request[keep],
            layer_id=layer[keep].astype(np.int32),
            step_idx=step[keep],
            seq_len=seq_len[keep],
            offsets=offsets,
            positions=positions,
            engine_step=None if engine_step is None else engine_step[keep],
        )

    def _integers(self, name: str, least: int, end: int) -> NDArray[np.int64]:
        """A column of integers [R]; those that are null or not in ``least .. end - 1`` are bad."""
        column = _plain_array(self._rows[name])
        values = _int64(column)
        self._bad |= _numpy(pc.is_null(column))
        if pa.types.is_uint64(column.type):
            self._bad |= values < 0
        if end < 1 << 63:
            self._bad |= (values < least) | (values >= end)
        return values

    def _optional(self, name: str, bits: int, least: int) -> NDArray[np.int64] | None:
        """As :meth:`_integers`, but null is 0, and None is a column that is not there."""
        if name not in self._rows.schema.names:
            return None
        column = _plain_array(self._rows[name])
        values = _int64(column)
        null = _numpy(pc.is_null(column))
        self._bad |= ~null & ((values < least) | (values >= 1 << bits))
        values = values.copy()
        values[null] = 0
        return values

    def _positions(self, seq_len: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Offsets [R + 1] and ascending positions [N]; records without any are bad, those of bad ones mean nothing."""
        if _POSITIONS not in self._rows.schema.names:
            self._bad[:] = True
            return np.zeros(len(self._bad) + 1, dtype=np.int64), np.zeros(0, dtype=np.int32)
        column = self._rows[_POSITIONS]
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            column = column.cast(pa.large_list(column.type.value_type))
        self._bad |= _numpy(pc.is_null(column))
        begin = column.offsets.to_numpy().astype(np.int64)
        values = column.values.slice(int(begin[0]), int(begin[-1] - begin[0]))
        offsets = begin - begin[0]
        given: NDArray[Any] = values.to_numpy() if _is_int32(values) else _int64(values)
        if _is_int32(values) and _ascending(given, offsets, seq_len):
            return offsets, given
        positions: NDArray[np.int32] = np.empty(len(given), dtype=np.int32)
        _ascend(given, offsets, seq_len, positions, self._bad)
        return offsets, positions

    def _enter(self, ids: list[Any], layers: list[int], steps: list[int]) -> NDArray[np.bool_]:
        """Note the records in their order; [R] which of them are taken."""
        keep = ~self._bad
        at = 0
        for stop in (*np.flatnonzero(self._bad).tolist(), len(ids)):
            while at < stop:
                at = self._in_order(ids[:stop], layers, steps, at)
                if at < stop:
                    keep[at] = False
                    self._judge(at)
                    at += 1
            if stop < len(ids):
                self._judge(stop)
                at = stop + 1
        return keep

    def _in_order(self, ids: list[Any], layers: list[int], steps: list[int], begin: int) -> int:
        """Index of the first of ``ids`` from ``begin`` on that is out of order, or how many there are."""
        if type(ids[begin]) is int:
            return self._intake.enter_many(ids, layers, steps, begin)
        for at in range(begin, len(ids)):
            try:
                self._intake.enter(ids[at], layers[at], steps[at])
            except BadRecordError:
                return at
        return len(ids)

    def _judge(self, row: int) -> None:
        """Let the reader of JSON lines say what is wrong with a record, or that it merely has no positions."""
        record = {name: self._rows[name][row].as_py() for name in self._rows.schema.names}
        record = {name: value for name, value in record.items() if value is not None or name not in _OPTIONAL}
        place = str(self._first + row)
        try:
            accepted = check_record(record, self._intake)
        except BadRecordError as error:
            self._intake.reject(error, self._path, place)
            return
        if accepted.positions is not None:
            raise AssertionError(f"{self._path}:{place}: the readers do not agree on a record")
        self._intake.counts.without_positions += 1


@compiled
def _ascending(given: NDArray[np.int32], offsets: NDArray[np.int64], seq_len: NDArray[np.int64]) -> bool:
    """Whether every record of ``given`` [N] is as a batch must have it. No branch within one: it sees all positions."""
    for r in range(len(seq_len)):
        begin, end = offsets[r], offsets[r + 1]
        if end == begin or given[begin] < 0 or given[end - 1] >= seq_len[r]:
            return False
        wrong = 0
        for i in range(begin + 1, end):
            wrong += given[i] <= given[i - 1]
        if wrong:
            return False
    return True


@compiled
def _ascend(
    given: NDArray[np.integer],
    offsets: NDArray[np.int64],
    seq_len: NDArray[np.int64],
    positions: NDArray[np.int32],
    bad: NDArray[np.bool_],
) -> None:
    """Bring each record of ``given`` [N] in ascending order into ``positions`` [N]; ``bad`` [R] notes where it cannot.

    That is one without positions, with a position twice, below 0, or not below both its ``seq_len`` and 2^31.
    """
    for r in range(len(seq_len)):
        begin, end = offsets[r], offsets[r + 1]
        limit = min(seq_len[r], 1 << 31)
        right = end > begin
        sorted_already = True
        last = -1
        for i in range(begin, end):
            position = given[i]
            if position < 0 or position >= limit:
                right = False
                break
            if position <= last:
                sorted_already = False
            last = position
            positions[i] = position
        if right and not sorted_already:
            own = np.sort(positions[begin:end])
            positions[begin:end] = own
            for i in range(1, len(own)):
                if own[i] == own[i - 1]:
                    right = False
        if not right:
            bad[r] = True


def _int64(column: pa.Array) -> NDArray[np.int64]:
    """Integers [n], read-only; null is -1 and what does not fit is negative."""
    column = column.cast(pa.int64(), safe=False)
    values: NDArray[np.int64] = (column.fill_null(-1) if column.null_count else column).to_numpy()
    return values


def _is_int32(values: pa.Array) -> bool:
    return bool(values.type == pa.int32() and not values.null_count)


def _numpy(column: pa.BooleanArray) -> NDArray[np.bool_]:
    values: NDArray[np.bool_] = column.to_numpy(zero_copy_only=False)
    return values


def _plain(type: pa.DataType) -> pa.DataType:
    return type.value_type if pa.types.is_dictionary(type) else type


def _plain_array(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _is_string(type: pa.DataType) -> bool:
    return bool(pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type))


def _is_list(type: pa.DataType) -> bool:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)
    return any(kind(type) for kind in kinds) or bool(pa.types.is_large_list_view(type))
