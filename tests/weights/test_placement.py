"""What stays under a budget, against accounts of every byte and of every subset."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsakv.weights.placement import LEFT_OVER, Kept, Residency, Sizes, keep, least, usable

RESIDENCIES: list[Residency] = ["static", "lru", "none"]


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    """Of a unit of which something is converted, or nothing: raw bytes go once they are, and else stay."""
    raw, ready = draw(st.integers(1, 9)), draw(st.integers(0, 9))
    return Sizes(ready, raw + ready, raw) if ready > raw else Sizes(raw + ready, raw + ready, 0)


UNITS = st.lists(sizes(), min_size=1, max_size=7)


def read(units: list[Sizes], kept: Kept) -> int:
    """What a pass reads, where nothing else is kept."""
    return sum(unit.passes for i, unit in enumerate(units) if i not in kept.units)


def needs(units: list[Sizes], staying: frozenset[int], depth: int) -> int:
    """Bytes for this set to stay and the rest to pass."""
    passing = [unit.passes for i, unit in enumerate(units) if i not in staying]
    slots = min(depth + 1, len(passing))
    slot, way = max(passing, default=0), max((units[i].way for i in staying), default=0)
    return sum(units[i].stays for i in staying) + slots * slot + (way if way > slot else 0)


def subsets(n: int) -> list[frozenset[int]]:
    return [frozenset(chosen) for k in range(n + 1) for chosen in combinations(range(n), k)]


@given(UNITS, st.integers(0, 200), st.integers(0, 3), st.sampled_from(RESIDENCIES))
def test_no_byte_more_than_the_budget(units: list[Sizes], budget: int, depth: int, residency: Residency) -> None:
    kept = keep(units, budget, depth, residency)
    if kept is None:
        return
    passing = [unit.passes for i, unit in enumerate(units) if i not in kept.units]
    assert kept.n_bytes == sum(units[i].stays for i in kept.units) + kept.slots * kept.slot_bytes + kept.way <= budget
    assert kept.slot_bytes >= max(passing, default=0)
    fewest = min(depth + 1, len(passing))
    if residency == "lru":
        assert fewest <= kept.slots <= len(passing)
    else:
        assert kept.slots == fewest
    for i in kept.units:
        assert units[i].way <= max(kept.way, kept.slot_bytes if kept.slots else 0)
    assert kept.units == frozenset() or residency == "static"


@given(UNITS, st.integers(0, 3), st.sampled_from(RESIDENCIES))
def test_the_least_budget(units: list[Sizes], depth: int, residency: Residency) -> None:
    enough = least(units, depth, residency)
    everything = sum(unit.passes + unit.way for unit in units) * (depth + 2)
    for budget in range(everything):
        assert (keep(units, budget, depth, residency) is None) == (budget < enough)
    possible = {frozenset[int]()}
    if residency == "static":
        possible |= {frozenset(i for i, unit in enumerate(units) if unit.passes > one.passes) for one in units}
        possible |= {frozenset(range(len(units)))}
    assert enough == min(needs(units, staying, depth) for staying in possible)


@given(UNITS, st.integers(0, 200), st.integers(0, 3))
def test_what_stays_is_worth_it(units: list[Sizes], budget: int, depth: int) -> None:
    """Never more is read than where nothing stays, or than by a cache; and nothing where everything fits."""
    static = keep(units, budget, depth, "static")
    for residency in ("lru", "none"):
        other = keep(units, budget, depth, residency)
        if other is not None:
            assert static is not None
            assert read(units, static) <= (0 if other.slots == len(units) else read(units, other)), residency
    if needs(units, frozenset(range(len(units))), depth) <= budget:
        assert static is not None
        assert (static.slots, len(static.units)) == (0, len(units))


@given(sizes(), st.integers(1, 7), st.integers(0, 150), st.integers(0, 2))
def test_of_units_that_take_as_much_as_many_stay_as_fit(unit: Sizes, n: int, budget: int, depth: int) -> None:
    units = [unit] * n
    kept = keep(units, budget, depth, "static")
    fitting = [len(s) for s in subsets(len(units)) if needs(units, s, depth) <= budget]
    assert (len(kept.units) if kept else -1) == max(fitting, default=-1)


@pytest.mark.parametrize("n", [5, 32, 61, 80])
def test_what_stays_is_spread_evenly(n: int) -> None:
    units = [Sizes(10, 10, 0)] * n
    for held in range(1, n - 1):
        kept = keep(units, 10 * held + 10, 0, "static")
        assert kept is not None
        assert len(kept.units) == held
        places = sorted(kept.units)
        gaps = [b - a for a, b in zip(places, [*places[1:], places[0] + n], strict=True)]
        assert max(gaps) <= 4 * -(-n // held)


@settings(max_examples=50)
@given(st.integers(1, 1 << 40))
def test_a_part_of_a_host_budget_is_left_over(budget: int) -> None:
    assert budget - usable(budget) == min(budget // 8, LEFT_OVER)
