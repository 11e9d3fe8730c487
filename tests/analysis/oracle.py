"""The definitions of every figure once more, as slowly and plainly as the standard library allows."""

from __future__ import annotations

import math
import statistics
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

from dsakv.config import AnalyzeConfig

Record = dict[str, Any]
Needles = Mapping[Any, Sequence[tuple[int, int]]]


def figures(
    records: list[Record], block_size: int, config: AnalyzeConfig, needles: Needles | None = None
) -> dict[str, Any]:
    """The figures of ``records``, which are valid and in the order of the trace."""
    streams = _streams(records, config)
    used = [r for stream in streams for r in stream]
    scoped = [[_blocks(r, block_size) for r in stream] for stream in streams]
    return {
        "record_stats": _record_stats(used, block_size, config),
        "read_amplification": _amplification(used, block_size),
        "temporal_locality": _temporal_locality(streams, block_size, config),
        "overlap": {
            "steps": _step_overlap(streams, block_size),
            "layers": _layer_overlap(records, used, block_size, config),
        },
        "working_set": _working_set(streams, block_size, config),
        "needle_recall": _needle_recall(used, needles or {}),
        **caches(scoped, config),
    }


def caches(scoped: list[list[set[Any]]], config: AnalyzeConfig) -> dict[str, Any]:
    """The figures of caches, each given by the sets that it must hold at once, step after step."""
    sizes = sorted(len(blocks) for steps in scoped for blocks in steps)
    footprints = [len(set().union(*steps)) for steps in scoped]
    p95 = sizes[round((len(sizes) - 1) * 0.95)]
    found = {}
    for given in config.lru_caps:
        capacity = int(given) if given >= 1 else max(1, math.ceil(given * sum(footprints) / len(footprints)))
        simulated = _cache(scoped, capacity, config.lru_mode)
        found[str(capacity) if given >= 1 else f"{given:g}"] = {**simulated, "below_step_set_p95": capacity < p95}
    return {
        "cache_sim": found,
        "step_set_blocks": {
            "count": len(sizes),
            "p50": sizes[round((len(sizes) - 1) * 0.5)],
            "p95": p95,
            "max": sizes[-1],
        },
        "lru_curve": {
            "caches": len(scoped),
            "accesses": sum(sizes),
            "first_accesses": sum(footprints),
            "blocks_per_cache": sum(footprints) / len(footprints),
            **{mode: _curve(scoped, mode) for mode in ("step", "sequential")},
        },
    }


def _curve(scoped: list[list[set[Any]]], mode: str) -> dict[str, Any]:
    """By a list that is kept in the order of the last access: a capacity hits what lies above it."""
    distances: Counter[int] = Counter()
    for steps in scoped:
        stack: list[Any] = []
        for needed in steps:
            before = list(stack)
            for block in sorted(needed):
                searched = before if mode == "step" else stack
                if block in searched:
                    distances[searched.index(block)] += 1
                if block in stack:
                    stack.remove(block)
                stack.insert(0, block)
    accesses = sum(len(blocks) for steps in scoped for blocks in steps)
    grown = [distance + 1 for distance in sorted(distances)]
    hits = [sum(n for d, n in distances.items() if d < capacity) for capacity in grown]
    knee = None
    if grown:
        at = max(range(len(grown)), key=lambda i: (hits[i] / hits[-1] - grown[i] / grown[-1], -i))
        knee = {"capacity_blocks": grown[at], "hit_rate": hits[at] / accesses}
    return {"capacity_blocks": grown, "hits": hits, "knee": knee}


def _streams(records: list[Record], config: AnalyzeConfig) -> list[list[Record]]:
    used = [r for r in records if r.get("selected_token_pos") and (config.prefill_tail or r["step_idx"] >= 0)]
    if config.skip_dense:
        used = [r for r in used if len(r["selected_token_pos"]) < r["seq_len_current"]]
    if config.step_union:
        merged: dict[Any, Record] = {}
        for r in used:
            key = (r["request_id"], r["step_idx"])
            if key in merged:
                merged[key]["selected_token_pos"] += r["selected_token_pos"]
            else:
                merged[key] = {**r, "layer_id": -1, "selected_token_pos": list(r["selected_token_pos"])}
        used = list(merged.values())
    streams: dict[Any, list[Record]] = {}
    for r in used:
        key = (r["request_id"], r["layer_id"]) if config.key_mode == "request_layer" else r["request_id"]
        streams.setdefault(key, []).append(r)
    ordered = [sorted(stream, key=lambda r: (r["step_idx"], r["layer_id"])) for stream in streams.values()]
    return [stream[: config.max_steps_per_stream or None] for stream in ordered]


def _blocks(record: Record, block_size: int) -> set[int]:
    return {position // block_size for position in record["selected_token_pos"]}


def distribution(values: list[float]) -> dict[str, Any]:
    if not values:
        return {"count": 0, "min": None, "max": None, "mean": None, "std": None}
    return {
        "count": len(values),
        "min": min(values),
        "max": max(values),
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
    }


def _record_stats(records: list[Record], block_size: int, config: AnalyzeConfig) -> dict[str, Any]:
    names = ("unique", "span", "density", "tokens", "entropy", "gini", "distance")
    found: dict[Any, list[float]] = {name: [] for name in names}
    tokens_near: dict[int, list[float]] = {w: [] for w in config.recent_token_windows}
    blocks_near: dict[int, list[float]] = {w: [] for w in config.recent_block_windows}
    for r in records:
        positions, seq_len = r["selected_token_pos"], r["seq_len_current"]
        counts = Counter(position // block_size for position in positions)
        current, n = (seq_len - 1) // block_size, len(counts)
        span = max(counts) - min(counts) + 1
        found["unique"].append(n)
        found["span"].append(span)
        found["density"].append(n / span)
        found["tokens"].append(len(positions) / n)
        shares = [count / len(positions) for count in counts.values()]
        found["entropy"].append(-sum(p * math.log(p) for p in shares) / math.log(n) if n > 1 else 0.0)
        x = sorted(counts.values())
        found["gini"].append(2 * sum(i * v for i, v in enumerate(x, 1)) / (n * sum(x)) - (n + 1) / n)
        found["distance"].append(statistics.fmean(current - b for b in counts))
        for w, near in tokens_near.items():
            near.append(sum(seq_len - 1 - p <= w for p in positions) / len(positions))
        for w, near in blocks_near.items():
            near.append(sum(current - b <= w for b in counts) / n)
    return {
        "unique_blocks": distribution(found["unique"]),
        "block_span": distribution(found["span"]),
        "block_density": distribution(found["density"]),
        "tokens_per_block_mean": distribution(found["tokens"]),
        "block_concentration": {
            "normalized_entropy": distribution(found["entropy"]),
            "gini": distribution(found["gini"]),
        },
        "recent_locality": {
            "recent_token_ratio": {str(w): distribution(v) for w, v in tokens_near.items()},
            "recent_block_ratio": {str(w): distribution(v) for w, v in blocks_near.items()},
            "mean_block_distance": distribution(found["distance"]),
        },
    }


def _temporal_locality(streams: list[list[Record]], block_size: int, config: AnalyzeConfig) -> dict[str, Any]:
    jaccards: list[float] = []
    distances: Counter[int] = Counter()
    first = once = 0
    for stream in streams:
        seen: dict[int, int] = {}
        touches: Counter[int] = Counter()
        previous: set[int] | None = None
        for r in stream:
            blocks = _blocks(r, block_size)
            if previous is not None:
                jaccards.append(len(blocks & previous) / len(blocks | previous))
            for b in blocks:
                if b in seen:
                    distances[min(r["step_idx"] - seen[b], config.reuse_cap_steps)] += 1
                else:
                    first += 1
                seen[b] = r["step_idx"]
            touches.update(blocks)
            previous = blocks
        once += sum(n == 1 for n in touches.values())
    samples = sum(distances.values())
    return {
        "step_jaccard": distribution(jaccards),
        "reuse_distance_hist_steps": {str(d): distances[d] for d in sorted(distances)},
        "reuse_distance_cdf_steps": [
            {"reuse_distance_steps": d, "cdf": sum(n for e, n in distances.items() if e <= d) / samples}
            for d in sorted(distances)
        ],
        "first_touch_blocks": first,
        "single_touch_blocks": once,
        "reuse_samples": samples,
        "reuse_cap_steps": config.reuse_cap_steps,
    }


def _working_set(streams: list[list[Record]], block_size: int, config: AnalyzeConfig) -> dict[str, Any]:
    sizes: dict[int, list[float]] = {w: [] for w in config.ws_windows}
    for stream in streams:
        sets = [_blocks(r, block_size) for r in stream]
        for w, found in sizes.items():
            found += [len(set().union(*sets[max(0, t + 1 - w) : t + 1])) for t in range(len(sets))]
    return {str(w): distribution(found) for w, found in sizes.items()}


def _amplification(records: list[Record], block_size: int) -> dict[str, Any]:
    measured, uniform = [], []
    for r in records:
        n, chosen = r["seq_len_current"], set(r["selected_token_pos"])
        blocks = [range(b, min(b + block_size, n)) for b in range(0, n, block_size)]
        measured.append(sum(len(b) for b in blocks if not chosen.isdisjoint(b)) / len(chosen))
        ways = math.comb(n, len(chosen))
        touched = sum(len(b) * (1 - Fraction(math.comb(n - len(b), len(chosen)), ways)) for b in blocks)
        uniform.append(float(touched / len(chosen)))
    return {"measured": distribution(measured), "uniform": distribution(uniform)}


def _step_overlap(streams: list[list[Record]], block_size: int) -> dict[str, Any]:
    return _overlap(
        [(_blocks(a, block_size), _blocks(b, block_size)) for stream in streams for a, b in pairwise(stream)]
    )


def _layer_overlap(records: list[Record], used: list[Record], block_size: int, config: AnalyzeConfig) -> dict[str, Any]:
    ids = {id(r) for r in used}
    ordered = used if config.key_mode == "request" else [r for r in records if id(r) in ids]
    before: dict[Any, Record] = {}
    pairs = []
    for r in ordered:
        last = before.get(r["request_id"])
        if last and last["step_idx"] == r["step_idx"] and last["layer_id"] < r["layer_id"]:
            pairs.append((_blocks(last, block_size), _blocks(r, block_size)))
        before[r["request_id"]] = r
    return _overlap([] if config.step_union else pairs)


def _overlap(pairs: list[tuple[set[int], set[int]]]) -> dict[str, Any]:
    return {
        "jaccard": distribution([len(a & b) / len(a | b) for a, b in pairs]),
        "kept": distribution([len(a & b) / len(a) for a, b in pairs]),
    }


def _needle_recall(records: list[Record], needles: Needles) -> dict[str, Any] | None:
    tokens, found = [], []
    for r in records:
        spans = [set(range(*span)) for span in needles.get(r["request_id"], ())]
        if spans:
            chosen = set(r["selected_token_pos"])
            tokens.append(sum(len(span & chosen) for span in spans) / sum(map(len, spans)))
            found.append(sum(not span.isdisjoint(chosen) for span in spans) / len(spans))
    return {"tokens": distribution(tokens), "needles": distribution(found)} if tokens else None


def _cache(scoped: list[list[set[Any]]], capacity: int, mode: str) -> dict[str, Any]:
    hits = misses = 0
    for steps in scoped:
        cache: OrderedDict[Any, None] = OrderedDict()
        for needed in steps:
            blocks = sorted(needed)
            held = set(cache)
            for b in blocks:
                hit = b in (held if mode == "step" else cache)
                hits += hit
                misses += not hit
                cache[b] = None
                cache.move_to_end(b)
                if mode == "sequential" and len(cache) > capacity:
                    cache.popitem(last=False)
            while len(cache) > capacity:
                cache.popitem(last=False)
    rate = hits / (hits + misses) if hits + misses else None
    return {"capacity_blocks": capacity, "hits": hits, "misses": misses, "hit_rate": rate}
