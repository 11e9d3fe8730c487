"""Figures as they stand in ``analysis.json``: one result for a trace and block size."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from dsakv import __version__
from dsakv.analysis.caches import TARGETS, Curve, LruCurves, OneCache
from dsakv.analysis.figures import CacheFigures
from dsakv.analysis.part import PartFigures
from dsakv.analysis.recommend import recommend
from dsakv.analysis.simulation import LRU
from dsakv.config import AnalyzeConfig
from dsakv.trace.files import read_lines
from dsakv.trace.open import TraceDir, caveat_of, has_random_weights, requests_file

# They say how and where to, not what: results must be the same without them.
_NOT_FIGURES = ("workers", "scheduler", "out", "report", "json", "to_parquet")


def to_result(
    trace: TraceDir,
    config: AnalyzeConfig,
    block_size: int,
    total: PartFigures,
    capacities: tuple[int, ...],
    policies: tuple[str, ...],
    kv_tiers: dict[str, Any] | None,
) -> dict[str, Any]:
    """What ``total`` says of one block size, with where it comes from; ``capacities`` are those asked for, resolved,
    ``kv_tiers`` as :func:`~dsakv.analysis.kv_check.check_tiers` found it.
    """
    locality, caches, counts = total.locality[block_size], total.caches[block_size], total.counts
    figures = {**locality.result(), **_cache_figures(caches, config, capacities, policies)}
    options = msgspec.json.decode(msgspec.json.encode(config))
    return {
        "trace_dir": str(trace.path),
        "block_size_tokens": block_size,
        "key_mode": config.key_mode,
        "lru_mode": config.lru_mode,
        "cache_scope": config.cache_scope,
        "step_union": config.step_union,
        "complete": not counts.rejected,
        "warnings": _warnings(trace, config, total, figures, kv_tiers),
        "run_meta": trace.run_meta,
        "input": {
            "files": counts.files,
            "bytes": counts.bytes,
            "records": counts.accepted
            - total.left_out.prefill_tail
            - (total.left_out.dense if config.skip_dense else 0),
            "rejected": {
                reason: {"count": rejected.count, "places": rejected.places}
                for reason, rejected in counts.rejected.items()
            },
            "records_without_positions": counts.without_positions,
            "prefill_tail_records_left_out": total.left_out.prefill_tail,
            "dense_records": total.left_out.dense,
            "dense_records_left_out": total.left_out.dense if config.skip_dense else 0,
            "unfinished_last_lines": counts.unfinished,
        },
        **figures,
        "kv_tiers": kv_tiers,
        "layers": {
            str(layer): {**locality.result(layer), **_layer_caches(caches.lru, config, capacities, layer)}
            for layer in locality.layers
        }
        if config.by_layer
        else {},
        "recommendations": recommend(figures, block_size),
        "config": {name: value for name, value in options.items() if name not in _NOT_FIGURES},
        "dsakv_version": __version__,
    }


def resolved(given: tuple[float, ...], lru: LruCurves) -> tuple[int, ...]:
    """Capacities in blocks; a fraction is of the mean number of blocks that a cache sees."""
    return tuple(int(one) if one >= 1 else max(1, math.ceil(one * lru.footprint())) for one in given)


def _keys(config: AnalyzeConfig) -> list[str]:
    return [str(int(given)) if given >= 1 else repr(given) for given in config.lru_caps]


def _cache_figures(
    caches: CacheFigures, config: AnalyzeConfig, capacities: tuple[int, ...], policies: tuple[str, ...]
) -> dict[str, Any]:
    lru = caches.lru
    curve, step_set = lru.curve(config.lru_mode), lru.step_set()
    hits = caches.policies.hits()
    if LRU in policies:
        stepwise = lru.curve("step")
        hits = {LRU: [stepwise.hits(capacity) for capacity in capacities], **hits}
    return {
        "cache_sim": _cache_sim(curve, config, capacities, step_set["p95"]),
        "step_set_blocks": step_set,
        "lru_curve": {
            "caches": lru.caches,
            "accesses": curve.accesses,
            "first_accesses": curve.cold,
            "blocks_per_cache": lru.footprint(),
            **{mode: _curve(lru.curve(mode)) for mode in ("step", "sequential")},
        },
        "capacity_for_hit_rate": {str(target): curve.capacity_for(target) for target in TARGETS},
        "capacity_per_cache": lru.needs(),
        "caches": None if lru.each is None else [_one(cache) for cache in sorted(lru.each, key=_order)],
        "policies": {
            name: {
                key: _hits(capacity, count, curve.accesses)
                for key, capacity, count in zip(_keys(config), capacities, counts, strict=True)
            }
            for name, counts in hits.items()
        },
    }


def _cache_sim(curve: Curve, config: AnalyzeConfig, capacities: tuple[int, ...], needed: int | None) -> dict[str, Any]:
    return {
        key: {
            **_hits(capacity, curve.hits(capacity), curve.accesses),
            "below_step_set_p95": needed is not None and capacity < needed,
        }
        for key, capacity in zip(_keys(config), capacities, strict=True)
    }


def _hits(capacity: int, hits: int, accesses: int) -> dict[str, Any]:
    return {
        "capacity_blocks": capacity,
        "hits": hits,
        "misses": accesses - hits,
        "hit_rate": hits / accesses if accesses else None,
    }


def _layer_caches(lru: LruCurves, config: AnalyzeConfig, capacities: tuple[int, ...], layer: int) -> dict[str, Any]:
    """Null where caches serve several layers."""
    if config.cache_scope not in ("stream", "layer"):
        return {"cache_sim": None, "capacity_for_hit_rate": None}
    curve = lru.curve(config.lru_mode, layer)
    return {
        "cache_sim": _cache_sim(curve, config, capacities, lru.step_set()["p95"]),
        "capacity_for_hit_rate": {str(target): curve.capacity_for(target) for target in TARGETS},
    }


def _one(cache: OneCache) -> dict[str, Any]:
    return {
        "request_id": cache.request,
        "layer_id": cache.layer,
        "accesses": cache.step.accesses,
        "first_accesses": cache.step.cold,
        "step": _curve(cache.step),
        "sequential": _curve(cache.sequential),
    }


def _order(cache: OneCache) -> tuple[int, str, int]:
    """Requests by number or by name, then layers."""
    number, name = (cache.request, "") if isinstance(cache.request, int) else (-1, cache.request or "")
    return number, name, -1 if cache.layer is None else cache.layer


def _curve(curve: Curve) -> dict[str, Any]:
    knee = curve.knee()
    at = None if knee is None else {"capacity_blocks": knee, "hit_rate": curve.hit_rate(knee)}
    return {**curve.points(), "knee": at}


def _warnings(
    trace: TraceDir,
    config: AnalyzeConfig,
    total: PartFigures,
    figures: dict[str, Any],
    kv_tiers: dict[str, Any] | None,
) -> list[str]:
    counts, warnings = total.counts, []
    if has_random_weights(trace.run_meta):
        warnings.append("the model's weights are random: locality numbers mean nothing")
    if caveat := caveat_of(trace.run_meta):
        warnings.append(caveat)
    if counts.rejected:
        bad = sum(rejected.count for rejected in counts.rejected.values())
        warnings.append(f"the figures are incomplete: {bad} bad records were skipped")
    if counts.without_positions:
        warnings.append(f"{counts.without_positions} records without positions were skipped")
    layers = max(len(locality.layers) for locality in total.locality.values())
    if config.by_layer and layers > 1 and not figures["overlap"]["layers"]["jaccard"]["count"]:
        warnings.append("the layers of a step do not follow each other in the trace: their overlap was not counted")
    if kv_tiers is not None and kv_tiers["agree"] is False:
        warnings.append(f"the tiers of the run and their replay disagree: {kv_tiers['reason']}")
    if kv_tiers is not None and kv_tiers["damaged"]:
        warnings.append(f"the tiers of the run cannot be replayed: {kv_tiers['reason']}")
    warnings += [f"{place}: an unfinished last line was dropped" for place in counts.unfinished]
    return warnings + _unfinished(trace)


def _unfinished(trace: TraceDir) -> list[str]:
    """Whether requests of the run are missing, where its files say how many there are."""
    inputs = (trace.run_meta or {}).get("inputs")
    kept = inputs.get("kept") if isinstance(inputs, dict) else None
    log = requests_file(trace.path)
    if type(kept) is not int or log is None:
        return []
    done = sum(1 for _ in read_lines(log))
    return [f"the run is unfinished: {done} of its {kept} requests are complete"] if done < kept else []
