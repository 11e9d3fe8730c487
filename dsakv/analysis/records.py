"""The records that are analyzed: those of a trace sorted into streams, cut, and, for step union, merged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsakv.trace.batch import TraceBatch

_FLUSH_RECORDS = 256


@dataclass(frozen=True, slots=True)
class StreamRecords:
    """``R`` records with ``N`` selected tokens, each with its place in its stream. No record is without positions."""

    stream: NDArray[np.int64]
    """[R] streams numbered from 0."""
    index: NDArray[np.int64]
    """[R] number of the record in its stream, from 0."""
    step: NDArray[np.int64]  # [R]
    seq_len: NDArray[np.int64]  # [R]
    offsets: NDArray[np.int64]  # [R + 1]
    positions: NDArray[np.int64]
    """[N] ascending within a record; a token that several layers selected stands there as often in a step union."""

    def __len__(self) -> int:
        return len(self.stream)


@dataclass(frozen=True, slots=True)
class BlockRecords:
    """Records with the ``T`` blocks that they touch for one block size; ``T >= R``."""

    records: StreamRecords
    current: NDArray[np.int64]
    """[R] block of the newest token."""
    offsets: NDArray[np.int64]  # [R + 1], into the [T] arrays
    blocks: NDArray[np.int64]
    """[T] ascending and unique within a record."""
    tokens: NDArray[np.int64]
    """[T] selected tokens in each block."""
    row: NDArray[np.int64]
    """[T] the record of each block, as its place in this batch."""

    def __len__(self) -> int:
        return len(self.records)


def touched_blocks(records: StreamRecords, block_size: int) -> BlockRecords:
    """Map positions to blocks of ``block_size`` tokens, ``position // block_size``."""
    block = records.positions // block_size  # [N], ascending within a record
    begins = np.empty(len(block), dtype=bool)
    np.not_equal(block[1:], block[:-1], out=begins[1:])
    begins[records.offsets[:-1]] = True
    starts = np.flatnonzero(begins)  # [T]
    offsets = np.searchsorted(starts, records.offsets)
    return BlockRecords(
        records=records,
        current=(records.seq_len - 1) // block_size,
        offsets=offsets,
        blocks=block[starts],
        tokens=np.diff(starts, append=len(block)),
        row=np.repeat(np.arange(len(records)), np.diff(offsets)),
    )


class _Record(NamedTuple):
    request: int
    layer: int
    step: int
    seq_len: int
    positions: NDArray[np.integer]


class StreamSplitter:
    """Sorts records into streams, in the order in which a stream has them.

    A stream is one layer of a request, or (``request``) a request with its records in (step, layer) order. With
    ``step_union`` the records of one (request, step) become one whose tokens are theirs one after the other. Requests
    may interleave, layers of a step may come in any order; steps of a request must not go backwards. So wherever
    layers come together, a request's step is held back until its next one begins or the trace ends.

    Args:
        max_steps: records of each stream to use; 0 takes all.
        prefill_tail: keep negative steps; ``prefill_tail_records`` counts those left out.
    """

    def __init__(
        self,
        key_mode: Literal["request_layer", "request"],
        *,
        step_union: bool = False,
        max_steps: int = 0,
        prefill_tail: bool = False,
    ) -> None:
        self.prefill_tail_records = 0
        self._by_layer = key_mode == "request_layer" and not step_union
        self._union = step_union
        self._max_steps = max_steps
        self._prefill_tail = prefill_tail
        self._streams: dict[tuple[int, int], int] = {}
        self._lengths: list[int] = []  # records of each stream so far
        self._open: dict[int, list[_Record]] = {}  # by request: its current step

    def split(self, batch: TraceBatch) -> Iterator[StreamRecords]:
        """The records of ``batch`` that are in place now; never an empty batch."""
        ready = []
        columns = zip(
            batch.request_id.tolist(),
            batch.layer_id.tolist(),
            batch.step_idx.tolist(),
            batch.seq_len.tolist(),
            batch.offsets[:-1].tolist(),
            batch.offsets[1:].tolist(),
            strict=True,
        )
        for request, layer, step, seq_len, begin, end in columns:
            if step < 0 and not self._prefill_tail:
                self.prefill_tail_records += 1
                continue
            record = _Record(request, layer, step, seq_len, batch.positions[begin:end])
            if self._by_layer:
                ready.append(record)
                continue
            held = self._open.setdefault(request, [])
            if held and held[0].step != step:
                ready += self._close(held)
                held.clear()
            held.append(record._replace(positions=record.positions.copy()))  # a view would keep the batch alive
        yield from self._number(ready)

    def flush(self) -> Iterator[StreamRecords]:
        """The steps held back, at the end of the trace."""
        ready: list[_Record] = []
        for held in self._open.values():
            ready += self._close(held)
            if len(ready) >= _FLUSH_RECORDS:
                yield from self._number(ready)
                ready = []
        self._open = {}
        yield from self._number(ready)

    def _close(self, held: list[_Record]) -> list[_Record]:
        """One step of one request with all its layers."""
        held = sorted(held, key=lambda record: record.layer)
        if not self._union:
            return held
        positions = np.sort(np.concatenate([record.positions for record in held]))
        return [_Record(held[0].request, -1, held[0].step, max(record.seq_len for record in held), positions)]

    def _number(self, ready: list[_Record]) -> Iterator[StreamRecords]:
        kept: list[_Record] = []
        streams, indices = [], []
        for record in ready:
            key = (record.request, record.layer if self._by_layer else -1)
            stream = self._streams.setdefault(key, len(self._streams))
            if stream == len(self._lengths):
                self._lengths.append(0)
            index = self._lengths[stream]
            if self._max_steps and index >= self._max_steps:
                continue
            self._lengths[stream] = index + 1
            kept.append(record)
            streams.append(stream)
            indices.append(index)
        if not kept:
            return
        offsets = np.zeros(len(kept) + 1, dtype=np.int64)
        np.cumsum([len(record.positions) for record in kept], out=offsets[1:])
        yield StreamRecords(
            stream=np.array(streams, dtype=np.int64),
            index=np.array(indices, dtype=np.int64),
            step=np.array([record.step for record in kept], dtype=np.int64),
            seq_len=np.array([record.seq_len for record in kept], dtype=np.int64),
            offsets=offsets,
            positions=np.concatenate([record.positions for record in kept]).astype(np.int64),
        )
