"""Whose blocks share a cache: a stream's, a layer's, a request's, or all of the run.

Where several streams share one, block 5 of one layer is not block 5 of another: each (request, layer, block) gets the
cache's next number when it is first read, and by these numbers a set is in order. Leading blocks that a prompt shares
with an earlier request are that request's blocks. A cache's step is what must be there at once: what a layer reads for
all requests in one pass of the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dsakv.analysis.blocks import BlockRecords
from dsakv.analysis.caches import NO_LAYER, CacheSteps
from dsakv.analysis.rows import Grid, LayerRows
from dsakv.compiled import compiled

Scope = Literal["stream", "layer", "request", "run"]
Owners = Mapping[int, Sequence[tuple[int, int]]]
"""By request: (earlier request, tokens), ascending: up to so many tokens, its prompt's blocks are those of this one."""
_END = np.iinfo(np.int64).max


def stream_steps(batch: BlockRecords, layered: bool) -> CacheSteps:
    """One cache a stream; ``layered`` where a stream is of one layer."""
    records = batch.records
    layer = records.layer if layered else np.full(len(batch), NO_LAYER, dtype=np.int64)
    return CacheSteps(records.row, layer, records.request, batch.offsets, batch.blocks, batch.width, records.ended)


class SharedSteps:
    """Caches that several streams share, for one block size.

    ``request``: a cache for all layers of a request. ``layer``: one for each layer, shared by all requests. ``run``: a
    single one. The latter two take records by engine step, then layer, and keep every block of the run in mind.
    """

    def __init__(self, scope: Scope, owners: Owners) -> None:
        self._scope = scope
        self._owners = owners if scope in ("layer", "run") else {}
        self._tables = Grid(id=np.int32)  # [tables, blocks]: one more than the block's number in its cache; 0 for none
        self._table: dict[tuple[int, int], int] = {}  # by request and layer
        self._free: list[int] = []
        self._used = np.zeros(0, dtype=np.int64)  # [caches]: numbers given
        self._stamp = Grid(pass_number=np.int64)  # [caches, numbers]: the last pass that read the block
        self._passes = 0
        self._layers = LayerRows()

    def steps(self, batch: BlockRecords) -> CacheSteps:
        """The steps of the caches that ``batch`` makes; passes must not be cut in two by batches."""
        records = batch.records
        ended: Sequence[int] = ()
        if self._scope == "request":
            ended = records.ended_requests
            self._forget(set(ended))
            cache = records.request_row
        elif self._scope == "layer":
            cache = self._layers.rows(records.layer)
        else:
            cache = np.zeros(len(batch), dtype=np.int64)
        tables, ends, places = self._segments(batch)
        self._tables.reserve(len(self._table) + len(self._free), batch.width)
        caches = int(cache.max()) + 1
        if len(self._used) < caches:
            self._used = np.concatenate([self._used, np.zeros(caches - len(self._used), dtype=np.int64)])
        self._used[list(ended)] = 0
        new = np.bincount(cache, weights=np.diff(batch.offsets), minlength=len(self._used)).astype(np.int64)
        self._stamp.reserve(caches, int((self._used + new).max()))
        ids, offsets = np.empty(len(batch.blocks), dtype=np.int32), np.empty(len(batch) + 1, dtype=np.int64)
        opens = self._opens(batch)
        _number(
            batch.blocks, batch.offsets, cache, opens, tables, ends, places,
            self._tables["id"], self._used, self._stamp["pass_number"], self._passes, ids, offsets,
        )  # fmt: skip
        self._passes += len(batch)
        first = np.flatnonzero(opens)
        bounds = np.append(offsets[first], offsets[-1])
        _sort(ids, bounds)
        layer = records.layer[first] if self._scope == "layer" else np.full(len(first), NO_LAYER, dtype=np.int64)
        request = records.request[first] if self._scope == "request" else None
        return CacheSteps(cache[first], layer, request, bounds, ids[: offsets[-1]], int(self._used.max()), ended)

    def _opens(self, batch: BlockRecords) -> NDArray[np.bool_]:
        """Whether a record begins a pass, [R]."""
        records = batch.records
        opens = np.ones(len(batch), dtype=bool)
        if records.engine_step is not None:
            same_step = records.engine_step[1:] == records.engine_step[:-1]
            opens[1:] = ~(same_step & (records.layer[1:] == records.layer[:-1]))
        return opens

    def _forget(self, requests: set[int]) -> None:
        """Give the tables of ended requests free, by the rows that the requests had."""
        if not requests:
            return
        for key in [key for key in self._table if key[0] in requests]:
            table = self._table.pop(key)
            self._tables.clear(table)
            self._free.append(table)

    def _segments(self, batch: BlockRecords) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Which table holds a record's blocks: tables [S] for the blocks below ends [S]; places [R + 1] into both."""
        records = batch.records
        tables: list[int] = []
        ends: list[int] = []
        places = [0]
        names = records.request_row if self._scope == "request" else records.request
        for name, request, layer in zip(names.tolist(), records.request.tolist(), records.layer.tolist(), strict=True):
            for owner, tokens in self._owners.get(request, ()):
                tables.append(self._row(owner, layer))
                ends.append(tokens // batch.block_size)
            tables.append(self._row(name, layer))
            ends.append(_END)
            places.append(len(tables))
        return np.array(tables), np.array(ends), np.array(places)

    def _row(self, request: int, layer: int) -> int:
        table = self._table.get((request, layer))
        if table is None:
            table = self._table[request, layer] = self._free.pop() if self._free else len(self._table)
        return table


@compiled
def _number(
    blocks: NDArray[np.int32],  # [T]
    block_offsets: NDArray[np.int64],  # [R + 1]
    cache: NDArray[np.int64],  # [R]
    opens: NDArray[np.bool_],  # [R]
    tables: NDArray[np.int64],  # [S]
    ends: NDArray[np.int64],  # [S]
    places: NDArray[np.int64],  # [R + 1]
    known: NDArray[np.int32],  # [tables, blocks]
    used: NDArray[np.int64],  # [caches]
    stamp: NDArray[np.int64],  # [caches, numbers]
    passes: int,  # before this batch
    ids: NDArray[np.int32],  # [T]
    offsets: NDArray[np.int64],  # [R + 1], into ids
) -> None:
    count = 0
    number = passes
    for r in range(len(cache)):
        offsets[r] = count
        number += opens[r]
        row, segment = cache[r], places[r]
        for t in range(block_offsets[r], block_offsets[r + 1]):
            block = blocks[t]
            while block >= ends[segment]:
                segment += 1
            block_id = known[tables[segment], block] - 1
            if block_id < 0:
                block_id = used[row]
                used[row] += 1
                known[tables[segment], block] = block_id + 1
            if stamp[row, block_id] != number:  # else another request of the pass reads it too
                stamp[row, block_id] = number
                ids[count] = block_id
                count += 1
    offsets[len(cache)] = count


@compiled
def _sort(ids: NDArray[np.int32], bounds: NDArray[np.int64]) -> None:
    """Put each step's ids in ascending order; most are already."""
    for r in range(len(bounds) - 1):
        own = ids[bounds[r] : bounds[r + 1]]
        for i in range(1, len(own)):
            if own[i] < own[i - 1]:
                own.sort()
                break
