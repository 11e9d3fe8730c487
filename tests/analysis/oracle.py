"""The definitions of every figure once more, as slowly and plainly as the standard library allows."""

from __future__ import annotations

import math
import statistics
from collections import Counter, OrderedDict
from typing import Any

from dsakv.config import AnalyzeConfig

Record = dict[str, Any]


def figures(records: list[Record], block_size: int, config: AnalyzeConfig) -> dict[str, Any]:
    """The figures of ``records``, which are valid and in the order of the trace."""
    streams = _streams(records, config)
    return {
        "record_stats": _record_stats([r for stream in streams for r in stream], block_size, config),
        "temporal_locality": _temporal_locality(streams, block_size, config),
        "working_set": _working_set(streams, block_size, config),
        "cache_sim": {str(c): _cache(streams, block_size, c, config.lru_mode) for c in config.lru_caps},
    }


def _streams(records: list[Record], config: AnalyzeConfig) -> list[list[Record]]:
    used = [r for r in records if r.get("selected_token_pos") and (config.prefill_tail or r["step_idx"] >= 0)]
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


def _cache(streams: list[list[Record]], block_size: int, capacity: int, mode: str) -> dict[str, Any]:
    hits = misses = 0
    for stream in streams:
        cache: OrderedDict[int, None] = OrderedDict()
        for r in stream:
            blocks = sorted(_blocks(r, block_size))
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
