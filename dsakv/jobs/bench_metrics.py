"""The figures of one round of `dsakv bench`, in the names of vLLM's benchmark and with the formulas behind them.

A figure without anything to compute it from is None, never 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from dsakv.jobs.bench_log import POOLS, Pass, RoundLog
from dsakv.request import TIERS, TierTraffic, WeightTraffic
from dsakv.trace.tiers import Traffic, decode_hit_rates

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
FORMULAS = {
    "ttft_ms": "time of the first new token - begin of the round, for each request",
    "tpot_ms": "(e2el_ms - ttft_ms) / (n - 1) for each request of n new tokens",
    "itl_ms": "time from each new token of a request to its next one, every gap by itself",
    "e2el_ms": "time of the last new token - begin of the round, for each request",
    "prefill_ms": "sum of the wall times of the passes over prompt tokens",
    "decode_ms": "sum of the wall times of the decode steps",
    "decode_step_ms": "wall time of each decode step, of all requests that run together",
    "e2e_ms": "time of the last new token of all - begin of the round",
    "throughput_tok_s": "tokens of the decode steps / decode_ms",
    "output_throughput": "new tokens / e2e_ms, a second",
    "total_token_throughput": "(prompt tokens + new tokens) / e2e_ms, a second",
    "mb_s": "bytes / time in which the link was at work, in 1e6 bytes a second",
    "overlap_efficiency": "max(time of the busiest link, wall - wait) / wall",
    "bound_ms": "(bytes of a round - what may have been read before it) / speed of the link, for the slowest link",
}
"""What the words mean."""


def round_metrics(log: RoundLog) -> dict[str, Any]:
    """Every figure of a round. Times are milliseconds, bandwidths 1e6 bytes a second, throughputs tokens a second."""
    first_ms = {i: (times[0] - log.begin_s) * 1e3 for i, times in log.token_s.items() if times}
    whole_ms = {i: (times[-1] - log.begin_s) * 1e3 for i, times in log.token_s.items() if times}
    counts = {i: len(times) for i, times in log.token_s.items()}
    gaps = [(b - a) * 1e3 for times in log.token_s.values() for a, b in pairwise(times)]
    prefill, decode = log.of("prefill"), log.of("decode")
    prefill_ms, decode_ms = (sum(one.wall_us for one in passes) / 1e3 for passes in (prefill, decode))
    e2e_ms = (log.end_s - log.begin_s) * 1e3
    new_tokens = sum(counts.values())
    return {
        "requests": len(counts),
        "prompt_tokens": log.prompt_tokens,
        "output_tokens": new_tokens,
        "ttft_ms": distribution(list(first_ms.values())),
        "tpot_ms": distribution([(whole_ms[i] - first_ms[i]) / (n - 1) for i, n in counts.items() if n > 1]),
        "itl_ms": distribution(gaps),
        "e2el_ms": distribution(list(whole_ms.values())),
        "prefill_ms": prefill_ms,
        "decode_ms": decode_ms,
        "decode_step_ms": distribution([one.wall_us / 1e3 for one in decode]),
        "e2e_ms": e2e_ms,
        "throughput_tok_s": ratio(log.decode_tokens * 1e3, decode_ms),
        "output_throughput": ratio(new_tokens * 1e3, e2e_ms),
        "total_token_throughput": ratio((log.prompt_tokens + new_tokens) * 1e3, e2e_ms),
        **_transfers(log.passes),
        "links": {"prefill": links(prefill), "decode": links(decode)},
        "experts": _experts(log.passes),
        "kv": _kv(log.passes),
        "output_digest": log.digest(),
    }


def distribution(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and nearest-rank quantiles; all None without values."""
    if not values:
        return dict.fromkeys(("mean", *QUANTILES))
    ordered = sorted(values)
    return {
        "mean": sum(ordered) / len(ordered),
        **{name: ordered[round((len(ordered) - 1) * q)] for name, q in QUANTILES.items()},
    }


def ratio(part: float, whole: float) -> float | None:
    """None where there is nothing to divide by."""
    return part / whole if whole else None


def links(passes: Sequence[Pass]) -> dict[str, Any]:
    """What moved in these passes and how long it took, by link, in all and for each pass.

    ``disk`` reads weights into host memory, ``device`` brings them from there to where they compute; ``*_pool_read``
    and ``*_pool_write`` move KV. ``wait_ms`` is what computing waited for weights, ``overlap_efficiency`` None where
    none stream.
    """
    n, wall_us = len(passes), sum(one.wall_us for one in passes)
    weights = WeightTraffic()
    streams = [one.weights for one in passes if one.weights is not None]
    for traffic in streams:
        weights.add(traffic)
    found: dict[str, Any] = {"passes": n, "wall_ms": wall_us / 1e3}
    found["disk"] = _link(weights.disk_bytes, weights.disk_us, n)
    found["device"] = _link(weights.device_bytes, weights.device_us, n)
    for name in POOLS:
        pool = _pool(passes, name)
        found[f"{name}_read"] = _link(pool.bytes_read, pool.read_us, n)
        found[f"{name}_write"] = _link(pool.bytes_written, pool.write_us, n)
    found |= {"units": weights.units, "units_ahead": weights.ahead, "disk_reads": weights.disk_reads}
    found["wait_ms"] = weights.wait_us / 1e3
    found["wait_ms_per_pass"] = ratio(weights.wait_us / 1e3, n)
    found["overlap_efficiency"] = overlap_efficiency(passes) if streams else None
    return found


def overlap_efficiency(passes: Sequence[Pass]) -> float | None:
    """How near these passes come to taking no longer than what they cannot do without: 1 where all else is hidden.

    The busiest link is the one with the most time at work over all passes; computing is the time that did not wait
    for weights.
    """
    wall_us = sum(one.wall_us for one in passes)
    busy: dict[str, float] = {}
    for one in passes:
        for name, us in one.busy_us().items():
            busy[name] = busy.get(name, 0.0) + us
    wait_us = sum(one.weights.wait_us for one in passes if one.weights is not None)
    return ratio(max([wall_us - wait_us, *busy.values()]), wall_us)


def _link(moved: int, us: float, passes: int) -> dict[str, float | None]:
    return {
        "bytes": moved,
        "busy_ms": us / 1e3,
        "mb_s": ratio(moved, us),
        "bytes_per_pass": ratio(moved, passes),
        "busy_ms_per_pass": ratio(us / 1e3, passes),
    }


def _pool(passes: Sequence[Pass], name: str) -> TierTraffic:
    total = TierTraffic()
    for one in passes:
        total.add(one.pool(name))
    return total


def _transfers(passes: Sequence[Pass]) -> dict[str, Any]:
    """Bytes and bandwidth of weights to the device, and of KV to it and away from it."""
    weights = [one.weights for one in passes if one.weights is not None]
    pools = [_pool(passes, name) for name in POOLS]
    moved = {
        "weight_h2d": (sum(one.device_bytes for one in weights), sum(one.device_us for one in weights)),
        "kv_h2d": (sum(pool.bytes_read for pool in pools), sum(pool.read_us for pool in pools)),
        "kv_d2h": (sum(pool.bytes_written for pool in pools), sum(pool.write_us for pool in pools)),
    }
    return {name: {"bytes": size, "mb_s": ratio(size, us)} for name, (size, us) in moved.items()}


def _experts(passes: Sequence[Pass]) -> dict[str, Any]:
    hits, misses = (
        sum(getattr(one.weights, name) for one in passes if one.weights is not None)
        for name in ("expert_hits", "expert_misses")
    )
    return {"hits": hits, "misses": misses, "hit_rate": ratio(hits, hits + misses)}


def _kv(passes: Sequence[Pass]) -> dict[str, Any]:
    """Where decode found the KV blocks that it needed, as shares by tier, and what the tiers did in all phases."""
    traffic = Traffic()
    for one in passes:
        traffic.add(one.traffic)
    transfers = traffic.transfers()
    tiers = transfers.get("decode", {})
    hits = {name: tiers[name]["hits"] if name in tiers else 0 for name in TIERS}
    return {
        "found": {name: ratio(found, sum(hits.values())) for name, found in hits.items()},
        **decode_hit_rates(transfers),
        "transfers": transfers,
    }
