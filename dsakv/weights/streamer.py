"""Weights that are brought in as the engine comes to them; see ``engine.weights.Weights``.

A pass visits the embedding, the two halves of each layer and the head. What stays in memory is there; the rest passes
through a few slots, the next units being read while one computes. The order never changes, so what comes next is known,
across the end of a pass too: the first units of the next one are read while the head computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from dsakv.kv.marks import Mark, mark
from dsakv.request import WeightTraffic
from dsakv.weights.arena import Arena
from dsakv.weights.placement import WeightsPlan
from dsakv.weights.slots import Load, Loader, Slot
from dsakv.weights.speed import disk_speed
from dsakv.weights.units import Units


class Streamer:
    """Weights of a model under a budget; close it after use."""

    streamed = True

    def __init__(
        self, units: Units, plan: WeightsPlan, loader: Loader, slots: Sequence[Slot], host: Mapping[int, Tensor],
        staying: frozenset[int], arena: Arena,
    ) -> None:  # fmt: skip
        """``host``: raw bytes of units that host memory holds for a device. Those of ``staying`` are in place."""
        self.plan = plan
        self._units, self._loader, self._host, self._staying, self._arena = units, loader, host, staying, arena
        self._free = list(slots)
        self._loads: dict[int, Load] = {}
        """By unit, the least recently used first: those in a slot, or on their way."""
        self._keeps = plan.residency == "lru"
        self._visits = len(units.order)
        """Of a pass, the head left out where nobody asks for it."""
        self._next = 0
        self._traffic = WeightTraffic()
        self._waits: list[tuple[Mark, Mark]] = []
        self._busy_before = 0.0
        self._begun = mark(loader.device)

    @property
    def direct(self) -> bool:
        """Whether all reads go past the page cache."""
        return self._loader.files.direct

    @contextmanager
    def embedding(self, *, head: bool) -> Iterator[None]:
        self._visits = len(self._units.order) - (not head)
        self._traffic, self._waits = WeightTraffic(), []  # of a pass that failed
        self._busy_before, self._begun = self._loader.files.busy_us(), mark(self._loader.device)
        with self._visit(0):
            yield

    @contextmanager
    def attention(self, layer_id: int) -> Iterator[None]:
        with self._visit(1 + 2 * layer_id):
            yield

    @contextmanager
    def feed_forward(self, layer_id: int) -> Iterator[None]:
        with self._visit(2 + 2 * layer_id):
            yield

    @contextmanager
    def head(self) -> Iterator[None]:
        with self._visit(len(self._units.order) - 1):
            yield

    def disk_speed(self) -> float:
        """Bytes a second that plain reads of the same files come at, measured now; 0 where nothing is read."""
        return disk_speed(self._loader.files) if self.plan.reads else 0.0

    def traffic(self) -> WeightTraffic:
        """What was read, converted and waited for since this was last asked: by one pass."""
        traffic, self._traffic = self._traffic, WeightTraffic()
        traffic.wait_us = sum(begin.us_until(end) for begin, end in self._waits)
        traffic.device_us = self._loader.converted_us(self._begun)
        traffic.disk_us = self._loader.files.busy_us() - self._busy_before
        self._waits = []
        return traffic

    def used(self, load: Load, again: bool) -> None:
        """Wait for a load that is computed with next, and count it where it is not here ``again``."""
        self._waits.append(self._loader.wait(load))
        expert = load.unit.kind == "expert"
        self._traffic.expert_hits += expert and again
        self._traffic.expert_misses += expert and not again
        if not again:
            self._traffic.units += 1
            self._traffic.ahead += load.ahead
            self._traffic.disk_reads += len(load.reads)
            self._traffic.disk_bytes += load.disk_bytes
            self._traffic.expert_bytes += expert * load.disk_bytes
            self._traffic.planned_bytes += load.planned_bytes
            self._traffic.device_bytes += load.unit.moved_bytes

    def close(self) -> None:
        """Stop reading, and let go of the memory."""
        self._loader.close()
        self._arena.close()

    @contextmanager
    def _visit(self, visit: int) -> Iterator[None]:
        unit = self._units.order[visit]
        if visit != self._next:
            self._forget(visit)
        self._next = (visit + 1) % self._visits
        passes = unit not in self._staying
        if passes:  # the most recently used now
            self._loads[unit] = self._loads.pop(unit) if unit in self._loads else self._start(unit)
        self._read_ahead(visit)  # before this unit is waited for: the disk never has nothing to do
        if passes:
            self._enter(self._loads[unit])
        try:
            yield
        finally:
            if passes and self._units.order[self._next] != unit:
                self._leave(unit)

    def _enter(self, load: Load) -> None:
        if not load.in_place:
            try:
                self.used(load, load.used)
            except BaseException:
                self._drop_unused()
                raise
            load.used = load.in_place = True
            load.put()

    def _leave(self, unit: int) -> None:
        self._take(self._loads[unit])
        if not self._keeps:
            self._free.append(self._loads.pop(unit).slot)

    def _take(self, load: Load) -> None:
        load.unit.take()
        load.in_place = False
        self._loader.free(load.slot)

    def _drop_unused(self) -> None:
        """A read failed, and others may have: whoever comes again has them read anew."""
        for unit in [unit for unit, load in self._loads.items() if not load.used]:
            self._free.append(self._loads.pop(unit).slot)

    def _read_ahead(self, visit: int) -> None:
        """Begin to read what comes next, as far as slots are free."""
        coming = self._coming(visit)
        for unit in coming:
            if unit not in self._loads:
                if not self._free and not self._evict({self._units.order[visit], *coming}):
                    return
                self._loads[unit] = self._start(unit)
                self._loads[unit].ahead = True

    def _coming(self, visit: int) -> list[int]:
        """The next units after a visit that do not stay, as many as are to be read ahead.

        One more beside a unit that stays: the slot of what is computed with is free meanwhile, and the disk would
        have nothing to do.
        """
        order, found = self._units.order, list[int]()
        ahead = self.plan.prefetch_depth
        if ahead and order[visit] in self._staying:
            ahead += 1
        for step in range(1, self._visits):
            unit = order[(visit + step) % self._visits]
            if len(found) == ahead:
                break
            if unit not in self._staying and unit != order[visit] and unit not in found:
                found.append(unit)
        return found

    def _start(self, unit: int) -> Load:
        if not self._free:
            self._evict({unit})
        return self._loader.start(self._units.units[unit], self._free.pop(), self._host.get(unit))

    def _evict(self, needed: set[int]) -> bool:
        """Free the slot of the unit that was not used for longest, those needed aside; whether there was one."""
        for unit, load in self._loads.items():
            if unit not in needed and not load.in_place:
                self._free.append(self._loads.pop(unit).slot)
                return True
        return False

    def _forget(self, visit: int) -> None:
        """A pass was left early: let go of what only its rest would have needed."""
        soon = {self._units.order[visit], *self._coming(visit)}
        for unit, load in list(self._loads.items()):
            if load.in_place and unit != self._units.order[visit]:
                self._take(load)
            if unit not in soon and not self._keeps:
                self._free.append(self._loads.pop(unit).slot)
