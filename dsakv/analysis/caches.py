"""What a cache of any capacity would hit: one LRU stack for each cache, their histograms added up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dsakv.analysis.rows import Grid, LayerRows
from dsakv.analysis.stack import SEQUENTIAL, STEP, LruStacks

LruMode = Literal["step", "sequential"]
MODES: dict[LruMode, int] = {"step": STEP, "sequential": SEQUENTIAL}
TARGETS = (0.5, 0.8, 0.9, 0.95, 0.99)
"""Hit rates to look up capacities for."""
NO_LAYER = -1
"""Layer of a cache that several layers share."""
_FREE = -2


@dataclass(frozen=True, slots=True)
class CacheSteps:
    """``R`` steps of caches: what each must hold at once, ``T`` blocks in all."""

    row: NDArray[np.int64]
    """[R] row of the cache."""
    layer: NDArray[np.int64]
    """[R] the layer that the cache serves; ``NO_LAYER`` where it serves several."""
    request: NDArray[np.int64] | None
    """[R] the request whose cache it is, by its number; None where requests share it."""
    offsets: NDArray[np.int64]  # [R + 1]
    ids: NDArray[np.int32]
    """[T] blocks as the cache numbers them, ascending and unique within a step."""
    width: int
    """Above every id."""
    ended: Sequence[int]
    """Rows of caches that had ended before these steps: a row among them starts anew."""


@dataclass(frozen=True, slots=True)
class OneCache:
    """A cache by itself; None for what it does not belong to alone."""

    request: int | str | None
    layer: int | None
    step: Curve
    sequential: Curve


class LruCurves:
    """Histograms of stack distances, by layer, and what each cache by itself would need."""

    def __init__(self, mode: LruMode, *, each: bool = False) -> None:
        """``mode`` is that of :meth:`needs`; curves are kept for both. ``each`` keeps those of every cache."""
        self.each: list[OneCache] | None = [] if each else None
        self.layers = LayerRows()
        self.caches = 0
        self._mode = mode
        self._stacks = LruStacks()
        self._layer = np.zeros(0, dtype=np.int64)  # by row of a live cache: its layer, or _FREE
        self._request: dict[int, int] = {}  # by row of a live cache, where each is kept
        self._step = Grid(count=np.int64)  # [L, distances]
        self._sequential = Grid(count=np.int64)
        self._cold: Counter[int] = Counter()  # first accesses by layer row
        self._sizes: Counter[int] = Counter()  # of steps' sets
        self._needs: Counter[tuple[float, int]] = Counter()  # caches by target and capacity (0: none reaches it)

    def add(self, steps: CacheSteps) -> None:
        """Take in the next steps."""
        for row in steps.ended:
            self._finish(row)
        top = int(steps.row.max()) + 1
        if len(self._layer) < top:
            self._layer = np.concatenate([self._layer, np.full(top - len(self._layer), _FREE)])
        self._layer[steps.row] = steps.layer
        if self.each is not None and steps.request is not None:
            self._request.update(zip(steps.row.tolist(), steps.request.tolist(), strict=True))
        self._stacks.access(steps.row, steps.offsets, steps.ids, steps.width)
        sizes, counts = np.unique(np.diff(steps.offsets), return_counts=True)
        self._sizes.update(dict(zip(sizes.tolist(), counts.tolist(), strict=True)))

    def end(self) -> None:
        """No step follows: add up what is still open."""
        for row in np.flatnonzero(self._layer != _FREE).tolist():
            self._finish(row)
        self._stacks = LruStacks()

    def merge(self, other: LruCurves) -> None:
        """Add the caches of ``other``; both have ended."""
        for layer, row in other.layers:
            self._collect(layer, other._step["count"][row], other._sequential["count"][row], other._cold[row])
        self.caches += other.caches
        self._sizes.update(other._sizes)
        self._needs.update(other._needs)
        if self.each is not None and other.each is not None:
            self.each += other.each

    def name_requests(self, id_of: Callable[[int], int | str]) -> None:
        """Put ids in place of the numbers of requests."""
        if self.each is not None:
            self.each = [
                one if one.request is None else replace(one, request=id_of(int(one.request))) for one in self.each
            ]

    def footprint(self) -> float:
        """Mean of the distinct blocks of a cache."""
        return self._cold.total() / self.caches if self.caches else 0.0

    def curve(self, mode: LruMode, layer: int | None = None) -> Curve:
        """Hits by capacity, of one layer or of all."""
        rows = self.layers.of(layer)
        histogram = (self._step if mode == "step" else self._sequential)["count"][rows].sum(axis=0)
        return Curve(histogram, sum(self._cold[row] for row in rows))

    def step_set(self) -> dict[str, Any]:
        """Blocks of a step: count of steps, nearest-rank percentiles, greatest."""
        count = sum(self._sizes.values())
        return {
            "count": count,
            "p50": _ranked(self._sizes, round((count - 1) * 0.5)) if count else None,
            "p95": _ranked(self._sizes, round((count - 1) * 0.95)) if count else None,
            "max": max(self._sizes, default=None),
        }

    def steps_above(self, blocks: int) -> float:
        """Share of steps whose set has more blocks."""
        return sum(n for size, n in self._sizes.items() if size > blocks) / max(sum(self._sizes.values()), 1)

    def needs(self) -> dict[str, Any]:
        """For each target, the capacity with which a cache by itself reaches it: how many do, and percentiles."""
        found = {}
        for target in TARGETS:
            reached = Counter({c: n for (t, c), n in self._needs.items() if t == target and c})
            count = sum(reached.values())
            found[str(target)] = {
                "caches": count,
                "p50": _ranked(reached, round((count - 1) * 0.5)) if count else None,
                "p95": _ranked(reached, round((count - 1) * 0.95)) if count else None,
                "max": max(reached, default=None),
            }
        return found

    def _finish(self, row: int) -> None:
        if row >= len(self._layer) or self._layer[row] == _FREE:
            return
        histogram, cold = self._stacks.take(row)
        self._collect(int(self._layer[row]), histogram[STEP], histogram[SEQUENTIAL], cold)
        if self.each is not None:
            layer = int(self._layer[row])
            curves = (Curve(np.trim_zeros(histogram[mode], "b"), cold) for mode in (STEP, SEQUENTIAL))
            self.each.append(OneCache(self._request.get(row), None if layer == NO_LAYER else layer, *curves))
        self._layer[row] = _FREE
        self.caches += 1
        curve = Curve(histogram[MODES[self._mode]], cold)
        self._needs.update((target, curve.capacity_for(target) or 0) for target in TARGETS)

    def _collect(self, layer: int, step: NDArray[np.int64], sequential: NDArray[np.int64], cold: int) -> None:
        row = self.layers.row(layer)
        self._cold[row] += cold
        for grid, counts in ((self._step, step), (self._sequential, sequential)):
            grid.reserve(len(self.layers), len(counts))
            grid["count"][row, : len(counts)] += counts


class Curve:
    """LRU hits as a function of the capacity.

    ``histogram`` [n] counts accesses by stack distance: a capacity of c hits those below c. ``cold`` are first
    accesses, which always miss.
    """

    def __init__(self, histogram: NDArray[np.int64], cold: int) -> None:
        self.cold = cold
        self._upto = np.cumsum(histogram)  # [n], hits of the capacity one above the index
        self.accesses = self.hits(len(self._upto)) + cold

    def hits(self, capacity: int) -> int:
        at = min(capacity, len(self._upto))
        return int(self._upto[at - 1]) if at else 0

    def hit_rate(self, capacity: int) -> float | None:
        """None without accesses."""
        return self.hits(capacity) / self.accesses if self.accesses else None

    def capacity_for(self, hit_rate: float) -> int | None:
        """The least capacity that reaches ``hit_rate``; None where none does."""
        return self.capacity_of(max(math.ceil(hit_rate * self.accesses), 1))

    def capacity_of(self, hits: int) -> int | None:
        """The least capacity with so many hits; None where none has them."""
        at = int(np.searchsorted(self._upto, hits))
        return at + 1 if at < len(self._upto) else None

    def knee(self) -> int | None:
        """The capacity after which more memory pays less than on average: where the curve lies furthest above the
        straight line from no cache to one that hits every reuse (Satopaa et al., "Finding a Kneedle in a Haystack",
        2011).
        """
        points = self._points()
        if not len(points):
            return None
        return int(points[np.argmax(self._upto[points - 1] / self._upto[-1] - points / points[-1])])

    def points(self) -> dict[str, list[int]]:
        """Every capacity at which hits grow, with the hits that it reaches."""
        points = self._points()
        return {"capacity_blocks": points.tolist(), "hits": self._upto[points - 1].tolist()}

    def _points(self) -> NDArray[np.int64]:
        return np.flatnonzero(np.diff(self._upto, prepend=0)) + 1


def _ranked(counts: Counter[int], rank: int) -> int:
    """The value at ``rank``, from 0, of the sorted values."""
    upto = 0
    for value in sorted(counts):
        upto += counts[value]
        if upto > rank:
            return value
    raise ValueError(f"rank {rank} of {upto} values")
