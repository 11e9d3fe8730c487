"""Reads and drops, mixed, and a cache that must take them as its oracle does."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from dsakv.policies import Cache
from tests.policies.oracle import Oracle


class Act(NamedTuple):
    """What happens to the cache ``row``: it reads ``ids``, or they are dropped."""

    row: int
    drop: bool
    ids: list[int]

    @property
    def array(self) -> NDArray[np.int64]:
        return np.array(self.ids, dtype=np.int64)


def acts(*rows: int, largest: int = 11) -> st.SearchStrategy[list[Act]]:
    """Reads and drops of these caches, mixed; most are small, so that they meet queues in every state."""
    row, block = st.sampled_from(rows or (0,)), st.integers(0, largest)
    few, some = (st.sets(block, max_size=size).map(sorted) for size in (2, 8))
    read = st.builds(Act, row, st.just(False), few | some)
    drop = st.builds(Act, row, st.just(True), few | few | some | st.just([*range(largest + 1)]))
    act = read | read | read | drop
    return st.lists(act, max_size=8) | st.lists(act, min_size=20, max_size=60)  # left to itself it draws five or so


def assert_agree(cache: Cache, oracle: Oracle, acts: list[Act]) -> None:
    """Hits, victims and, in the end, what they hold."""
    for act in acts:
        if act.drop:
            cache.drop(act.array)
            for block in act.ids:
                oracle.drop(block)
        else:
            hit, victims = cache.step(act.array)
            expected, leaving = oracle.step(act.ids)
            assert (hit.tolist(), sorted(victims.tolist())) == (expected, sorted(leaving))
    known = np.arange(1 + max((block for act in acts for block in act.ids), default=0))
    assert np.flatnonzero(cache.step(known)[0]).tolist() == sorted(oracle.content())
