"""The order in which units come, against a plain account of it; passes that are left early, and reads that fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from itertools import cycle, islice
from typing import Literal, NamedTuple, cast

from hypothesis import given
from hypothesis import strategies as st

from dsakv.errors import DsakvError
from dsakv.request import WeightTraffic
from dsakv.weights.arena import Arena
from dsakv.weights.placement import Residency, WeightsPlan
from dsakv.weights.slots import Loader
from dsakv.weights.streamer import Streamer
from dsakv.weights.units import Units
from tests.weights.fake_loads import PAGE, FakeLoader, FakeUnit, fake_slots, fake_unit


class Shape(NamedTuple):
    layers: int
    halves: bool
    tied: bool
    staying: frozenset[int]
    depth: int
    residency: Residency
    more: int
    """Slots beside those that reading ahead needs."""


class Left(Exception):  # noqa: N818
    """A pass is left."""


class Streamed:
    """A streamer of units that compute nothing. Each visit checks that it has its unit, and no other one."""

    def __init__(self, shape: Shape) -> None:
        order = [0]
        for i in range(shape.layers):
            order += [2 * i + 1, 2 * i + 2] if shape.halves else [i + 1, i + 1]
        order.append(0 if shape.tied else max(order) + 1)
        self.order, self.shape = order, shape
        self.bad: set[int] = set()
        self.loader = FakeLoader(lambda name: name in self.bad)
        self.fakes = [fake_unit("layer", i) for i in range(max(order) + 1)]
        self.units = Units(list(self.fakes), order, {})
        self.passing = len(self.fakes) - len(shape.staying)
        unit: Literal["layer", "sublayer"] = "sublayer" if shape.halves else "layer"
        plan = WeightsPlan(unit, shape.residency, shape.depth, [], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        self.head = True
        self.n_slots = min(shape.depth + 1 + shape.more, self.passing)
        self.streamer = Streamer(
            self.units, plan, cast(Loader, self.loader), fake_slots(self.n_slots), {}, shape.staying,
            Arena(0, pin=False),
        )  # fmt: skip

    def run(self, *, head: bool = True, leave: int | None = None) -> WeightTraffic:
        """A pass, that may not ask for the head, or be left within a visit."""
        self.head = head
        for number, unit in enumerate(self.order[: len(self.order) - (not head)]):
            with self._visit(number):
                assert [fake.name for fake in self.fakes if fake.at] == [unit] * (unit not in self.shape.staying)
                if unit not in self.shape.staying:
                    self.loader.check(self.fakes[unit])
                self._check_ahead(number)
                if number == leave:
                    raise Left
        return self.streamer.traffic()

    def _visit(self, number: int) -> AbstractContextManager[None]:
        if number in (0, len(self.order) - 1):
            return self.streamer.head() if number else self.streamer.embedding(head=self.head)
        layer, half = divmod(number - 1, 2)
        return self.streamer.feed_forward(layer) if half else self.streamer.attention(layer)

    def _check_ahead(self, number: int) -> None:
        """As many units as are to be read ahead are, the next ones, and no more."""
        visits = self.order[: len(self.order) - (not self.head)]
        following = visits[number + 1 :] + visits[:number]
        passing = dict.fromkeys(unit for unit in following if unit not in {self.order[number], *self.shape.staying})
        beside = self.shape.depth > 0 and self.order[number] in self.shape.staying  # whose own slot is free
        coming = list(passing)[: self.shape.depth + beside]
        lies = self.streamer._loads.values()
        assert {cast(FakeUnit, load.unit).name for load in lies} >= set(coming)
        if self.shape.residency != "lru":  # that keeps a head which no pass asked for, too
            assert {cast(FakeUnit, load.unit).name for load in lies if not load.used} <= set(coming)

    def reads(self) -> Iterator[int]:
        """What is read in passes that are never left, where nothing is kept."""
        before = -1
        for unit in cycle(self.order):
            if unit not in {before, *self.shape.staying}:
                yield unit
            before = unit


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    layers, halves, tied = draw(st.integers(1, 4)), draw(st.booleans()), draw(st.booleans())
    n_units = 1 + layers * (2 if halves else 1) + (not tied)
    residency: Residency = draw(st.sampled_from(["static", "lru", "none"]))
    staying = draw(st.sets(st.integers(0, n_units - 1))) if residency == "static" else set()
    more = draw(st.integers(0, 3)) if residency == "lru" else 0
    return Shape(layers, halves, tied, frozenset(staying), draw(st.integers(0, 3)), residency, more)


@given(shapes())
def test_units_are_read_in_the_order_of_the_pass_and_as_often_as_planned(shape: Shape) -> None:
    streamed = Streamed(shape)
    planned = len(streamed.fakes) - len(shape.staying)
    first, *later = [streamed.run() for _ in range(4)]
    again = int(shape.tied and 0 not in shape.staying)  # the head is still there for the embedding later on
    assert first.units == planned + again if shape.residency != "lru" else first.units <= planned + again
    for one in later:
        assert one.disk_bytes == one.planned_bytes == one.units * PAGE
        if shape.residency != "lru":
            assert one.units == planned
        else:
            assert one.units == 0 if streamed.n_slots == streamed.passing else one.units <= planned
    if shape.residency != "lru":
        started = streamed.loader.started
        assert started == list(islice(streamed.reads(), len(started)))


@given(shapes(), st.data())
def test_passes_that_are_left_or_fail_harm_none_that_follow(shape: Shape, data: st.DataObject) -> None:
    streamed = Streamed(shape)
    last = len(streamed.order) - 1
    for _ in range(data.draw(st.integers(1, 5))):
        streamed.bad = data.draw(st.sets(st.integers(0, len(streamed.fakes) - 1), max_size=2))
        head, leave = data.draw(st.booleans()), data.draw(st.none() | st.integers(0, last))
        with suppress(Left, DsakvError):
            streamed.run(head=head, leave=leave)
    streamed.bad = set()
    with suppress(DsakvError):  # of a read that was begun and not waited for
        streamed.run()
    streamed.streamer.traffic()
    planned = len(streamed.fakes) - len(shape.staying)
    streamed.run()  # what failed is read anew
    for _ in range(2):
        assert streamed.run().units == planned or shape.residency == "lru"


def test_a_pass_without_a_head_reads_on_with_the_next_pass() -> None:
    streamed = Streamed(Shape(3, False, False, frozenset(), 2, "none", 0))
    for _ in range(2):
        assert streamed.run(head=False).units == 4
    assert streamed.loader.started == [*range(4), *range(4), 0, 1]
