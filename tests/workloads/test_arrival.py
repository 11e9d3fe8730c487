"""Arrival processes: what they promise of rate and spread, order, and options that would do nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsakv.config import ServingConfig
from dsakv.errors import InputError
from dsakv.request import Request
from dsakv.workloads.arrival import arrange


def requests(*times: float | None) -> list[Request]:
    return [Request(i, [i], 1, source_id=f"row {i}", arrival_s=time) for i, time in enumerate(times)]


def arrivals(found: list[Request]) -> list[float]:
    assert [request.request_id for request in found] == list(range(len(found)))
    return [request.arrival_s for request in found if request.arrival_s is not None]


def order(found: list[Request]) -> list[int]:
    """Which of the requests given stands where, by the prompts of ``requests``."""
    return [request.prompt_token_ids[0] for request in found]


def process(arrival: Any, **options: Any) -> ServingConfig:
    return ServingConfig(arrival=arrival, **options)


@given(st.lists(st.integers(0, 5).map(float), max_size=12), st.sampled_from([0.25, 1.0, 3.0]))
def test_a_trace_keeps_its_times_scaled_and_in_order(times: list[float], scale: float) -> None:
    found = arrange(requests(*times), process("trace", time_scale=scale), 0)
    assert arrivals(found) == [time * scale for time in sorted(times)]
    assert order(found) == sorted(range(len(times)), key=lambda i: times[i])
    assert found == arrange(requests(*times), process("auto", time_scale=scale), 0)


def test_without_times_all_arrive_at_once() -> None:
    for arrival in ("auto", "all-at-once"):
        found = arrange(requests(None, None, None), process(arrival), 0)
        assert (arrivals(found), order(found)) == ([0.0] * 3, [0, 1, 2])
    assert arrivals(arrange(requests(3.0, 1.0), process("all-at-once"), 0)) == [0.0, 0.0]


@pytest.mark.parametrize("rate", [0.5, 40.0])
@pytest.mark.parametrize(
    ("config", "spread"),
    [
        ({"arrival": "constant"}, 0.0),
        ({"arrival": "poisson"}, 1.0),
        *(({"arrival": "gamma", "burstiness": shape}, shape**-0.5) for shape in (0.25, 1.0, 9.0)),
    ],
)
def test_gaps_have_the_rate_and_the_spread(config: dict[str, Any], spread: float, rate: float) -> None:
    """The spread of the mean of n gaps is ``spread / sqrt(n)``: the bounds are five of it."""
    n = 40000
    found = arrange(requests(*[None] * (n + 1)), process(request_rate=rate, **config), 5)
    times = np.array(arrivals(found))
    assert times[0] == 0
    assert order(found) == list(range(n + 1))
    gaps = np.diff(times) * rate
    assert abs(gaps.mean() - 1) <= 5 * spread / n**0.5 + 1e-9
    assert gaps.std() == pytest.approx(spread, rel=0.1, abs=1e-6)


def test_the_seed_decides() -> None:
    config = process("gamma", request_rate=2.0, burstiness=0.5)
    first, again, other = (arrange(requests(*[None] * 50), config, seed) for seed in (1, 1, 2))
    assert first == again
    assert arrivals(first) != arrivals(other)
    # a longer run begins as the shorter one does
    assert arrivals(arrange(requests(*[None] * 80), config, 1))[:50] == arrivals(first)


@pytest.mark.parametrize(
    ("times", "config", "message"),
    [
        ((1.0, None), process("auto"), "1 of 2 requests have no arrival time, the first of them row 1"),
        ((None,), process("trace"), "1 of 1 requests have no arrival time"),
        *(((None,), process(name), "needs a rate") for name in ("poisson", "gamma", "constant")),
        ((1.0,), process("auto", request_rate=2.0), r"--request-rate does nothing with --arrival auto \(trace"),
        ((None,), process("all-at-once", request_rate=2.0), "--request-rate does nothing with --arrival all-at-once"),
        ((None,), process("poisson", request_rate=2.0, burstiness=0.5), "--burstiness does nothing"),
        ((None,), process("auto", burstiness=0.5), "--burstiness does nothing"),
        ((None,), process("auto", time_scale=0.5), r"--time-scale does nothing with --arrival auto \(all-at-once"),
        ((1.0,), process("constant", request_rate=1.0, time_scale=0.5), "--time-scale does nothing"),
        ((1.0, float("nan")), process("trace"), "arrival time is negative"),
        ((-1.0,), process("trace"), "arrival time is negative"),
        ((None,) * 3, process("constant", request_rate=1e-320), "arrival time is negative"),
        ((None,) * 99, process("gamma", request_rate=1e-308, burstiness=1e-6), "arrival time is negative"),
    ],
)
def test_bad_options_and_times(times: tuple[float | None, ...], config: ServingConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        arrange(requests(*times), config, 0)
