"""LRU stack distances against a list that is kept in order, and against the policy that evicts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dsakv.analysis.stack import SEQUENTIAL, STEP, LruStacks
from dsakv.policies import POLICIES, Steps

Step = tuple[int, list[int]]
"""Cache and its set."""


def steps_of(caches: int, ids: int) -> st.SearchStrategy[list[Step]]:
    chosen = st.sets(st.integers(0, ids - 1), max_size=12).map(sorted)
    return st.lists(st.tuples(st.integers(0, caches - 1), chosen), min_size=1, max_size=30)


def arrays(steps: list[Step]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    offsets = np.cumsum([0, *(len(chosen) for _, chosen in steps)])
    ids = np.array([block for _, chosen in steps for block in chosen], dtype=np.int32)
    return np.array([row for row, _ in steps]), offsets, ids


def access(stacks: LruStacks, steps: list[Step]) -> None:
    rows, offsets, ids = arrays(steps)
    stacks.access(rows, offsets, ids, int(ids.max(initial=0)) + 1)


def distances(steps: list[list[int]]) -> tuple[Counter[int], Counter[int], int]:
    stepwise: Counter[int] = Counter()
    sequential: Counter[int] = Counter()
    stack: list[int] = []
    cold = 0
    for chosen in steps:
        before = list(stack)
        for block in chosen:
            if block not in before:
                cold += 1
            else:
                stepwise[before.index(block)] += 1
                sequential[stack.index(block)] += 1
                stack.remove(block)
            stack.insert(0, block)
    return stepwise, sequential, cold


def counter(histogram: NDArray[np.int64]) -> Counter[int]:
    return Counter({int(d): int(histogram[d]) for d in np.flatnonzero(histogram)})


@settings(max_examples=200)
@given(st.integers(1, 3).flatmap(lambda caches: steps_of(caches, 40)), st.integers(1, 7))
def test_distances_are_places_in_a_list(steps: list[Step], batch: int) -> None:
    stacks = LruStacks()
    for begin in range(0, len(steps), batch):
        access(stacks, steps[begin : begin + batch])
    for row in range(3):
        histogram, cold = stacks.take(row)
        expected = distances([chosen for cache, chosen in steps if cache == row])
        assert (counter(histogram[STEP]), counter(histogram[SEQUENTIAL]), cold) == expected


@pytest.mark.parametrize(("ids", "steps", "most"), [(40, 400, 20), (1000, 1200, 20), (1400, 24, 1300)])
def test_slots_run_out_ids_grow_and_many_older_blocks_move(ids: int, steps: int, most: int) -> None:
    rng = np.random.default_rng(ids)
    made = []
    for t in range(steps):
        top = max(most, ids * (t + 1) // steps)
        made.append((0, sorted(rng.choice(top, int(rng.integers(0, most)), replace=False).tolist())))
    stacks = LruStacks()
    for begin in range(0, len(made), 9):
        access(stacks, made[begin : begin + 9])
    assert sum(len(chosen) for _, chosen in made) > 8 * ids  # more than there are slots
    histogram, cold = stacks.take(0)
    expected = distances([chosen for _, chosen in made])
    assert (counter(histogram[STEP]), counter(histogram[SEQUENTIAL]), cold) == expected


@settings(max_examples=60)
@given(steps_of(1, 25), st.integers(1, 30))
def test_a_curve_is_what_the_evicting_policy_hits_at_each_capacity(steps: list[Step], capacity: int) -> None:
    stacks = LruStacks()
    access(stacks, steps)
    histogram, _ = stacks.take(0)
    rows, offsets, ids = arrays(steps)
    hits = POLICIES["lru"]().caches(capacity).step(Steps.of(rows, offsets, ids.astype(np.int64)))
    assert histogram[STEP, :capacity].sum() == hits.sum()


def test_a_row_that_was_taken_starts_anew() -> None:
    stacks = LruStacks()
    for _ in range(2):
        access(stacks, [(0, [1, 2]), (1, [1]), (0, [2, 3])])
        histogram, cold = stacks.take(0)
        assert (counter(histogram[STEP]), cold) == (Counter({0: 1}), 3)
    histogram, cold = stacks.take(1)
    assert (counter(histogram[STEP]), cold) == (Counter({0: 1}), 1)
