"""A loader without files: it says at once when memory is overwritten that the model computes with."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsakv.errors import DsakvError
from dsakv.kv.marks import Mark, mark
from dsakv.weights.slots import Load, Slot
from dsakv.weights.units import Kind, Unit

CPU = torch.device("cpu")
PAGE = 4096


@dataclass(frozen=True)
class FakeUnit(Unit):
    """A unit of one page that knows where the model has its parameters, if it has them."""

    name: Hashable = None
    at: list[Tensor] = field(default_factory=list)

    def put(self, raw: Tensor, ready: Tensor) -> None:
        assert not self.at, f"{self.name} has its parameters already"
        self.at.append(raw)

    def take(self) -> None:
        self.at.clear()


def fake_unit(kind: Kind, name: Hashable) -> FakeUnit:
    return FakeUnit(kind, [], [], PAGE, 0, PAGE, name)


class FakeFiles:
    direct = True

    def busy_us(self) -> float:
        return 0.0


class FakeLoader:
    """Reads are done at once. What they read is kept by the memory that it was read to."""

    device = CPU

    def __init__(self, fails: Callable[[Hashable], bool] = lambda name: False) -> None:
        self.files = FakeFiles()
        self.fails = fails
        self.started: list[Any] = []
        """Names in the order in which they were asked for."""
        self.lies: dict[int, FakeUnit] = {}
        """By address."""
        self._failed: list[Load] = []
        self._told: set[int] = set()
        """Addresses that a device may be busy with: it was let to, and nobody said that it had been told all."""

    def start(self, unit: Unit, slot: Slot, host: Tensor | None) -> Load:
        assert isinstance(unit, FakeUnit)
        before = self.lies.get(slot.host.data_ptr())
        assert before is None or not before.at, f"{unit.name} overwrites {before.name}, which is in use"
        assert not unit.at
        assert slot.host.data_ptr() not in self._told, f"{unit.name} overwrites what was never freed"
        load = slot.load = Load(unit, slot, host)
        load.planned_bytes = load.disk_bytes = PAGE
        self.lies[slot.host.data_ptr()] = unit
        self.started.append(unit.name)
        if self.fails(unit.name):
            self._failed.append(load)
        return load

    def wait(self, load: Load) -> tuple[Mark, Mark]:
        if load in self._failed:
            raise DsakvError("the disk fails", "copy the files")
        self._told.add(load.slot.host.data_ptr())
        return mark(CPU), mark(CPU)

    def free(self, slot: Slot) -> None:
        unit = self.lies[slot.host.data_ptr()]
        assert not unit.at, "freed before the parameters were taken"
        self._told.discard(slot.host.data_ptr())

    def converted_us(self, since: Mark) -> float:
        return 0.0

    def check(self, unit: Unit) -> None:
        """Assert that the parameters of ``unit`` are in place, and its own."""
        assert isinstance(unit, FakeUnit)
        assert [self.lies[raw.data_ptr()] is unit for raw in unit.at] == [True], unit.name


def fake_slots(count: int) -> list[Slot]:
    return [Slot(torch.empty(PAGE, dtype=torch.uint8), None) for _ in range(count)]
