"""Routed experts that are read when tokens are sent to them, and kept as an eviction policy says."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dsakv.models.layers import GatedMLP
from dsakv.models.moe import Experts
from dsakv.policies import POLICIES
from dsakv.policies.base import Cache
from dsakv.weights.slots import Load, Loader, Slot
from dsakv.weights.units import Unit


class Expert(NamedTuple):
    """An expert of a layer: its module, whose parameters come and go, and where they are read from."""

    module: GatedMLP
    unit: Unit
    host: Tensor | None
    """Raw bytes, where host memory holds them for a device."""


class _Coming(NamedTuple):
    """An expert that is in a slot, or on its way into one."""

    number: int
    load: Load


class ExpertCache:
    """Experts of all layers in slots of one size. They go by number, layer by layer.

    A step's experts are offered to the policy as a set, or where that is larger than the cache in sets of its size.
    Up to ``ahead`` experts beside the cached ones are in slots: those that the policy does not keep are used and go.
    """

    def __init__(
        self, experts: Sequence[Expert], slots: Sequence[Slot], capacity: int, policy: str, ahead: int, loader: Loader,
        used: Callable[[Load, bool], None],
    ) -> None:  # fmt: skip
        """``capacity``: experts that are kept, of the slots all but ``ahead + 1`` unless all experts have one; 0 keeps
        none. ``used`` is told of every load before it is computed with, and whether it was there already.
        """
        self._experts, self._capacity, self._ahead = experts, capacity, ahead
        self._loader, self._used = loader, used
        self._cache: Cache | None = POLICIES[policy]().cache(capacity) if capacity else None
        self._free = list(slots)
        self._held: dict[int, Load] = {}
        """By number: those that the policy keeps."""
        self._passing: dict[int, Load] = {}
        """Those that it does not, until they are used."""

    def bring(self, numbers: Sequence[int]) -> Iterator[GatedMLP]:
        """Those experts, ascending, each ready until the next one is asked for. Reading begins at once."""
        for number in list(self._passing):  # of a step that did not come to its end
            self._let_go(number)
        waiting, coming = deque(numbers), deque[_Coming]()
        self._fill(waiting, coming)
        return self._each(waiting, coming)

    def _each(self, waiting: deque[int], coming: deque[_Coming]) -> Iterator[GatedMLP]:
        while coming:
            number, load = coming.popleft()
            expert = self._experts[number]
            self._used(load, load.used)
            load.used = True
            load.put()
            try:
                yield expert.module
            finally:
                expert.unit.take()
                self._loader.free(load.slot)
                if number in self._passing:
                    self._let_go(number)
            self._fill(waiting, coming)

    def _fill(self, waiting: deque[int], coming: deque[_Coming]) -> None:
        """Offer the next experts to the policy, and begin to read those that are missing."""
        while waiting and len(coming) <= self._ahead:
            taken = [waiting.popleft() for _ in range(min(max(self._capacity, 1), len(waiting)))]
            hits, victims = [False] * len(taken), taken
            if self._cache is not None:
                found, gone = self._cache.step(np.array(taken, dtype=np.int64))
                hits, victims = found.tolist(), gone.tolist()
            needed = {one.number for one in coming} | set(taken)
            for number in victims:
                if number in self._held:
                    self._passing[number] = self._held.pop(number)
                    if number not in needed:
                        self._let_go(number)
            leaving = set(victims)
            for number, hit in zip(taken, hits, strict=True):
                if hit:
                    load = self._held.get(number) or self._passing[number]
                else:
                    expert = self._experts[number]
                    load = self._loader.start(expert.unit, self._free.pop(), expert.host)
                    (self._passing if number in leaving else self._held)[number] = load
                coming.append(_Coming(number, load))

    def _let_go(self, number: int) -> None:
        self._free.append(self._passing.pop(number).slot)


def supply(cache: ExpertCache, numbers: Mapping[int, int]) -> Experts:
    """The experts of a layer, of which number ``i`` is ``numbers[i]`` in ``cache``."""

    def bring(chosen: list[int]) -> Iterator[GatedMLP]:
        return cache.bring([numbers[i] for i in chosen])

    return bring
