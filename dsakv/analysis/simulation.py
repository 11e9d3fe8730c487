"""Caches with other policies than LRU, at given capacities, and the bound that no policy exceeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dsakv.analysis.caches import CacheSteps
from dsakv.analysis.rows import LayerRows
from dsakv.errors import InputError
from dsakv.policies import POLICIES, Opt, Steps

OPT = "opt"
LRU = "lru"
"""Known from the curves for every capacity: never simulated here."""
BY_POSITION = "sink_recent"
"""Needs ids that are positions, which a cache that several streams share does not have."""
NAMES = (LRU, *(name for name in POLICIES if name != LRU), OPT)


def chosen(given: Sequence[str], scope: str) -> tuple[str, ...]:
    """The policies that the configuration names, in the order of ``NAMES``.

    Raises:
        InputError: there is no such policy, or not for caches of this scope.
    """
    if "none" in given:
        if len(given) > 1:
            raise InputError("--policies none goes with no other", "leave none out, or the others")
        return ()
    unknown = [name for name in given if name not in (*NAMES, "all")]
    if unknown:
        raise InputError(f"there is no policy {unknown[0]}", f"choose from {', '.join(NAMES)}, all, none")
    if scope != "stream" and BY_POSITION in given:
        raise InputError(
            f"{BY_POSITION} goes by positions, which requests and layers do not share",
            "leave it out, or use --cache-scope stream",
        )
    return tuple(
        name for name in NAMES if ("all" in given and (scope == "stream" or name != BY_POSITION)) or name in given
    )


class PolicyHits:
    """Hits of each policy at each of ``capacities``, by layer; a step takes its whole set at once."""

    def __init__(self, names: Sequence[str], capacities: tuple[int, ...]) -> None:
        self.capacities = capacities
        online = [name for name in names if name not in (LRU, OPT)]
        self._online = {name: [POLICIES[name]().caches(c) for c in capacities] for name in online}
        self._opt = Opt(capacities) if OPT in names else None
        self._layers = LayerRows()
        self._hits = {name: np.zeros((0, len(capacities)), dtype=np.int64) for name in names if name != LRU}  # [L, C]

    def add(self, steps: CacheSteps) -> None:
        """Take in the next steps."""
        if not self._hits or not self.capacities:
            return
        ended = np.array(steps.ended, dtype=np.int64)
        layer_row = self._layers.rows(steps.layer)
        prepared = Steps.of(steps.row, steps.offsets, steps.ids.astype(np.int64))
        for name, caches in self._online.items():
            for c, simulated in enumerate(caches):
                simulated.clear(ended)
                self._count(name, layer_row, c, simulated.step(prepared))
        if self._opt is not None:
            self._opt.clear(ended)
            hits = self._opt.step(prepared)
            for c in range(len(self.capacities)):
                self._count(OPT, layer_row, c, hits[:, c])

    def end(self) -> None:
        """No step follows."""
        self._online, self._opt = {}, None

    def merge(self, other: PolicyHits) -> None:
        """Add the hits of another part; both have ended."""
        for layer, theirs in other._layers:
            mine = self._layers.row(layer)
            for name in self._hits:
                self._grow(name)
                self._hits[name][mine] += other._hits[name][theirs]

    def hits(self, layer: int | None = None) -> dict[str, list[int]]:
        """Hits of each policy by capacity, of one layer or of all."""
        rows = self._layers.of(layer)
        return {name: hits[rows].sum(axis=0).tolist() for name, hits in self._hits.items()}

    def _count(self, name: str, layer_row: NDArray[np.int64], capacity: int, hits: NDArray[np.int64]) -> None:
        self._grow(name)
        np.add.at(self._hits[name][:, capacity], layer_row, hits)

    def _grow(self, name: str) -> None:
        missing = len(self._layers) - len(self._hits[name])
        if missing:
            self._hits[name] = np.pad(self._hits[name], ((0, missing), (0, 0)))
