"""An expert cache against its policy alone, on the same sets; experts that are abandoned, and such that fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsakv.errors import DsakvError
from dsakv.models.layers import GatedMLP
from dsakv.policies import POLICIES
from dsakv.weights.expert_cache import Expert, ExpertCache, supply
from dsakv.weights.slots import Load, Loader
from tests.weights.fake_loads import FakeLoader, FakeUnit, fake_slots, fake_unit


class Experts:
    """A cache of ``n`` experts, which checks what it gives."""

    def __init__(self, n: int, capacity: int, ahead: int, policy: str) -> None:
        self.bad: set[int] = set()
        self.loader = FakeLoader(lambda name: name in self.bad)
        self.units = [fake_unit("expert", i) for i in range(n)]
        self.log: list[tuple[int, bool]] = []
        self.capacity = capacity if capacity < n else n
        slots = n if capacity >= n else min(capacity + ahead + 1, n)
        # Modules are told apart by identity alone.
        self.modules = [cast(GatedMLP, object()) for _ in range(n)]
        experts = [Expert(module, unit, None) for module, unit in zip(self.modules, self.units, strict=True)]
        loader = cast(Loader, self.loader)
        self.cache = ExpertCache(experts, fake_slots(slots), self.capacity, policy, ahead, loader, self._used)

    def _used(self, load: Load, again: bool) -> None:
        self.loader.wait(load)
        assert isinstance(load.unit, FakeUnit)
        self.log.append((cast(int, load.unit.name), again))

    def take(self, numbers: list[int], leave: int | None = None) -> Iterator[GatedMLP]:
        """Compute with the first ``leave`` experts of a step; the reader, as it then is."""
        reader = self.cache.bring(numbers)
        for number in numbers[:leave]:
            assert next(reader) is self.modules[number]
            assert [unit.name for unit in self.units if unit.at] == [number]
            self.loader.check(self.units[number])
        if leave is None:
            assert next(reader, None) is None
            assert not any(unit.at for unit in self.units)
        return reader


def chosen(n: int) -> st.SearchStrategy[list[int]]:
    return st.sets(st.integers(0, n - 1)).map(sorted)


@st.composite
def caches(draw: st.DrawFn) -> tuple[int, int, int, str]:
    n = draw(st.integers(1, 8))
    return n, draw(st.integers(0, n)), draw(st.integers(0, 3)), draw(st.sampled_from(sorted(POLICIES)))


@settings(max_examples=200)
@given(shape=caches(), data=st.data())
@example(shape=(8, 3, 0, "sink_recent"), data=[[5, 6, 7], [0, 1, 2], [0, 3, 4], [1, 2, 6, 7]])
@example(shape=(6, 4, 0, "fifo"), data=[[0, 1, 2, 3], [2, 3, 4, 5], [0], [1], [2], [3], [4], [5], [0, 1, 2, 3, 4, 5]])
def test_hits_are_those_of_the_policy(shape: tuple[int, int, int, str], data: Any) -> None:
    n, capacity, _, policy = shape
    experts = Experts(*shape)
    plain = POLICIES[policy]().cache(capacity) if capacity else None
    for numbers in data if isinstance(data, list) else data.draw(st.lists(chosen(n), max_size=12)):
        experts.log.clear()
        begun = len(experts.loader.started)
        experts.take(numbers)
        expected = []
        for i in range(0, len(numbers), max(capacity, 1)):
            part = numbers[i : i + max(capacity, 1)]
            hits = plain.step(np.array(part))[0].tolist() if plain else [False] * len(part)
            expected += list(zip(part, hits, strict=True))
        if policy in ("fifo", "sink_recent"):  # they may give up what they hit: it is read again if room is needed
            assert all(hit or not again for (_, hit), (_, again) in zip(expected, experts.log, strict=True))
            assert set(experts.loader.started[begun:]) == {number for number, again in experts.log if not again}
        else:
            assert experts.log == expected
            assert experts.loader.started[begun:] == [number for number, hit in expected if not hit]


@settings(max_examples=200)
@given(shape=caches(), data=st.data())
def test_steps_that_are_left_or_fail_harm_none_that_follow(
    shape: tuple[int, int, int, str], data: st.DataObject
) -> None:
    n = shape[0]
    experts = Experts(*shape)
    held: list[Iterator[GatedMLP]] = []
    for _ in range(data.draw(st.integers(1, 8))):
        experts.bad = set(data.draw(chosen(n)))
        with suppress(DsakvError):
            reader = experts.take(data.draw(chosen(n)), data.draw(st.none() | st.integers(0, n)))
            if data.draw(st.booleans()):
                held.append(reader)  # as a traceback does
            del reader
        if data.draw(st.booleans()):
            held = []
    experts.bad = set()
    with suppress(DsakvError):  # of a read that a step began and did not wait for
        experts.take(list(range(n)))
    for number in range(n):  # what failed is read anew
        experts.take([number])
    experts.take(list(range(n)))


def test_an_old_reader_takes_nothing_from_a_new_one() -> None:
    experts = Experts(4, 0, 1, "lru")
    old = experts.take([0, 1, 2], 1)
    new = experts.cache.bring([0, 2, 3])
    assert next(new) is experts.modules[0]
    del old
    experts.loader.check(experts.units[0])
    assert [next(new), next(new)] == experts.modules[2:]
    experts.loader.check(experts.units[3])


def test_reading_begins_before_the_first_is_asked_for() -> None:
    experts = Experts(6, 0, 2, "lru")
    reader = experts.cache.bring([0, 2, 3, 5])
    assert experts.loader.started == [0, 2, 3]
    next(reader)
    assert experts.loader.started == [0, 2, 3]
    next(reader)
    assert experts.loader.started == [0, 2, 3, 5]


def test_a_layer_asks_for_its_own() -> None:
    experts = Experts(6, 2, 0, "lru")
    layer = supply(experts.cache, {4: 3, 5: 4, 7: 5})
    assert list(layer([4, 7])) == [experts.modules[3], experts.modules[5]]
    assert experts.log == [(3, False), (5, False)]


@pytest.mark.parametrize("capacity", [0, 2, 3])
def test_an_error_is_told_where_it_is(capacity: int) -> None:
    experts = Experts(5, capacity, 1, "lru")
    experts.bad = {2}
    reader = experts.cache.bring([0, 2, 4])
    assert next(reader) is experts.modules[0]
    with pytest.raises(DsakvError, match="disk fails"):
        next(reader)
    assert not any(unit.at for unit in experts.units)
    experts.bad = set()
    experts.take([2, 4])
    assert experts.loader.started.count(2) == 2
