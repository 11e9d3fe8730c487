from __future__ import annotations

import copy
from typing import Any

import pytest

from dsakv.analysis.recommend import recommend


def figures() -> dict[str, Any]:
    """Figures in the middle of everything: no rule applies."""
    return {
        "record_stats": {
            "unique_blocks": {"mean": 50.0},
            "tokens_per_block_mean": {"mean": 20.0},
            "block_concentration": {"normalized_entropy": {"mean": 0.7}, "gini": {"mean": 0.3}},
            "recent_locality": {"recent_block_ratio": {"16": {"mean": 0.6}, "64": {"mean": 0.8}}},
        },
        "temporal_locality": {
            "step_jaccard": {"mean": 0.4},
            "reuse_samples": 10,
            "reuse_cap_steps": 2048,
            "reuse_distance_cdf_steps": [
                {"reuse_distance_steps": 3, "cdf": 0.7},
                {"reuse_distance_steps": 60, "cdf": 0.9},
                {"reuse_distance_steps": 500, "cdf": 1.0},
            ],
        },
        "working_set": {"64": {"mean": 300.0}},
        "cache_sim": {"256": {"hit_rate": 0.7}},
    }


def changed(path: str, value: Any) -> dict[str, Any]:
    made = copy.deepcopy(figures())
    *names, last = path.split("/")
    node = made
    for name in names:
        node = node[name]
    node[last] = value
    return made


def rules(made: dict[str, Any], block_size: int = 64) -> list[str]:
    return [entry["rule"] for entry in recommend(made, block_size)]


def test_ordinary_figures_call_for_nothing() -> None:
    assert recommend(figures(), 64) == []


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("record_stats/unique_blocks/mean", 101.0, "dispersed_access"),
        ("record_stats/block_concentration/gini/mean", 0.51, "hot_blocks"),
        ("record_stats/block_concentration/normalized_entropy/mean", 0.29, "concentrated_access"),
        ("record_stats/tokens_per_block_mean/mean", 4.9, "poor_block_use"),
        ("temporal_locality/step_jaccard/mean", 0.61, "stable_steps"),
        ("temporal_locality/step_jaccard/mean", 0.19, "volatile_steps"),
        ("temporal_locality/reuse_distance_cdf_steps", [{"reuse_distance_steps": 10, "cdf": 0.81}], "early_reuse"),
        ("temporal_locality/reuse_distance_cdf_steps", [{"reuse_distance_steps": 100, "cdf": 0.49}], "late_reuse"),
        ("temporal_locality/reuse_distance_cdf_steps", [{"reuse_distance_steps": 101, "cdf": 1.0}], "late_reuse"),
        ("record_stats/recent_locality/recent_block_ratio/16/mean", 0.71, "sliding_window"),
        ("record_stats/recent_locality/recent_block_ratio/64/mean", 0.49, "long_history"),
        ("cache_sim/256/hit_rate", 0.91, "small_cache_suffices"),
    ],
)
def test_one_figure_beyond_its_threshold_fires_one_rule(path: str, value: Any, rule: str) -> None:
    (entry,) = recommend(changed(path, value), 64)
    assert entry["rule"] == rule
    assert set(entry) == {"rule", "metric", "value", "comparison", "threshold", "advice"}
    beyond = entry["value"] > entry["threshold"]
    assert beyond is (entry["comparison"] == "above")


def test_thrashing_takes_a_large_working_set_and_a_low_hit_rate() -> None:
    made = changed("cache_sim/256/hit_rate", 0.4)
    assert rules(made) == []
    made["working_set"]["64"]["mean"] = 600.0
    assert rules(made) == ["lru_thrashes"]


def test_thresholds_follow_the_block_size() -> None:
    assert rules(changed("record_stats/unique_blocks/mean", 390.0), 16) == []
    assert rules(changed("record_stats/unique_blocks/mean", 390.0), 64) == ["dispersed_access"]
    assert rules(changed("record_stats/tokens_per_block_mean/mean", 1.3), 16) == []
    assert rules(changed("record_stats/tokens_per_block_mean/mean", 1.2), 16) == ["poor_block_use"]


def test_early_reuse_names_the_capacity_where_it_was_measured() -> None:
    made = changed("temporal_locality/reuse_distance_cdf_steps", [{"reuse_distance_steps": 1, "cdf": 1.0}])
    assert "--ws-windows 10" in recommend(made, 64)[0]["advice"]
    made["working_set"]["10"] = {"mean": 123.4}
    assert "124 blocks" in recommend(made, 64)[0]["advice"]


def test_what_was_not_measured_fires_nothing() -> None:
    made = figures()
    made["cache_sim"] = {"8": {"hit_rate": 0.99}}
    made["working_set"] = {}
    made["record_stats"]["recent_locality"]["recent_block_ratio"] = {"5": {"mean": 0.0}}
    made["temporal_locality"] |= {"step_jaccard": {"mean": None}, "reuse_samples": 0, "reuse_distance_cdf_steps": []}
    assert recommend(made, 64) == []
    hidden = changed("temporal_locality/reuse_distance_cdf_steps", [{"reuse_distance_steps": 10, "cdf": 1.0}])
    hidden["temporal_locality"]["reuse_cap_steps"] = 10  # the bucket holds all that is longer, too
    assert recommend(hidden, 64) == []
