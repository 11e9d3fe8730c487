"""The records that are analyzed: those of a trace sorted into streams, cut, and, for step union, merged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsakv.analysis.rows import IdleClock, Rows
from dsakv.config import AnalyzeConfig
from dsakv.trace.batch import TraceBatch

_FLUSH_RECORDS = 256
MERGED_LAYER = -1
"""Layer of a record that a step union made."""


@dataclass(frozen=True, slots=True)
class StreamRecords:
    """``R`` records with ``N`` selected tokens, each with its place in its stream. No record is without positions."""

    row: NDArray[np.int64]
    """[R] row of the stream."""
    index: NDArray[np.int64]
    """[R] number of the record in its stream, from 0."""
    request: NDArray[np.int64]  # [R]
    request_row: NDArray[np.int64]  # [R]
    layer: NDArray[np.int64]  # [R]
    step: NDArray[np.int64]  # [R]
    seq_len: NDArray[np.int64]  # [R]
    offsets: NDArray[np.int64]  # [R + 1]
    positions: NDArray[np.int32]
    """[N] ascending within a record; a token that several layers selected stands there as often in a step union."""
    engine_step: NDArray[np.int64] | None
    """[R] where the reader was asked for it."""
    ended: Sequence[int]
    """Rows of streams that had ended before these records: a row among them starts anew."""
    ended_requests: Sequence[int]
    """Likewise rows of requests."""

    def __len__(self) -> int:
        return len(self.row)


class _Record(NamedTuple):
    layer: int
    step: int
    seq_len: int
    positions: NDArray[np.int32]


@dataclass(slots=True)
class LeftOut:
    """Records in order that are not analyzed, and dense ones, which may be."""

    prefill_tail: int = 0
    dense: int = 0
    """Records that select every token of their sequence, as they do up to ``seq_len`` = top-k; tail aside."""

    def merge(self, later: LeftOut) -> None:
        """Add those of a later part."""
        self.prefill_tail += later.prefill_tail
        self.dense += later.dense


class StreamSplitter:
    """Sorts records into streams, in the order in which a stream has them.

    A stream is one layer of a request, or (``request``) a request with its records in (step, layer) order. With
    ``step_union`` the records of one (request, step) become one whose tokens are theirs one after the other. Requests
    may interleave, layers of a step may come in any order; steps of a request must not go backwards. So wherever
    layers come together, a request's step is held back until its next one begins, the request ends or the trace does.

    Args:
        config: what makes a stream, and what is left out.
        release: give the rows of idle streams to others; False keeps every row to the end.
    """

    def __init__(self, config: AnalyzeConfig, *, release: bool) -> None:
        self.left_out = LeftOut()
        self._config = config
        self._clock = IdleClock() if release else None
        self._streams, self._requests = Rows(), Rows()
        self._layers: Counter[int] = Counter()  # live streams of each request
        self._lengths: list[int] = []  # records so far, by stream row
        self._open: dict[int, list[_Record]] = {}  # by request: its current step
        self._seen = 0
        self._ended: list[int] = []
        self._ended_requests: list[int] = []

    def split(self, batch: TraceBatch) -> Iterator[StreamRecords]:
        """The records of ``batch`` that are in place now; never an empty batch.

        Raises:
            ReappearedError: a stream goes on that was taken for ended.
        """
        kept = self._filtered(batch)
        self._seen += len(batch)
        if kept is not None:
            rows = self._rows(kept)
            if self._clock is not None:
                self._clock.seen(np.array(rows, dtype=np.int64), self._seen)
            yield from self._numbered(kept, rows) if self._config.by_layer else self._ordered(kept)
        if self._clock is not None:
            yield from self._end(self._clock.ended(self._seen))

    def flush(self) -> Iterator[StreamRecords]:
        """The steps held back, at the end of the trace."""
        yield from self._close(list(self._open))

    def _rows(self, batch: TraceBatch) -> list[int]:
        """The row of each record's stream."""
        if not self._config.by_layer:
            return self._streams.rows(batch.request_id.tolist())[0]
        rows, new = self._streams.rows(zip(batch.request_id.tolist(), batch.layer_id.tolist(), strict=True))
        self._layers.update(key[0] for key in new)
        return rows

    def _filtered(self, batch: TraceBatch) -> TraceBatch | None:
        config = self._config
        keep = np.ones(len(batch), dtype=bool)
        if not config.prefill_tail:
            keep = batch.step_idx >= 0
            self.left_out.prefill_tail += int(np.count_nonzero(~keep))
        dense = (np.diff(batch.offsets) == batch.seq_len) & keep
        self.left_out.dense += int(np.count_nonzero(dense))
        if config.skip_dense:
            keep &= ~dense
        return batch.take(keep) if keep.any() else None

    def _ordered(self, batch: TraceBatch) -> Iterator[StreamRecords]:
        """Hold the steps of each request back until they are whole."""
        whole: list[tuple[int, list[_Record]]] = []
        columns = (batch.request_id, batch.layer_id, batch.step_idx, batch.seq_len, batch.offsets, batch.offsets[1:])
        for request, layer, step, seq_len, begin, end in zip(*(c.tolist() for c in columns), strict=False):
            held = self._open.setdefault(request, [])
            if held and held[0].step != step:
                whole.append((request, held))
                held = self._open[request] = []
            held.append(_Record(layer, step, seq_len, batch.positions[begin:end].astype(np.int32)))
        yield from self._emitted(whole)

    def _end(self, rows: list[int]) -> Iterator[StreamRecords]:
        """Release the rows of streams that have ended, and those of their requests."""
        keys = [self._streams.key(row) for row in rows]
        if not self._config.by_layer:
            yield from self._close(keys)
        for row, key in zip(rows, keys, strict=True):
            self._streams.release(row)
            self._ended.append(row)
            if row < len(self._lengths):
                self._lengths[row] = 0
            request = key[0] if self._config.by_layer else key
            self._layers[request] -= 1
            if self._layers[request] <= 0:
                del self._layers[request]
                gone = self._requests.row(request)
                self._requests.release(gone)
                self._ended_requests.append(gone)

    def _close(self, requests: list[int]) -> Iterator[StreamRecords]:
        for begin in range(0, len(requests), _FLUSH_RECORDS):
            part = requests[begin : begin + _FLUSH_RECORDS]
            yield from self._emitted([(request, self._open.pop(request)) for request in part if request in self._open])

    def _emitted(self, whole: list[tuple[int, list[_Record]]]) -> Iterator[StreamRecords]:
        """Whole steps as records of their streams."""
        requests: list[int] = []
        records: list[_Record] = []
        for request, held in whole:
            ordered = sorted(held, key=lambda record: record.layer)
            if self._config.step_union:
                positions = np.sort(np.concatenate([record.positions for record in ordered]))
                seq_len = max(record.seq_len for record in ordered)
                ordered = [_Record(MERGED_LAYER, ordered[0].step, seq_len, positions)]
            records += ordered
            requests += [request] * len(ordered)
        if not records:
            return
        offsets = np.zeros(len(records) + 1, dtype=np.int64)
        np.cumsum([len(record.positions) for record in records], out=offsets[1:])
        batch = TraceBatch(
            request_id=np.array(requests, dtype=np.int64),
            layer_id=np.array([record.layer for record in records], dtype=np.int64),
            step_idx=np.array([record.step for record in records], dtype=np.int64),
            seq_len=np.array([record.seq_len for record in records], dtype=np.int64),
            offsets=offsets,
            positions=np.concatenate([record.positions for record in records]),
        )
        yield from self._numbered(batch, [self._streams.row(request) for request in requests])

    def _numbered(self, batch: TraceBatch, rows: list[int]) -> Iterator[StreamRecords]:
        lengths = self._lengths
        lengths += [0] * (len(self._streams) - len(lengths))
        indices = []
        for row in rows:
            indices.append(lengths[row])
            lengths[row] += 1
        index, row_of = np.array(indices, dtype=np.int64), np.array(rows, dtype=np.int64)
        if self._config.max_steps_per_stream:
            keep = index < self._config.max_steps_per_stream
            if not keep.any():
                return
            batch, index, row_of = batch.take(keep), index[keep], row_of[keep]
        ended, self._ended = self._ended, []
        ended_requests, self._ended_requests = self._ended_requests, []
        yield StreamRecords(
            row=row_of,
            index=index,
            request=batch.request_id.astype(np.int64),
            request_row=np.array(self._requests.rows(batch.request_id.tolist())[0], dtype=np.int64),
            layer=batch.layer_id.astype(np.int64),
            step=batch.step_idx.astype(np.int64),
            seq_len=batch.seq_len.astype(np.int64),
            offsets=batch.offsets.astype(np.int64),
            positions=batch.positions.astype(np.int32, copy=False),
            engine_step=None if batch.engine_step is None else batch.engine_step.astype(np.int64),
            ended=ended,
            ended_requests=ended_requests,
        )
