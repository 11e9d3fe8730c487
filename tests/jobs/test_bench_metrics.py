"""The figures of a round against the plain definitions, computed step by step."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsakv.jobs.bench_log import RoundLog
from dsakv.jobs.bench_metrics import FORMULAS, distribution, links, overlap_efficiency, round_metrics
from dsakv.request import Request, Step, TierTraffic, WeightTraffic


class Tick(NamedTuple):
    """One step of a made-up run."""

    kind: Literal["prefill", "decode"]
    wall_us: int
    gap_us: int
    """Between the step before and this one."""
    tokens: tuple[int, ...]
    """Requests that get a token."""
    prompt_tokens: int = 0
    weights: WeightTraffic | None = None
    traffic: Any = None


def play(ticks: list[Tick], prompts: list[int], begin_s: float = 0.25) -> RoundLog:
    requests = [Request(i, [1] * n, 99) for i, n in enumerate(prompts)]
    log, now = RoundLog.begin(requests, begin_s), begin_s
    for index, tick in enumerate(ticks):
        now += (tick.gap_us + tick.wall_us) / 1e6
        log.add(
            Step(
                index=index,
                kind=tick.kind,
                wall_us=tick.wall_us,
                new_tokens=[(request, 7 + index) for request in tick.tokens],
                prompt_tokens=tick.prompt_tokens,
                finished=[],
                records=None,
                traffic=tick.traffic or {},
                weights=tick.weights,
            ),
            now,
        )
    log.flush()
    return log


def nearest(values: list[float], q: float) -> float:
    return sorted(values)[round((len(values) - 1) * q)]


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[Tick], list[int]]:
    """Prompts one after the other, then decode steps of any of the requests."""
    prompts = draw(st.lists(st.integers(1, 50), min_size=1, max_size=4))
    micros = st.integers(1, 10**6)
    ticks = [Tick("prefill", draw(micros), draw(micros), (i,), n) for i, n in enumerate(prompts)]
    chosen = draw(st.lists(st.sets(st.sampled_from(range(len(prompts))), min_size=1), max_size=6))
    ticks += [Tick("decode", draw(micros), draw(micros), tuple(sorted(some))) for some in chosen]
    return ticks, prompts


@given(runs())
def test_figures_are_what_their_formulas_say(run: tuple[list[Tick], list[int]]) -> None:
    ticks, prompts = run
    found = round_metrics(play(ticks, prompts))
    times: dict[int, list[float]] = {i: [] for i in range(len(prompts))}
    now = 0.0
    for tick in ticks:
        now += (tick.gap_us + tick.wall_us) / 1e3
        for request in tick.tokens:
            times[request].append(now)
    samples = {
        "ttft_ms": [own[0] for own in times.values()],
        "e2el_ms": [own[-1] for own in times.values()],
        "tpot_ms": [(own[-1] - own[0]) / (len(own) - 1) for own in times.values() if len(own) > 1],
        "itl_ms": [own[i + 1] - own[i] for own in times.values() for i in range(len(own) - 1)],
        "decode_step_ms": [tick.wall_us / 1e3 for tick in ticks if tick.kind == "decode"],
    }
    for name, values in samples.items():
        if values:
            assert found[name]["mean"] == pytest.approx(sum(values) / len(values)), name
            for key, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1.0)):
                assert found[name][key] == pytest.approx(nearest(values, q)), (name, key)
        else:
            assert set(found[name].values()) == {None}
    wall = {kind: sum(tick.wall_us for tick in ticks if tick.kind == kind) / 1e3 for kind in ("prefill", "decode")}
    new = sum(len(own) for own in times.values())
    assert (found["prefill_ms"], found["decode_ms"]) == pytest.approx((wall["prefill"], wall["decode"]))
    assert found["e2e_ms"] == pytest.approx(now)
    assert found["output_throughput"] == pytest.approx(new / now * 1e3)
    assert found["total_token_throughput"] == pytest.approx((new + sum(prompts)) / now * 1e3)
    decoded = new - len(prompts)
    assert found["throughput_tok_s"] == (pytest.approx(decoded / wall["decode"] * 1e3) if wall["decode"] else None)
    assert (found["requests"], found["prompt_tokens"], found["output_tokens"]) == (len(prompts), sum(prompts), new)
    # All gaps of a request together are the time from its first token to its last.
    gaps = sum(samples["e2el_ms"]) - sum(samples["ttft_ms"])
    assert math.isclose(sum(samples["itl_ms"]), gaps, abs_tol=1e-6)


def test_every_formula_is_of_a_figure_that_is_there() -> None:
    found = round_metrics(play([Tick("prefill", 5, 0, (0,), 3)], [3]))
    named = {*found, *found["links"]["prefill"], *found["links"]["prefill"]["disk"]}
    assert set(FORMULAS) <= named | {"bound_ms"}  # which takes the links' speeds


def weights(**counts: Any) -> WeightTraffic:
    return WeightTraffic(**counts)


def test_steps_of_one_walk_are_one_pass() -> None:
    """A streamed prefill comes as several steps, the last of which says what all of them moved."""
    moved = weights(disk_bytes=900, planned_bytes=900, disk_us=80.0, wait_us=30.0)
    ticks = [
        Tick("prefill", 40, 0, (), 512),
        Tick("prefill", 60, 0, (0,), 100, moved),
        Tick("decode", 50, 0, (0,), 0, weights(disk_bytes=900, planned_bytes=900, disk_us=45.0)),
    ]
    log = play(ticks, [612])
    assert [(one.kind, one.wall_us, one.tokens) for one in log.passes] == [("prefill", 100, 612), ("decode", 50, 1)]
    prefill = round_metrics(log)["links"]["prefill"]
    assert (prefill["passes"], prefill["wall_ms"], prefill["wait_ms"]) == (1, 0.1, 0.03)
    assert prefill["disk"] == {
        "bytes": 900,
        "busy_ms": 0.08,
        "mb_s": pytest.approx(11.25),
        "bytes_per_pass": 900,
        "busy_ms_per_pass": 0.08,
    }


def test_steps_that_say_nothing_are_passes_of_their_own() -> None:
    ticks = [Tick("prefill", 40, 0, (), 512), Tick("prefill", 60, 0, (0,), 100), Tick("decode", 5, 0, (0,))]
    assert [one.wall_us for one in play(ticks, [612]).passes] == [40, 60, 5]
    assert [one.wall_us for one in play(ticks[:2], [612]).passes] == [40, 60]
    found = links(play(ticks, [612]).passes)
    assert found["overlap_efficiency"] is None
    assert found["disk"]["mb_s"] is None


@pytest.mark.parametrize(
    ("disk_us", "device_us", "wait_us", "efficiency"),
    [
        (90.0, 10.0, 0.0, 1.0),  # everything is hidden behind computing
        (90.0, 10.0, 40.0, 0.9),  # the disk is what takes the time
        (30.0, 80.0, 70.0, 0.8),  # the device's link is
        (50.0, 10.0, 50.0, 0.5),  # nothing is hidden: first the one, then the other
    ],
)
def test_overlap_efficiency(disk_us: float, device_us: float, wait_us: float, efficiency: float) -> None:
    counts = weights(disk_us=disk_us, device_us=device_us, wait_us=wait_us)
    log = play([Tick("decode", 100, 3, (0,), 0, counts)] * 2, [1])
    assert overlap_efficiency(log.passes) == pytest.approx(efficiency)


def test_the_busiest_link_may_be_one_of_kv() -> None:
    traffic = {("decode", "remote_pool"): TierTraffic(hits=1, reads=1, bytes_read=10, read_us=70.0)}
    log = play([Tick("decode", 100, 0, (0,), 0, weights(disk_us=20.0, wait_us=60.0), traffic)], [1])
    assert overlap_efficiency(log.passes) == pytest.approx(0.7)


def test_what_tiers_and_experts_did() -> None:
    prompt = {("prefill", "local_pool"): TierTraffic(writes=1, write_ops=4, bytes_written=4000, write_us=8.0)}
    decode = {
        ("warm_up", "local_pool"): TierTraffic(reads=1, read_ops=1, bytes_read=1000, read_us=1.0),
        ("decode", "hbm"): TierTraffic(hits=3, reads=1, bytes_read=77, read_us=1.0),
        ("decode", "local_pool"): TierTraffic(hits=1, cold=1, reads=1, read_ops=1, bytes_read=1000, read_us=3.0),
    }
    counts = weights(device_bytes=600, device_us=2.0, expert_hits=6, expert_misses=2)
    found = round_metrics(
        play([Tick("prefill", 50, 0, (0,), 9, None, prompt), Tick("decode", 50, 0, (0,), 0, counts, decode)], [9])
    )
    assert found["kv_h2d"] == {"bytes": 2000, "mb_s": 500.0}
    assert found["kv_d2h"] == {"bytes": 4000, "mb_s": 500.0}
    assert found["weight_h2d"] == {"bytes": 600, "mb_s": 300.0}
    assert found["experts"] == {"hits": 6, "misses": 2, "hit_rate": 0.75}
    assert found["links"]["prefill"]["local_pool_write"]["bytes"] == 4000
    assert found["links"]["decode"]["local_pool_read"]["bytes_per_pass"] == 2000
    assert found["kv"]["found"] == {"hbm": 0.75, "local_pool": 0.25, "remote_pool": 0.0}
    assert (found["kv"]["hit_rate"], found["kv"]["hit_rate_without_cold"]) == (0.75, 1.0)
    assert found["kv"]["transfers"]["warm_up"]["local_pool"]["bytes_read"] == 1000


def test_nothing_to_measure_is_none() -> None:
    assert set(distribution([]).values()) == {None}
    found = round_metrics(play([Tick("prefill", 5, 0, (0,), 3)], [3]))
    assert found["throughput_tok_s"] is None
    assert found["experts"]["hit_rate"] is None
    assert set(found["kv"]["found"].values()) == {None}


def test_the_digest_tells_tokens_apart() -> None:
    first = play([Tick("prefill", 5, 0, (0,), 3), Tick("decode", 5, 0, (0,))], [3])
    slower = play([Tick("prefill", 50, 9, (0,), 3), Tick("decode", 5, 0, (0,))], [3])
    fewer = play([Tick("prefill", 5, 0, (0,), 3)], [3])
    assert first.digest() == slower.digest() != fewer.digest()
