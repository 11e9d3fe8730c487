"""Figures into advice where the KV cache may live: a table of rules, each with its threshold."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

REFERENCE_BLOCK = 64
"""Tokens in the block that the thresholds in blocks, and in tokens of a block, are stated for."""

Figures = dict[str, Any]
"""``record_stats``, ``temporal_locality``, ``working_set`` and ``cache_sim`` of one result."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """Fires where the figure is beyond the threshold.

    ``threshold`` maps the block size to a value; ``advice`` may name ``{near}``, the capacity that covers ten steps.
    """

    name: str
    metric: str
    value: Callable[[Figures], float | None]
    above: bool
    threshold: Callable[[int], float]
    advice: str


def recommend(figures: Figures, block_size: int) -> list[dict[str, Any]]:
    """``{rule, metric, value, comparison, threshold, advice}`` of every rule that applies.

    A figure that was not asked for, or that nothing was counted for, fires no rule.

    Thresholds that depend on the block size are stated for 64 tokens: unique blocks scale with its inverse (the same
    span of tokens), tokens per block with it (the same share of a block).
    """
    advice = []
    for rule in _RULES:
        value, threshold = rule.value(figures), rule.threshold(block_size)
        if value is None or not (value > threshold if rule.above else value < threshold):
            continue
        advice.append(
            {
                "rule": rule.name,
                "metric": rule.metric,
                "value": value,
                "comparison": "above" if rule.above else "below",
                "threshold": threshold,
                "advice": rule.advice.format(near=_near_capacity(figures)),
            }
        )
    return advice


def _mean(*path: str) -> Callable[[Figures], float | None]:
    """The mean of the distribution at ``path``; None where a window was not asked for or nothing was counted."""

    def value(figures: Figures) -> float | None:
        node: Any = figures
        for name in path:
            node = node.get(name)
            if node is None:
                return None
        mean: float | None = node["mean"]
        return mean

    return value


def _hit_rate(capacity: str) -> Callable[[Figures], float | None]:
    def value(figures: Figures) -> float | None:
        simulated = figures["cache_sim"].get(capacity)
        return None if simulated is None else simulated["hit_rate"]

    return value


def _reuse_within(steps: int) -> Callable[[Figures], float | None]:
    """Share of reuses at a distance of at most ``steps``; None where the cap hides it."""

    def value(figures: Figures) -> float | None:
        temporal = figures["temporal_locality"]
        if not temporal["reuse_samples"] or temporal["reuse_cap_steps"] <= steps:
            return None
        return max(
            (point["cdf"] for point in temporal["reuse_distance_cdf_steps"] if point["reuse_distance_steps"] <= steps),
            default=0.0,
        )

    return value


def _thrashing(figures: Figures) -> float | None:
    """The hit rate of 256 blocks where 64 steps need over twice as many."""
    needed = _mean("working_set", "64")(figures)
    return _hit_rate("256")(figures) if needed is not None and needed > 512 else None


def _near_capacity(figures: Figures) -> str:
    needed = _mean("working_set", "10")(figures)
    return (
        "see working_set with --ws-windows 10"
        if needed is None
        else f"{math.ceil(needed)} blocks (working_set[10].mean)"
    )


def _fixed(threshold: float) -> Callable[[int], float]:
    return lambda block_size: threshold


_RULES = (
    _Rule(
        "dispersed_access",
        "record_stats.unique_blocks.mean",
        _mean("record_stats", "unique_blocks"),
        True,
        lambda block_size: 100 * REFERENCE_BLOCK / block_size,
        "Access is dispersed: a small near tier cannot hold it all. Plan a large remote pool, and prefetch rather than "
        "pin.",
    ),
    _Rule(
        "hot_blocks",
        "record_stats.block_concentration.gini.mean",
        _mean("record_stats", "block_concentration", "gini"),
        True,
        _fixed(0.5),
        "A few blocks hold most of the selected tokens: pin hot blocks in the near tier.",
    ),
    _Rule(
        "concentrated_access",
        "record_stats.block_concentration.normalized_entropy.mean",
        _mean("record_stats", "block_concentration", "normalized_entropy"),
        False,
        _fixed(0.3),
        "The selected tokens are concentrated; together with a high gini this confirms that pinning hot blocks pays.",
    ),
    _Rule(
        "poor_block_use",
        "record_stats.tokens_per_block_mean.mean",
        _mean("record_stats", "tokens_per_block_mean"),
        False,
        lambda block_size: 5 * block_size / REFERENCE_BLOCK,
        "A block that is moved yields few selected tokens. Consider compression below the block, or a larger block; "
        "compare sizes with --block-sizes.",
    ),
    _Rule(
        "stable_steps",
        "temporal_locality.step_jaccard.mean",
        _mean("temporal_locality", "step_jaccard"),
        True,
        _fixed(0.6),
        "Consecutive steps touch much the same blocks: LRU works well once the near tier is warm.",
    ),
    _Rule(
        "volatile_steps",
        "temporal_locality.step_jaccard.mean",
        _mean("temporal_locality", "step_jaccard"),
        False,
        _fixed(0.2),
        "Consecutive steps touch different blocks: LRU does poorly. Consider a working-set policy or prefetching.",
    ),
    _Rule(
        "early_reuse",
        "temporal_locality.reuse_distance_cdf_steps[10]",
        _reuse_within(10),
        True,
        _fixed(0.8),
        "Most reuse comes within 10 steps: a small near tier is enough. Capacity it needs: {near}.",
    ),
    _Rule(
        "late_reuse",
        "temporal_locality.reuse_distance_cdf_steps[100]",
        _reuse_within(100),
        False,
        _fixed(0.5),
        "Reuse comes late: use a larger near tier, or two (HBM and local DRAM).",
    ),
    _Rule(
        "sliding_window",
        "record_stats.recent_locality.recent_block_ratio[16].mean",
        _mean("record_stats", "recent_locality", "recent_block_ratio", "16"),
        True,
        _fixed(0.7),
        "Most access goes to the last 16 blocks: a sliding window of the newest blocks in the near tier works.",
    ),
    _Rule(
        "long_history",
        "record_stats.recent_locality.recent_block_ratio[64].mean",
        _mean("record_stats", "recent_locality", "recent_block_ratio", "64"),
        False,
        _fixed(0.5),
        "Even the last 64 blocks cover too little: choose a policy that knows the history, not a plain window.",
    ),
    _Rule(
        "small_cache_suffices",
        "cache_sim[256].hit_rate",
        _hit_rate("256"),
        True,
        _fixed(0.9),
        "An LRU cache of 256 blocks hits over 90%: the near tier is easy to provide, placement needs little work.",
    ),
    _Rule(
        "lru_thrashes",
        "cache_sim[256].hit_rate",
        _thrashing,
        False,
        _fixed(0.5),
        "64 steps need over 512 blocks and an LRU cache of 256 misses most: access thrashes LRU. Consider LFU or "
        "pinning hot blocks.",
    ),
)
"""The decision table. Where it says no more than "low" or "much larger", a half and twice are meant."""
