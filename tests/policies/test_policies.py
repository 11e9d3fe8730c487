"""What holds of every policy, whoever adds it."""

from __future__ import annotations

from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsakv.policies import POLICIES, Opt, Policy, Steps
from tests.policies.acts import Act, acts, assert_agree
from tests.policies.batches import batch, sets
from tests.policies.oracle import ORACLES

capacities = st.integers(1, 13)
every_policy = pytest.mark.parametrize("name", POLICIES)


def hits_of(policy: Policy, capacity: int, ids: list[list[int]]) -> list[int]:
    hits: list[int] = policy.caches(capacity).step(batch(ids)).tolist()
    return hits


def test_every_policy_has_an_oracle() -> None:
    assert ORACLES.keys() == POLICIES.keys()


@every_policy
@given(ids=sets(), capacity=capacities)
def test_it_decides_as_its_oracle(name: str, ids: list[list[int]], capacity: int) -> None:
    cache, oracle = POLICIES[name]().cache(capacity), ORACLES[name](capacity)
    for part in ids:
        hit, victims = cache.step(np.array(part, dtype=np.int64))
        expected, leaving = oracle.step(part)
        assert (hit.tolist(), sorted(victims.tolist())) == (expected, sorted(leaving))


@every_policy
@pytest.mark.parametrize("capacity", [1, 2, 3, 4, 5, 6])
def test_it_still_drops_as_its_oracle_after_a_long_life(name: str, capacity: int) -> None:
    """Queues have gone round, holes have gathered, ghosts are many: what short histories seldom come to."""
    draw = np.random.default_rng(capacity)
    history = [
        Act(0, draw.random() < 0.1, sorted({int(block) for block in draw.integers(0, 12, draw.integers(1, 4))}))
        for _ in range(1500)
    ]
    assert_agree(POLICIES[name]().cache(capacity), ORACLES[name](capacity), history)


@every_policy
@given(acts=acts(), capacity=st.integers(1, 6))
def test_it_drops_as_its_oracle(name: str, acts: list[Act], capacity: int) -> None:
    assert_agree(POLICIES[name]().cache(capacity), ORACLES[name](capacity), acts)


@every_policy
@given(acts=acts(0, 1, 5), capacity=st.integers(1, 6))
def test_rows_drop_apart(name: str, acts: list[Act], capacity: int) -> None:
    caches = POLICIES[name]().caches(capacity)
    alone = {row: POLICIES[name]().cache(capacity) for row in (0, 1, 5)}
    for row, drop, ids in acts:
        array = np.array(ids, dtype=np.int64)
        if drop:
            caches.drop(row, array)
            alone[row].drop(array)
        else:
            assert caches.step(batch([ids], [row])).tolist() == [alone[row].step(array)[0].sum()]


@every_policy
@given(before=acts(), ids=sets(largest=20), capacity=st.integers(1, 6))
def test_with_everything_dropped_it_is_a_fresh_one(
    name: str, before: list[Act], ids: list[list[int]], capacity: int
) -> None:
    cache, fresh = POLICIES[name]().cache(capacity), POLICIES[name]().cache(capacity)
    for act in before:
        if act.drop:
            cache.drop(act.array)
        else:
            cache.step(act.array)
    cache.drop(np.arange(12))
    for part in ids:
        (hit, victims), (expected, leaving) = (c.step(np.array(part, dtype=np.int64)) for c in (cache, fresh))
        assert (hit.tolist(), sorted(victims.tolist())) == (expected.tolist(), sorted(leaving.tolist()))


@every_policy
def test_what_was_never_seen_may_be_dropped(name: str) -> None:
    caches = POLICIES[name]().caches(4)
    caches.drop(0, np.array([0, 99]))
    assert caches.nbytes == 0
    caches.step(batch([[0, 1]]))
    before = caches.nbytes
    caches.drop(0, np.array([1, 99]))
    caches.drop(99, np.array([0]))
    assert caches.nbytes == before, "nor does it take room"
    assert caches.step(batch([[0], [1]])).tolist() == [1, 0]


@every_policy
@pytest.mark.parametrize(("row", "ids"), [(0, [-1]), (0, [1, 1]), (0, [2, 1]), (-1, [1])])
def test_wrong_drops_are_refused(name: str, row: int, ids: list[int]) -> None:
    caches = POLICIES[name]().caches(4)
    caches.step(batch([[0, 1, 2]]))
    with pytest.raises(ValueError, match="must not be negative, and ids must ascend"):
        caches.drop(row, np.array(ids))
    assert caches.step(batch([[0, 1, 2]])).tolist() == [3]


@every_policy
@given(ids=sets(), capacity=capacities)
def test_content_is_old_and_set_without_victims(name: str, ids: list[list[int]], capacity: int) -> None:
    cache = POLICIES[name]().cache(capacity)
    content: set[int] = set()
    for part in ids:
        hit, gone = cache.step(np.array(part, dtype=np.int64))
        victims = gone.tolist()
        assert hit.tolist() == [block in content for block in part]
        content |= set(part)
        assert len(set(victims)) == len(victims) == max(0, len(content) - capacity), "it evicts what it must, no more"
        assert content.issuperset(victims)
        content -= set(victims)


@every_policy
@given(ids=sets())
def test_a_cache_for_everything_misses_first_touches_alone(name: str, ids: list[list[int]]) -> None:
    distinct = set().union(*ids)
    hits = sum(hits_of(POLICIES[name](), max(1, len(distinct)), ids))
    assert hits == sum(map(len, ids)) - len(distinct)
    assert hits == sum(hits_of(POLICIES[name](), 2**31 - 1, ids))


@every_policy
@given(ids=sets(), capacity=capacities, data=st.data())
def test_batches_may_be_cut_anywhere(name: str, ids: list[list[int]], capacity: int, data: st.DataObject) -> None:
    policy = POLICIES[name]()
    cache, one_by_one = policy.caches(capacity), policy.cache(capacity)
    whole = hits_of(policy, capacity, ids)
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4))), len(ids)]
    cut = [cache.step(batch(ids[a:b])).tolist() for a, b in pairwise(cuts)]
    assert list(chain(*cut)) == whole
    assert [int(one_by_one.step(np.array(part, dtype=np.int64))[0].sum()) for part in ids] == whole


@every_policy
@given(ids=sets(steps=60), capacity=capacities, data=st.data())
def test_rows_know_nothing_of_each_other(name: str, ids: list[list[int]], capacity: int, data: st.DataObject) -> None:
    policy = POLICIES[name]()
    rows = data.draw(st.lists(st.sampled_from([0, 1, 2, 7]), min_size=len(ids), max_size=len(ids)))
    hits = policy.caches(capacity).step(batch(ids, rows)).tolist()
    for row in set(rows):
        mine = [r for r, of in enumerate(rows) if of == row]
        assert [hits[r] for r in mine] == hits_of(policy, capacity, [ids[r] for r in mine])


@every_policy
@given(before=sets(), ids=sets(), capacity=capacities)
def test_a_cleared_row_is_a_fresh_one(name: str, before: list[list[int]], ids: list[list[int]], capacity: int) -> None:
    caches = POLICIES[name]().caches(capacity)
    caches.step(batch(before * 2, [0] * len(before) + [3] * len(before)))
    kept = caches.step(batch(before, [3] * len(before))).tolist()
    caches.clear(np.array([0, 99]))
    assert caches.step(batch(ids)).tolist() == hits_of(POLICIES[name](), capacity, ids)
    assert kept == hits_of(POLICIES[name](), capacity, before * 2)[len(before) :], "the other row is left alone"

    cache = POLICIES[name]().cache(capacity)
    for part in before:
        cache.step(np.array(part, dtype=np.int64))
    cache.clear()
    assert [cache.step(np.array(part, dtype=np.int64))[0].sum() for part in ids] == hits_of(
        POLICIES[name](), capacity, ids
    )


@every_policy
@given(ids=sets(), capacity=capacities, data=st.data())
def test_only_the_order_of_ids_matters(name: str, ids: list[list[int]], capacity: int, data: st.DataObject) -> None:
    sinks = 1  # these ids mean something to sink_recent
    names = sorted(data.draw(st.sets(st.integers(sinks, 300), min_size=11, max_size=11)))
    label = [*range(sinks), *names]
    renamed = [[label[block] for block in part] for part in ids]
    assert hits_of(POLICIES[name](), capacity, renamed) == hits_of(POLICIES[name](), capacity, ids)


@every_policy
@given(ids=sets(), capacity=capacities)
def test_no_policy_beats_opt(name: str, ids: list[list[int]], capacity: int) -> None:
    bound = np.cumsum(Opt((capacity,)).step(batch(ids))[:, 0])
    assert (np.cumsum(hits_of(POLICIES[name](), capacity, ids)) <= bound).all()


@every_policy
def test_options_are_frozen_and_compare(name: str) -> None:
    assert POLICIES[name]() == POLICIES[name]()
    with pytest.raises(AttributeError):
        POLICIES[name]().anything = 1  # type: ignore[attr-defined]


@every_policy
def test_memory_stays_small(name: str) -> None:
    caches = POLICIES[name]().caches(256)
    assert caches.step(batch([[8191]], [1023])).tolist() == [0]
    assert caches.nbytes <= 1024 * (4 * 8192 + 3 * 4 * 256 + 64)


@every_policy
def test_a_cache_holds_a_block_at_least(name: str) -> None:
    with pytest.raises(ValueError, match="a cache of 0 blocks"):
        POLICIES[name]().caches(0)


@pytest.mark.parametrize(
    ("rows", "offsets", "ids"),
    [
        ([0], [0, 2], [1, 1]),
        ([0], [0, 2], [2, 1]),
        ([0], [0, 1], [-1]),
        ([-1], [0, 1], [1]),
        ([0, 0], [0, 2, 1], [1]),
        ([0, 0, 0], [0, 2, 1, 3], [0, 1, 2]),
        ([0], [0, 2], [1]),
        ([0], [1, 1], [1]),
        ([0], [0], []),
    ],
)
def test_wrong_records_are_refused(rows: list[int], offsets: list[int], ids: list[int]) -> None:
    with pytest.raises(ValueError, match=r"offsets must|record \d"):
        Steps.of(*(np.array(values, dtype=np.int64) for values in (rows, offsets, ids)))
