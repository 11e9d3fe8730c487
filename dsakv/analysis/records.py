"""The records that are analyzed: those of a trace sorted into streams, cut, and, for step union, merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsakv.analysis.rows import Rows
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


@dataclass(slots=True)
class StreamSplitter:
    """Sorts records into streams, in the order in which a stream has them.

    A stream is one layer of a request, or (``request``) a request with its records in (step, layer) order. With
    ``step_union`` the records of one (request, step) become one whose tokens are theirs one after the other. Requests
    may interleave, layers of a step may come in any order; steps of a request must not go backwards. So wherever
    layers come together, a request's step is held back until its next one begins, the request ends or the trace does.
    """

    key_mode: Literal["request_layer", "request"]
    step_union: bool = False
    max_steps: int = 0
    """Records of each stream to use; 0 takes all."""
    prefill_tail: bool = False
    """Keep negative steps."""
    skip_dense: bool = False
    release: bool = True
    """See :class:`Rows`."""
    left_out: LeftOut = field(default_factory=LeftOut)
    streams: Rows = field(init=False)
    requests: Rows = field(init=False)
    _lengths: list[int] = field(default_factory=list)  # records so far, by stream row
    _open: dict[int, list[_Record]] = field(default_factory=dict)  # by request: its current step
    _seen: int = 0
    _ended: list[int] = field(default_factory=list)
    _ended_requests: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.streams, self.requests = Rows(release=self.release), Rows(release=self.release)

    @property
    def _by_layer(self) -> bool:
        return self.key_mode == "request_layer" and not self.step_union

    def split(self, batch: TraceBatch) -> Iterator[StreamRecords]:
        """The records of ``batch`` that are in place now; never an empty batch.

        Raises:
            ReappearedError: a stream goes on that was taken for finished.
        """
        kept = self._filtered(batch)
        self._seen += len(batch)
        if kept is not None and self._by_layer:
            rows = [self.streams.row(key) for key in zip(kept.request_id.tolist(), kept.layer_id.tolist(), strict=True)]
            yield from self._numbered(kept, rows)
        elif kept is not None:
            yield from self._ordered(kept)
        yield from self._end_silent(kept)

    def flush(self) -> Iterator[StreamRecords]:
        """The steps held back, at the end of the trace."""
        yield from self._close(list(self._open))

    def _filtered(self, batch: TraceBatch) -> TraceBatch | None:
        keep = np.ones(len(batch), dtype=bool)
        if not self.prefill_tail:
            keep = batch.step_idx >= 0
            self.left_out.prefill_tail += int(np.count_nonzero(~keep))
        dense = (np.diff(batch.offsets) == batch.seq_len) & keep
        self.left_out.dense += int(np.count_nonzero(dense))
        if self.skip_dense:
            keep &= ~dense
        return _taken(batch, keep)

    def _ordered(self, batch: TraceBatch) -> Iterator[StreamRecords]:
        """Hold the steps of each request back until they are whole."""
        whole: list[tuple[int, list[_Record]]] = []
        columns = (batch.request_id, batch.layer_id, batch.step_idx, batch.seq_len, batch.offsets, batch.offsets[1:])
        for request, layer, step, seq_len, begin, end in zip(*(c.tolist() for c in columns), strict=False):
            self.streams.row(request)
            held = self._open.setdefault(request, [])
            if held and held[0].step != step:
                whole.append((request, held))
                held = self._open[request] = []
            held.append(_Record(layer, step, seq_len, batch.positions[begin:end].astype(np.int32)))
        yield from self._emitted(whole)

    def _end_silent(self, batch: TraceBatch | None) -> Iterator[StreamRecords]:
        """Release what has been silent for long."""
        none = np.empty(0, dtype=np.int64)
        requests = none if batch is None else batch.request_id
        if self._by_layer:
            layers = none if batch is None else batch.layer_id
            keys: list[tuple[int, int]] = list(zip(requests.tolist(), layers.tolist(), strict=True))
            spoke = np.array([self.streams.row(key) for key in keys], dtype=np.int64)
        else:
            spoke = np.array([self.streams.row(request) for request in requests.tolist()], dtype=np.int64)
        ending = self.streams.silent(spoke, self._seen)
        if not self._by_layer:
            yield from self._close([self.streams.key(row) for row in ending])
        for row in ending:
            self.streams.release(row)
            self._ended.append(row)
            if row < len(self._lengths):
                self._lengths[row] = 0
        spoke = np.array([self.requests.row(request) for request in requests.tolist()], dtype=np.int64)
        for row in self.requests.silent(spoke, self._seen):
            self.requests.release(row)
            self._ended_requests.append(row)

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
            if self.step_union:
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
        yield from self._numbered(batch, [self.streams.row(request) for request in requests])

    def _numbered(self, batch: TraceBatch, rows: list[int]) -> Iterator[StreamRecords]:
        lengths = self._lengths
        lengths += [0] * (len(self.streams) - len(lengths))
        indices = []
        for row in rows:
            indices.append(lengths[row])
            lengths[row] += 1
        index, row_of = np.array(indices, dtype=np.int64), np.array(rows, dtype=np.int64)
        if self.max_steps:
            keep = index < self.max_steps
            taken = _taken(batch, keep)
            if taken is None:
                return
            batch, index, row_of = taken, index[keep], row_of[keep]
        ended, self._ended = self._ended, []
        ended_requests, self._ended_requests = self._ended_requests, []
        yield StreamRecords(
            row=row_of,
            index=index,
            request=batch.request_id.astype(np.int64),
            request_row=np.array([self.requests.row(r) for r in batch.request_id.tolist()], dtype=np.int64),
            layer=batch.layer_id.astype(np.int64),
            step=batch.step_idx.astype(np.int64),
            seq_len=batch.seq_len.astype(np.int64),
            offsets=batch.offsets.astype(np.int64),
            positions=batch.positions.astype(np.int32, copy=False),
            engine_step=None if batch.engine_step is None else batch.engine_step.astype(np.int64),
            ended=ended,
            ended_requests=ended_requests,
        )


def _taken(batch: TraceBatch, keep: NDArray[np.bool_]) -> TraceBatch | None:
    """The records of ``batch`` to ``keep`` [R]; None where there are none."""
    if keep.all():
        return batch
    if not keep.any():
        return None
    counts = np.diff(batch.offsets)
    offsets = np.zeros(int(np.count_nonzero(keep)) + 1, dtype=np.int64)
    np.cumsum(counts[keep], out=offsets[1:])
    return TraceBatch(
        request_id=batch.request_id[keep],
        layer_id=batch.layer_id[keep],
        step_idx=batch.step_idx[keep],
        seq_len=batch.seq_len[keep],
        offsets=offsets,
        positions=batch.positions[np.repeat(keep, counts)],
        engine_step=None if batch.engine_step is None else batch.engine_step[keep],
    )
