"""Results that cannot be right are rejected; medians, spread and drift."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsakv.jobs.bench_checks import Limits, bounds, physical_bound, rejections
from dsakv.jobs.bench_log import RoundLog
from dsakv.jobs.bench_summary import drift, leaves, medians, statistics, summarize
from dsakv.request import Step, TierTraffic, WeightTraffic


def logged(*steps: tuple[str, int, WeightTraffic | None], token_s: tuple[float, ...] | None = None) -> RoundLog:
    """A round of one request, which gets a token in each of these steps."""
    log, now = RoundLog(0.0, token_s={0: []}, tokens={0: []}), 0.0
    for index, (kind, wall_us, weights) in enumerate(steps):
        now += wall_us / 1e6
        at = now if token_s is None else token_s[index]
        log.add(Step(index, kind, wall_us, [(0, 1)], 8 * (kind == "prefill"), [], None, {}, weights), at)  # type: ignore[arg-type]
    log.flush()
    return log


def read(size: int, us: float, planned: int | None = None, **counts: Any) -> WeightTraffic:
    return WeightTraffic(disk_bytes=size, planned_bytes=size if planned is None else planned, disk_us=us, **counts)


def test_the_bound_is_the_slowest_link_s() -> None:
    assert physical_bound(10**9, 0, Limits()) is None
    assert physical_bound(10**9, 0, Limits(2e9)) == 500_000
    assert physical_bound(10**9, 10**9, Limits(2e9, 1e9)) == 1_000_000
    assert physical_bound(10**9, 0, Limits(1e9, ahead_bytes=250_000_000)) == 750_000
    assert physical_bound(10, 0, Limits(1e9, ahead_bytes=99)) == 0


def test_limits_are_those_of_the_plan() -> None:
    plan = {"residency": "static", "pass_disk_bytes": 900, "ahead_bytes": 600}
    assert Limits.of(1.0, None, plan) == Limits(1.0, None, 600, 900)
    assert Limits.of(1.0, None, plan | {"residency": "lru"}).pass_disk_bytes is None
    assert Limits.of(None, None, None) == Limits()


def test_a_pass_reads_what_every_pass_should() -> None:
    log = logged(("prefill", 1000, read(900, 990.0)), ("decode", 1000, read(800, 1000.0)))
    limits = Limits(pass_disk_bytes=800)
    assert "900 bytes were read, experts aside; a pass should read 800" in rejections(log, "round 0", 2, limits)[0]
    assert rejections(log, "round 0", 2, limits, first=True) == []
    experts = WeightTraffic(disk_bytes=900, planned_bytes=900, expert_bytes=100)
    assert rejections(logged(("decode", 1000, experts)), "round 1", 1, limits) == []


def test_what_is_read_ahead_is_spared_once_a_round() -> None:
    log = logged(*(("decode", 1000, read(900, 990.0)) for _ in range(4)))
    found = bounds([log.of("decode")] * 2, Limits(1e6, ahead_bytes=500))
    assert found["bound_ms"] == pytest.approx(2 * (4 * 900 - 500) / 1e3)
    late = logged(*(("decode", 650, read(900, 640.0)) for _ in range(4)))
    faults = rejections(late, "round 0", 4, Limits(1e6, ahead_bytes=500))
    assert faults == ["round 0: its passes take 2.600 ms, their bytes 3.100 ms at least"]


def test_a_sound_round_is_not_rejected() -> None:
    log = logged(("prefill", 1000, read(900, 990.0)), ("decode", 1000, read(900, 1000.0)), ("decode", 100, None))
    assert rejections(log, "round 0", 3, Limits(1e6)) == []
    assert bounds([log.of("decode")], Limits(1e6))["bound_ms"] == pytest.approx(0.9)
    assert set(bounds([log.of("decode")], Limits())) == {"bound_ms", "wall_ms", "wall_to_bound"}


@pytest.mark.parametrize(
    ("log", "limits", "said"),
    [
        (
            logged(("decode", 890, read(1000, 800.0))),
            Limits(1e6),
            "decode step 0: 0.890 ms is less than 90% of the 1.0",
        ),
        (logged(("prefill", 890, read(1000, 800.0))), Limits(1e6), "prefill pass 0: 0.890 ms is less than 90%"),
        (
            logged(("decode", 890, WeightTraffic(device_bytes=1000))),
            Limits(None, 1e6),
            "the 1.000 ms that its 1,000 bytes must take",
        ),
        (logged(("decode", 1000, read(1000, 9.0, 996))), Limits(), "1,000 bytes were read, the plan says 996"),
        (logged(("decode", 1000, read(1, 1100.0))), Limits(), "the disk took 1.100 ms of 1.000 ms"),
        (logged(("decode", 1000, WeightTraffic(device_us=1100.0))), Limits(), "the device's link took"),
        (logged(("decode", 1000, WeightTraffic(wait_us=1100.0))), Limits(), "waiting took 1.100 ms"),
        (logged(("decode", 1000, WeightTraffic(disk_us=-1.0))), Limits(), "less than nothing"),
        (logged(("decode", 1000, None), token_s=(-0.5,)), Limits(), "request 0 has a token before the one"),
        (logged(("decode", 1000, None), token_s=(0.0005,)), Limits(), "its passes take 1.000 ms, the round 0.500"),
        (logged(("decode", 1, None), ("decode", 1, None)), Limits(), "request 0 has 2 new tokens, not 1"),
    ],
)
def test_what_cannot_be_is_rejected(log: RoundLog, limits: Limits, said: str) -> None:
    faults = rejections(log, "round 3", 1, limits)
    assert all(fault.startswith("round 3") for fault in faults)
    assert said in "\n".join(faults)


def test_reads_of_kv_fit_into_their_step() -> None:
    log = RoundLog(0.0, token_s={0: []}, tokens={0: []})
    traffic = {("decode", "local_pool"): TierTraffic(reads=1, read_us=30.0)}
    log.add(Step(0, "decode", 20, [(0, 1)], 0, [], None, traffic), 0.1)  # type: ignore[arg-type]
    assert "reads from local_pool took 0.030 ms of 0.020 ms" in rejections(log, "round 0", 1, Limits())[0]


@given(st.integers(1, 10**9), st.integers(1, 10**7), st.floats(1e3, 1e12))
def test_only_what_beats_nine_tenths_of_its_bound_is_too_fast(size: int, wall_us: int, speed: float) -> None:
    faults = rejections(logged(("decode", wall_us, read(size, 0.0))), "round 0", 1, Limits(speed))
    must = 0.9 * size / speed * 1e6 - 2.0
    if abs(wall_us - must) > 1e-6 * must:
        assert bool(faults) == (wall_us < must)


def test_statistics_over_rounds() -> None:
    assert statistics([3.0, 1.0, None, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "spread": 1.0}
    assert statistics([5.0, None]) == {"median": 5.0, "min": 5.0, "max": 5.0, "spread": None}
    assert statistics([0, 0]) == {"median": 0, "min": 0, "max": 0, "spread": None}
    assert set(statistics([None]).values()) == {None}
    rounds = [{"a": 1, "b": {"c": x, "transfers": {}}, "output_digest": "x"} for x in (1.0, 4.0, 3.0)]
    found = summarize(rounds)
    assert found["b"] == {"c": {"median": 3.0, "min": 1.0, "max": 4.0, "spread": 1.0}}
    assert medians(found) == {"a": 1, "b": {"c": 3.0}}
    assert leaves(rounds[0]) == {"a": 1, "b.c": 1.0}


def rounds_of(e2e: list[float], prefill: list[float] | None = None) -> list[dict[str, Any]]:
    prefill = prefill or [1.0] * len(e2e)
    return [{"e2e_ms": a, "prefill_ms": b, "decode_step_ms": {"p50": None}} for a, b in zip(e2e, prefill, strict=True)]


@pytest.mark.parametrize(
    ("rounds", "disk", "flag"),
    [
        (rounds_of([10.0]), (), None),  # one round tells nothing
        (rounds_of([10.0]), (2e9, 1e9), True),
        (rounds_of([10.0]), (2e9, 2.1e9), False),
        (rounds_of([10.0, 10.9]), (), False),
        (rounds_of([10.0, 11.1]), (), True),
        (rounds_of([10.0, 8.9]), (), True),
        (rounds_of([10.0, 99.0, 10.0]), (), False),  # the middle one is in neither half
        (rounds_of([10.0, 10.0, 30.0, 10.0, 10.0, 10.0]), (), False),  # one slow round is no drift
        (rounds_of([10.0, 10.0], [1.0, 1.2]), (), True),
    ],
)
def test_drift(rounds: list[dict[str, Any]], disk: tuple[float, ...], flag: bool | None) -> None:
    found = drift(rounds, disk)
    assert found["flag"] is flag
    assert found["change"]["decode_step_ms"] is None
    assert "10%" in found["rule"]
