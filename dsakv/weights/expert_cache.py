"""Routed experts that are read when tokens are sent to them, and kept as an eviction policy says."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
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
        self._kept: set[int] = set()
        """Numbers that the policy keeps. An error may have left them without a load, which they then get again."""
        self._free = list(slots)
        self._loads: dict[int, Load] = {}
        """By number: those in a slot, or on their way into one. Those that are not kept go when they are used."""
        self._going: Generator[GatedMLP, None, None] | None = None

    def bring(self, numbers: Sequence[int]) -> Iterator[GatedMLP]:
        """Those experts, ascending, each ready until the next one is asked for. Reading begins at once.

        A step before that did not come to its end ends here.
        """
        if self._going is not None:
            self._going.close()
        for number in self._loads.keys() - self._kept:
            self._let_go(number)
        waiting, coming = deque(numbers), deque[int]()
        self._fill(waiting, coming)
        self._going = self._each(waiting, coming)
        return self._going

    def _each(self, waiting: deque[int], coming: deque[int]) -> Generator[GatedMLP, None, None]:
        while coming:
            number = coming.popleft()
            expert, load = self._experts[number], self._loads[number]
            try:
                self._used(load, load.used)
            except BaseException:
                for unused in [other for other, one in self._loads.items() if not one.used]:
                    self._let_go(unused)  # they may have failed as well
                raise
            load.used = True
            load.put()
            try:
                yield expert.module
            finally:
                expert.unit.take()
                self._loader.free(load.slot)
                if number not in self._kept:
                    self._let_go(number)
            self._fill(waiting, coming)

    def _fill(self, waiting: deque[int], coming: deque[int]) -> None:
        """Offer the next experts to the policy, and begin to read those that are missing, in their order.

        Policies that pin nothing may give up what is about to be used: what they keep in its place waits for a slot.
        Where the next one has none, the last of those that they gave up is let go, and will be read again.
        """
        while waiting and len(coming) <= self._ahead:
            taken = [waiting.popleft() for _ in range(min(max(self._capacity, 1), len(waiting)))]
            coming.extend(taken)
            if self._cache is not None:
                gone = set(self._cache.step(np.array(taken, dtype=np.int64))[1].tolist())
                self._kept = (self._kept | set(taken)) - gone
                for number in (gone & self._loads.keys()) - set(coming):
                    self._let_go(number)
        for number in coming:
            if number not in self._loads:
                if not self._free:
                    if number != coming[0]:
                        break
                    self._let_go(next(n for n in reversed(coming) if n in self._loads and n not in self._kept))
                expert = self._experts[number]
                self._loads[number] = self._loader.start(expert.unit, self._free.pop(), expert.host)

    def _let_go(self, number: int) -> None:
        self._free.append(self._loads.pop(number).slot)


def supply(cache: ExpertCache, numbers: Mapping[int, int]) -> Experts:
    """The experts of a layer, of which number ``i`` is ``numbers[i]`` in ``cache``."""

    def bring(chosen: list[int]) -> Iterator[GatedMLP]:
        return cache.bring([numbers[i] for i in chosen])

    return bring
