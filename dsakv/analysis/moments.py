"""Count, extremes, mean and spread of figures as sums of integers: any order and any split gives the same bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsakv.analysis.rows import LayerRows
from dsakv.compiled import compiled

BITS = 32
"""Values count in units of ``2**-BITS``: rounding moves a figure by at most 1.2e-10."""
_ONE = float(1 << BITS)
_WORD = 64
_WORDS = 7  # count, three of the sum, three of the squares; the high word first
_MASK32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)


class Moments:
    """Distributions of ``M`` named figures, apart for each layer.

    Values are below 2**31, so that a square has 126 bits; sums have 192, in three words.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.layers = LayerRows()
        self._extremes = np.empty((0, len(names), 2))  # [L, M, 2]
        self._sums = np.empty((0, len(names), _WORDS), dtype=np.uint64)  # [L, M, 7]

    def add(self, layers: NDArray[np.integer], columns: NDArray[np.float64]) -> None:
        """Take in ``columns`` [M, R] of the records of ``layers`` [R]; NaN stands for no value."""
        rows = self.layers.rows(layers)
        self._grow()
        _accumulate(rows, columns, self._extremes, self._sums)

    def merge(self, other: Moments) -> None:
        """Take in what ``other`` has seen."""
        for layer, theirs in other.layers:
            mine = self.layers.row(layer)
            self._grow()
            low, high = other._extremes[theirs, :, 0], other._extremes[theirs, :, 1]
            np.minimum(self._extremes[mine, :, 0], low, out=self._extremes[mine, :, 0])
            np.maximum(self._extremes[mine, :, 1], high, out=self._extremes[mine, :, 1])
            _merge(self._sums[mine], other._sums[theirs])

    def result(self, layer: int | None = None) -> dict[str, dict[str, Any]]:
        """The distribution of each figure, of one layer or of all together."""
        rows = self.layers.of(layer)
        return {name: self._distribution(m, rows) for m, name in enumerate(self.names)}

    def _grow(self) -> None:
        have, need = len(self._sums), len(self.layers)
        if need > have:
            shape = (max(need, 2 * have), len(self.names))
            extremes, sums = np.empty((*shape, 2)), np.zeros((*shape, _WORDS), dtype=np.uint64)
            extremes[..., 0], extremes[..., 1] = math.inf, -math.inf
            extremes[:have], sums[:have] = self._extremes, self._sums
            self._extremes, self._sums = extremes, sums

    def _distribution(self, m: int, rows: list[int]) -> dict[str, Any]:
        """``{count,min,max,mean,std}``, ``std`` with n-1 (0 for n=1). Null but ``count`` when empty."""
        parts = [_integers(self._sums[row, m]) for row in rows]
        count, total, squares = (sum(column) for column in zip(*parts, strict=True)) if parts else (0, 0, 0)
        if not count:
            return {"count": 0, "min": None, "max": None, "mean": None, "std": None}
        low, high = float(self._extremes[rows, m, 0].min()), float(self._extremes[rows, m, 1].max())
        std = 0.0
        if count > 1:  # a quotient of integers, so that close values far from zero lose nothing
            std = math.sqrt((count * squares - total * total) / (count * (count - 1))) / _ONE
        mean = min(max(total / (count << BITS), low), high)  # rounding may carry it past the extremes
        return {"count": count, "min": low, "max": high, "mean": mean, "std": std}


def _integers(sums: NDArray[np.uint64]) -> tuple[int, int, int]:
    """Count, sum and sum of squares."""
    words = [int(word) for word in sums]
    total, squares = (high << 2 * _WORD | middle << _WORD | low for high, middle, low in (words[1:4], words[4:]))
    return words[0], total, squares


@compiled
def _add(sums: NDArray[np.uint64], at: int, high: np.uint64, middle: np.uint64, low: np.uint64) -> None:
    """Add a number of three words, of 190 bits at most, to the one at ``at``."""
    sums[at + 2] += low
    if sums[at + 2] < low:
        middle += np.uint64(1)
        high += np.uint64(1) if middle == 0 else np.uint64(0)
    sums[at + 1] += middle
    sums[at] += high + (np.uint64(1) if sums[at + 1] < middle else np.uint64(0))


@compiled
def _merge(mine: NDArray[np.uint64], theirs: NDArray[np.uint64]) -> None:
    for m in range(len(mine)):
        mine[m, 0] += theirs[m, 0]
        for at in (1, 4):
            _add(mine[m], at, theirs[m, at], theirs[m, at + 1], theirs[m, at + 2])


@compiled
def _accumulate(
    rows: NDArray[np.int64], columns: NDArray[np.float64], extremes: NDArray[np.float64], sums: NDArray[np.uint64]
) -> None:
    figures, records = columns.shape
    for m in range(figures):
        for r in range(records):
            value = columns[m, r]
            if np.isnan(value):
                continue
            row = rows[r]
            extremes[row, m, 0] = min(extremes[row, m, 0], value)
            extremes[row, m, 1] = max(extremes[row, m, 1], value)
            own = sums[row, m]
            own[0] += np.uint64(1)
            fixed = np.uint64(np.rint(value * _ONE))
            _add(own, 1, np.uint64(0), np.uint64(0), fixed)
            high, low = fixed >> _SHIFT32, fixed & _MASK32
            middle = high * low
            square = low * low + (middle << np.uint64(33))
            carry = np.uint64(1) if square < low * low else np.uint64(0)
            _add(own, 4, np.uint64(0), high * high + (middle >> np.uint64(31)) + carry, square)
