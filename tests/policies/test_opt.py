"""The bound, against trying everything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsakv.policies import Opt
from tests.policies.batches import batch, sets
from tests.policies.oracle import gap_hits, most_hits

CAPACITIES = (1, 2, 3, 5, 8)


@settings(max_examples=400)
@given(ids=sets(largest=5, steps=9))
def test_nothing_has_more_hits(ids: list[list[int]]) -> None:
    hits = Opt((1, 2, 3, 4)).step(batch(ids))
    for c, capacity in enumerate((1, 2, 3, 4)):
        assert np.cumsum(hits[:, c]).tolist() == most_hits(ids, capacity)


@given(ids=sets(largest=30, steps=60))
def test_hits_are_intervals_without_a_full_gap(ids: list[list[int]]) -> None:
    hits = Opt(CAPACITIES).step(batch(ids))
    for c, capacity in enumerate(CAPACITIES):
        assert hits[:, c].tolist() == gap_hits(ids, capacity)


def test_one_row_of_very_many_blocks() -> None:
    everything = list(range(300_000))
    hits = Opt((100, 299_999, 300_000)).step(batch([everything, [7], everything]))
    assert hits.tolist() == [[0, 0, 0], [1, 1, 1], [100, 299_999, 300_000]]


@given(ids=sets())
def test_more_room_is_never_worse(ids: list[list[int]]) -> None:
    totals = Opt(CAPACITIES).step(batch(ids)).sum(axis=0)
    assert (np.diff(totals) >= 0).all()


@given(ids=sets())
def test_room_for_everything_misses_first_touches_alone(ids: list[list[int]]) -> None:
    distinct = set().union(*ids)
    hits = Opt((max(1, len(distinct)), 2**31 - 1)).step(batch(ids)).sum(axis=0)
    assert hits.tolist() == [sum(map(len, ids)) - len(distinct)] * 2


@given(ids=sets(steps=60), data=st.data())
def test_rows_and_batches_know_nothing_of_each_other(ids: list[list[int]], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.sampled_from([0, 1, 6]), min_size=len(ids), max_size=len(ids)))
    cut = data.draw(st.integers(0, len(ids)))
    opt = Opt(CAPACITIES)
    hits = np.concatenate([opt.step(batch(ids[:cut], rows[:cut])), opt.step(batch(ids[cut:], rows[cut:]))])
    for row in set(rows):
        mine = [r for r, of in enumerate(rows) if of == row]
        alone = Opt(CAPACITIES).step(batch([ids[r] for r in mine]))
        assert hits[mine].tolist() == alone.tolist()


@given(before=sets(), ids=sets())
def test_a_cleared_row_is_a_fresh_one(before: list[list[int]], ids: list[list[int]]) -> None:
    opt = Opt(CAPACITIES)
    opt.step(batch(before * 2, [0] * len(before) + [2] * len(before)))
    opt.clear(np.array([0, 50]))
    assert opt.step(batch(ids)).tolist() == Opt(CAPACITIES).step(batch(ids)).tolist()


def test_memory_follows_the_steps_that_are_held() -> None:
    """Reading ever new blocks holds nothing, however long it goes on."""
    opt = Opt((4,))
    opt.step(batch([[block] for block in range(1000)]))
    assert opt.nbytes < 4 * 1024 + 100


def test_a_cache_holds_a_block_at_least() -> None:
    with pytest.raises(ValueError, match="a cache of 0 blocks"):
        Opt((4, 0))
