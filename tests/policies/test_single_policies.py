"""What holds of one policy: its options, and the cases its paper is about."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsakv.policies.clock import Clock
from dsakv.policies.lfu import Lfu
from dsakv.policies.s3fifo import S3Fifo
from dsakv.policies.sieve import Sieve
from dsakv.policies.sink_recent import SinkRecent
from tests.policies.acts import Act, acts, assert_agree
from tests.policies.batches import sets
from tests.policies.oracle import S3FifoOracle, SinkRecentOracle


def run(cache_of: Clock | Lfu | S3Fifo | Sieve | SinkRecent, capacity: int, *ids: list[int]) -> list[list[int]]:
    """The victims of each step."""
    cache = cache_of.cache(capacity)
    return [cache.step(np.array(part, dtype=np.int64))[1].tolist() for part in ids]


@given(ids=sets(largest=25, steps=50), capacity=st.integers(1, 20), percent=st.sampled_from([0, 10, 40, 100]))
def test_s3fifo_with_any_share(ids: list[list[int]], capacity: int, percent: int) -> None:
    cache, oracle = S3Fifo(small_percent=percent).cache(capacity), S3FifoOracle(capacity, percent)
    for part in ids:
        hit, victims = cache.step(np.array(part, dtype=np.int64))
        expected, leaving = oracle.step(part)
        assert (hit.tolist(), sorted(victims.tolist())) == (expected, sorted(leaving))


@given(acts=acts(largest=25), capacity=st.integers(1, 12), percent=st.sampled_from([0, 10, 40, 100]))
def test_s3fifo_with_any_share_drops(acts: list[Act], capacity: int, percent: int) -> None:
    assert_agree(S3Fifo(small_percent=percent).cache(capacity), S3FifoOracle(capacity, percent), acts)


@given(acts=acts(), capacity=st.integers(1, 6), sinks=st.integers(0, 7))
def test_sink_recent_with_any_number_of_sinks_drops(acts: list[Act], capacity: int, sinks: int) -> None:
    assert_agree(SinkRecent(sinks=sinks).cache(capacity), SinkRecentOracle(capacity, sinks), acts)


@given(ids=sets(), capacity=st.integers(1, 13), sinks=st.integers(0, 13))
def test_sink_recent_with_any_number_of_sinks(ids: list[list[int]], capacity: int, sinks: int) -> None:
    cache, oracle = SinkRecent(sinks=sinks).cache(capacity), SinkRecentOracle(capacity, sinks)
    for part in ids:
        hit, victims = cache.step(np.array(part, dtype=np.int64))
        expected, leaving = oracle.step(part)
        assert (hit.tolist(), sorted(victims.tolist())) == (expected, sorted(leaving))


def test_sieve_leaves_survivors_in_place_and_clock_moves_on() -> None:
    """Block 0 is read again; the next round of SIEVE comes to the newcomers first, as in figure 1 of its paper."""
    ids = [[0], [1], [2], [0], [3], [4], [5]]
    assert run(Sieve(), 3, *ids) == [[], [], [], [], [1], [2], [3]]
    assert run(Clock(), 3, *ids) == [[], [], [], [], [1], [2], [0]]


@pytest.mark.parametrize(
    ("policy", "drop", "victims"),
    [
        (Sieve(), [2], [[], [3], [4]]),
        (Clock(), [2], [[], [0], [3]]),  # 3 has taken the place of 1, and 0 comes after 2
        (Sieve(), [2, 3], [[], [], [0]]),  # nothing newer is left: round again
        (Clock(), [0, 2], [[], [], [3]]),
    ],
)
def test_a_hand_whose_block_is_dropped_stands_at_the_next(
    policy: Clock | Sieve, drop: list[int], victims: list[list[int]]
) -> None:
    cache = policy.cache(3)
    before = [cache.step(np.array([block]))[1].tolist() for block in (0, 1, 2, 0, 3)]
    assert before == [[], [], [], [], [1]], "it has cleared 0 and stands at 2"
    cache.drop(np.array(drop))
    assert [cache.step(np.array([block]))[1].tolist() for block in (4, 5, 6)] == victims


def test_s3fifo_forgets_a_ghost_that_is_dropped() -> None:
    cache = S3Fifo().cache(3)
    assert [cache.step(np.array([block]))[1].tolist() for block in (0, 1, 2, 3)] == [[], [], [], [0]]
    cache.drop(np.array([0]))
    assert [cache.step(np.array([block]))[1].tolist() for block in (0, 4, 5, 6)] == [[1], [2], [3], [0]]


def test_lfu_lets_newcomers_in() -> None:
    assert run(Lfu(), 3, [0, 1, 2], [0, 1, 2], [3, 4]) == [[], [], [0, 1]]


def test_s3fifo_sends_one_hit_wonders_away_and_takes_ghosts_back() -> None:
    ids = [[0], [1], [2], [3], [1], [4], [5], [6]]
    assert run(S3Fifo(), 3, *ids) == [[], [], [], [0], [], [1], [2], [3]], "read once more is not enough"
    ids = [[0], [1], [2], [3], [0], [4], [5], [6]]
    assert run(S3Fifo(), 3, *ids) == [[], [], [], [0], [1], [2], [3], [4]], "0 came back to the main queue"


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="a small queue of 101%"):
        S3Fifo(small_percent=101)
    with pytest.raises(ValueError, match="-1 sinks"):
        SinkRecent(sinks=-1)
