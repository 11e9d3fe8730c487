from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsakv.analysis.distribution import Distribution


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=20), max_size=6), st.integers(0, 6))
def test_parts_and_merges_give_the_moments_of_the_whole(parts: list[list[float]], cut: int) -> None:
    left, right = Distribution(), Distribution()
    for part in parts[:cut]:
        left.add(np.array(part))
    for part in parts[cut:]:
        right.add(np.array(part))
    left.merge(right)
    values = [value for part in parts for value in part]
    got = left.result()
    assert got["count"] == len(values)
    if not values:
        assert got == {"count": 0, "min": None, "max": None, "mean": None, "std": None}
        return
    assert (got["min"], got["max"]) == (min(values), max(values))
    assert got["mean"] == pytest.approx(statistics.fmean(values), rel=1e-9, abs=1e-6)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    assert got["std"] == pytest.approx(spread, rel=1e-9, abs=1e-6)


def test_a_small_spread_of_large_values_is_not_lost() -> None:
    distribution = Distribution()
    for start in range(0, 1000, 10):
        distribution.add(1e12 + np.arange(start, start + 10) % 2)
    assert distribution.result()["std"] == pytest.approx(statistics.stdev([0, 1] * 500), rel=1e-9)


def test_equal_values_have_no_spread_and_their_own_mean() -> None:
    distribution = Distribution()
    for _ in range(7):
        distribution.add(np.full(3, 0.1))
    assert distribution.result() == {
        "count": 21,
        "min": 0.1,
        "max": 0.1,
        "mean": 0.1,
        "std": pytest.approx(0, abs=1e-16),
    }
