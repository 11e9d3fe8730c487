from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsakv.analysis.moments import Moments

VALUES = st.lists(st.floats(0, 1) | st.integers(0, 2**31 - 1).map(float), max_size=30)


def taken(values: list[float], layers: list[int] | None = None) -> Moments:
    moments = Moments(["x"])
    moments.add(np.array(layers or [0] * len(values), dtype=np.int64), np.array([values]))
    return moments


@given(VALUES)
def test_distribution_is_that_of_the_definitions(values: list[float]) -> None:
    found = taken(values).result()["x"]
    assert found["count"] == len(values)
    if not values:
        assert found == {"count": 0, "min": None, "max": None, "mean": None, "std": None}
        return
    assert (found["min"], found["max"]) == (min(values), max(values))
    assert found["mean"] == pytest.approx(statistics.fmean(values), rel=1e-12, abs=2e-10)
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    assert found["std"] == pytest.approx(std, rel=1e-9, abs=1e-9)


@given(st.lists(VALUES, max_size=5), st.data())
def test_any_split_and_order_gives_the_same_bits(parts: list[list[float]], data: st.DataObject) -> None:
    whole = taken([value for part in parts for value in part]).result()
    merged = Moments(["x"])
    for part in data.draw(st.permutations(parts)):
        merged.merge(taken(part[::-1]))
    assert merged.result() == whole


def test_the_spread_of_large_close_values_is_not_lost() -> None:
    assert taken([2.0**30 + x for x in (0.0, 0.5, 1.0)]).result()["x"]["std"] == 0.5


def test_sums_go_beyond_two_words() -> None:
    moments = taken([2.0**31 - 1] * 5000 + [0.0])
    for _ in range(12):
        moments.merge(moments)
    assert moments.result()["x"]["count"] == 5001 * 2**12
    assert moments.result()["x"]["mean"] == pytest.approx((2.0**31 - 1) * 5000 / 5001, rel=1e-15)


def test_layers_are_kept_apart_and_a_missing_value_counts_nowhere() -> None:
    moments = taken([1.0, float("nan"), 3.0, 5.0], [7, 7, 2, 7])
    assert [layer for layer, _ in moments.layers] == [2, 7]
    assert moments.result(7)["x"]["mean"] == 3.0
    assert moments.result(2)["x"] == {"count": 1, "min": 3.0, "max": 3.0, "mean": 3.0, "std": 0.0}
    assert moments.result()["x"]["count"] == 3
