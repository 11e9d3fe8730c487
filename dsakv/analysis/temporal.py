"""Locality in time: what consecutive records share, after how many steps a block is read again, working sets."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsakv.analysis.blocks import BlockRecords
from dsakv.analysis.locality import Columns
from dsakv.analysis.records import MERGED_LAYER
from dsakv.analysis.rows import Grid, LayerRows
from dsakv.compiled import compiled

STEP = ("step_jaccard", "step_kept")
LAYER = ("layer_jaccard", "layer_kept")
_DENSE = 4096
"""Distances from here on are rare: they are counted one by one."""


class History:
    """Follows every stream for one block size: columns, and histograms of reuse by layer.

    ``windows`` in records, ``reuse_cap`` in steps. Memory: 12 bytes for each block of a live stream.
    """

    def __init__(self, windows: tuple[int, ...], reuse_cap: int) -> None:
        self.windows, self.reuse_cap = windows, reuse_cap
        self._state = Grid(mark=np.int32, step=np.int64)
        self._before = np.zeros(
            (3, 0), dtype=np.int64
        )  # [3, rows], blocks and step of the last record, highest block + 1
        self.layers = LayerRows()
        self._reuse = Grid(count=np.int64)  # [L, near distances]
        self._far: Counter[tuple[int, int]] = Counter()  # by layer row and distance
        self._touches = np.zeros((2, 0), dtype=np.int64)  # [2, L]: first, second

    @property
    def names(self) -> tuple[str, ...]:
        """Rows of the columns."""
        return (*STEP, *(f"working_set[{window}]" for window in self.windows))

    def columns(self, batch: BlockRecords) -> Columns:
        """Look up the past of each record, then enter it."""
        records = batch.records
        for row in records.ended:
            if row < self._state.rows:
                self._state.clear(row)
                self._before[:, row] = 0
        self._state.reserve(int(records.row.max()) + 1, batch.width)
        self._before = _widened(self._before, self._state.rows)
        layer_row = self.layers.rows(records.layer)
        self._grow()
        far = np.empty((2, len(batch.blocks)), dtype=np.int64)
        out = np.empty((len(self.names), len(batch)))
        spilled = _follow(
            batch.blocks.view(np.uint32),
            batch.offsets,
            records.row,
            records.index,
            records.step,
            layer_row,
            np.array(self.windows, dtype=np.int64),
            self._state["mark"],
            self._state["step"],
            self._before,
            self.reuse_cap,
            self._reuse["count"],
            self._touches,
            far,
            out,
        )
        if spilled:
            self._far.update(zip(far[0, :spilled].tolist(), far[1, :spilled].tolist(), strict=True))
        return out

    def merge(self, other: History) -> None:
        """Take in the histograms of ``other``."""
        for layer, theirs in other.layers:
            mine = self.layers.row(layer)
            self._grow()
            self._touches[:, mine] += other._touches[:, theirs]
            self._reuse["count"][mine] += other._reuse["count"][theirs]
            for (row, distance), count in other._far.items():
                if row == theirs:
                    self._far[mine, distance] += count

    def _grow(self) -> None:
        self._touches = _widened(self._touches, len(self.layers))
        self._reuse.reserve(len(self.layers), min(self.reuse_cap, _DENSE) + 1)

    def drop_state(self) -> None:
        """Forget the streams: no record follows."""
        self._state = Grid()

    def result(self, figures: dict[str, Any], layer: int | None = None) -> dict[str, Any]:
        """``temporal_locality`` of one layer or of all, from the distribution of each row and the histograms."""
        rows = self.layers.of(layer)
        first, second = self._touches[:, rows].sum(axis=1).tolist()
        near = self._reuse["count"][rows].sum(axis=0)
        distances = Counter({int(d): int(near[d]) for d in np.flatnonzero(near)})
        for (row, distance), count in self._far.items():
            if row in rows:
                distances[distance] += count
        histogram = sorted(distances.items())
        samples = sum(distances.values())
        upto = np.cumsum([count for _, count in histogram]).tolist()
        return {
            "step_jaccard": figures["step_jaccard"],
            "reuse_distance_hist_steps": {str(distance): count for distance, count in histogram},
            "reuse_distance_cdf_steps": [
                {"reuse_distance_steps": distance, "cdf": count / samples}
                for (distance, _), count in zip(histogram, upto, strict=True)
            ],
            "first_touch_blocks": first,
            "single_touch_blocks": first - second,
            "reuse_samples": samples,
            "reuse_cap_steps": self.reuse_cap,
        }


class LayerOverlap:
    """What a record shares with the layer before it: with its request's record that precedes it in the trace, where
    that is of the same step and a lower layer.
    """

    def __init__(self) -> None:
        self._state = Grid(mark=np.int32)
        self._last = np.zeros((4, 0), dtype=np.int64)  # mark, layer, step and blocks of the request's last record

    def columns(self, batch: BlockRecords) -> Columns:
        """NaN where the record is of the request's first layer, or layers have been merged."""
        records = batch.records
        out = np.full((len(LAYER), len(batch)), np.nan)
        if records.layer[0] == MERGED_LAYER:
            return out
        for row in records.ended_requests:
            if row < self._state.rows:
                self._state.clear(row)
                self._last[:, row] = 0
        self._state.reserve(int(records.request_row.max()) + 1, batch.width)
        self._last = _widened(self._last, self._state.rows)
        _overlap_layers(
            batch.blocks.view(np.uint32),
            batch.offsets,
            records.request_row,
            records.layer,
            records.step,
            self._state["mark"],
            self._last,
            out,
        )
        return out

    def drop_state(self) -> None:
        """Forget the requests: no record follows."""
        self._state = Grid()


def _widened(values: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """``values`` [n, R] with zeros for new rows."""
    return values if values.shape[1] >= rows else np.pad(values, ((0, 0), (0, rows - values.shape[1])))


@compiled
def _follow(
    blocks: NDArray[np.uint32],  # [T]
    offsets: NDArray[np.int64],  # [R + 1]
    rows: NDArray[np.int64],  # [R]
    index: NDArray[np.int64],  # [R]
    step: NDArray[np.int64],  # [R]
    layer_row: NDArray[np.int64],  # [R]
    windows: NDArray[np.int64],  # [W]
    mark: NDArray[np.int32],  # [rows, width], twice the number, from 1, of the record that touched the block last
    last_step: NDArray[np.int64],  # [rows, width]                     (0: none did), plus 1 if others did before it
    before: NDArray[np.int64],  # [3, rows]: blocks and step of the stream's last record, its highest block + 1
    reuse_cap: int,
    reuse: NDArray[np.int64],  # [L, near distances]
    touches: NDArray[np.int64],  # [2, L]: first, second
    far: NDArray[np.int64],  # [2, T]: layer row and distance of the reuses beyond; filled up to the result
    out: Columns,  # [2 + W, R]
) -> int:
    spilled = 0
    near = reuse.shape[1]
    for r in range(len(rows)):
        row, layer, number = rows[r], layer_row[r], index[r] + 1
        mine, mine_step = mark[row], last_step[row]
        both, first, second = 0, 0, 0
        for t in range(offsets[r], offsets[r + 1]):
            block = blocks[t]
            last = mine[block]
            if last == 0:
                first += 1
            else:
                second += 1 - (last & 1)
                if last >> 1 == index[r]:  # most are: they share one distance
                    both += 1
                else:
                    distance = min(step[r] - mine_step[block], reuse_cap)
                    if distance < near:
                        reuse[layer, distance] += 1
                    else:
                        far[0, spilled], far[1, spilled] = layer, distance
                        spilled += 1
            mine[block] = 2 * number + (last != 0)
            mine_step[block] = step[r]
        distance = min(step[r] - before[1, row], reuse_cap)  # of a first record it means nothing, and may be negative
        if both and distance < near:
            reuse[layer, distance] += both
        else:
            far[0, spilled : spilled + both], far[1, spilled : spilled + both] = layer, distance
            spilled += both
        touches[0, layer] += first
        touches[1, layer] += second
        size = offsets[r + 1] - offsets[r]
        out[0, r] = both / (size + before[0, row] - both) if index[r] else np.nan
        out[1, r] = both / before[0, row] if index[r] else np.nan
        before[0, row], before[1, row], before[2, row] = (
            size,
            step[r],
            max(before[2, row], blocks[offsets[r + 1] - 1] + 1),
        )
        for w in range(len(windows)):
            out[2 + w, r] = (
                size if windows[w] == 1 else _newer(mine[: before[2, row]], 2 * max(number - windows[w], 0) + 1)
            )
    return spilled


@compiled
def _newer(marks: NDArray[np.int32], limit: int) -> np.int32:
    """Blocks with a mark above ``limit``."""
    count, bound = np.int32(0), np.int32(limit)
    for block in range(len(marks)):
        count += np.int32(marks[block] > bound)
    return count


@compiled
def _overlap_layers(
    blocks: NDArray[np.uint32],  # [T]
    offsets: NDArray[np.int64],  # [R + 1]
    rows: NDArray[np.int64],  # [R], of requests
    layers: NDArray[np.int64],  # [R]
    step: NDArray[np.int64],  # [R]
    mark: NDArray[np.int32],  # [rows, width], number of the request's record that touched the block last; 0 for none
    last: NDArray[np.int64],  # [4, rows]: number, layer, step and blocks of the request's last record
    out: Columns,  # [2, R]
) -> None:
    for r in range(len(rows)):
        row = rows[r]
        number = last[0, row]
        mine, both = mark[row], 0
        for t in range(offsets[r], offsets[r + 1]):
            both += mine[blocks[t]] == number
            mine[blocks[t]] = number + 1
        size = offsets[r + 1] - offsets[r]
        if number and last[2, row] == step[r] and last[1, row] < layers[r]:
            out[0, r] = both / (size + last[3, row] - both)
            out[1, r] = both / last[3, row]
        last[0, row], last[1, row], last[2, row], last[3, row] = number + 1, layers[r], step[r], size
