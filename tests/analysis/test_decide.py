from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from orjson import dumps

from dsakv.config import AnalyzeConfig
from tests.analysis.traces import Record, record, run, write_shard


def drifting(steps: int = 40, width: int = 8) -> list[Record]:
    """Each step reads ``width`` tokens next to those of the step before, and far ones at random."""
    rng = np.random.default_rng(1)
    return [
        record(0, layer, step, sorted({*range(step, step + width), *rng.choice(900, 4).tolist()}), 1000)
        for step in range(steps)
        for layer in range(2)
    ]


def decision(folder: Path, records: list[Record], meta: dict[str, Any] | None = None, **options: Any) -> list[Any]:
    write_shard(folder / "trace_steps.jsonl", records)
    (folder / "run_meta.json").write_bytes(dumps({"block_size_tokens": 4} | (meta or {})))
    return [result["decision"] for result in run(folder, AnalyzeConfig(**options))]


def test_the_answers_rest_on_the_curve(tmp_path: Path) -> None:
    write_shard(tmp_path / "trace_steps.jsonl", drifting())
    (result,) = run(tmp_path, AnalyzeConfig(block_size=4))
    memory, policy, block, error = result["decision"]
    curve = result["lru_curve"]["step"]
    capacity = memory["measured"]["capacity_blocks"]
    at = dict(zip(curve["capacity_blocks"], curve["hits"], strict=True))

    def hits(blocks: int) -> int:
        return max((h for c, h in at.items() if c <= blocks), default=0)

    assert capacity >= result["step_set_blocks"]["p95"]
    assert hits(capacity) >= 0.95 * curve["hits"][-1]
    assert capacity == result["step_set_blocks"]["p95"] or hits(capacity - 1) < 0.95 * curve["hits"][-1]
    assert error["measured"]["half_hit_rate"] == hits(capacity // 2) / result["lru_curve"]["accesses"]
    missed = result["lru_curve"]["accesses"] - hits(capacity)
    assert error["measured"]["far_tokens_per_step_chosen"] == missed * 4 / result["step_set_blocks"]["count"]
    assert f"{capacity:,} blocks of 4 tokens" in memory["answer"]
    assert "tokens for a request's 2 layers" in memory["answer"]
    assert "Only 4 was analyzed" in block["answer"]
    assert "not compared" in policy["answer"]
    assert f"Add {capacity} to --lru-caps" in policy["answer"]
    (again,) = run(tmp_path, AnalyzeConfig(block_size=4, lru_caps=(1, capacity, 9999)))
    measured = again["decision"][1]["measured"]
    assert measured["capacity_blocks"] == capacity
    assert hits(capacity) / result["lru_curve"]["accesses"] == measured["lru_hit_rate"] <= measured["opt_hit_rate"]
    assert all(entry["rule"] for entry in result["decision"])


def test_bytes_are_told_where_the_trace_knows_them(tmp_path: Path) -> None:
    meta = {"model": {"kv_bytes_per_token_layer": 1000}}
    ((memory, *_),) = decision(tmp_path, drifting(), meta)
    assert memory["measured"]["bytes"] == memory["measured"]["capacity_blocks"] * 4 * 1000
    assert " kB" in memory["answer"]
    ((memory, *_),) = decision(tmp_path, drifting(), meta, step_union=True)
    assert memory["measured"]["bytes"] is None  # a merged block is one of several layers


def test_block_sizes_are_compared_at_equal_memory(tmp_path: Path) -> None:
    scattered = [record(0, 0, s, sorted((s * 37 + 64 * i) % 960 for i in range(9)), 1000) for s in range(30)]
    first, second = decision(tmp_path, scattered, block_sizes=(2, 32))
    assert first[2] == second[2]
    assert first[2]["answer"].startswith("2 tokens.")
    assert set(first[2]["measured"]) == {"near_tokens", "far_tokens_per_step_2", "far_tokens_per_step_32"}


def test_another_policy_is_named_where_it_gains(tmp_path: Path) -> None:
    cyclic = [record(0, 0, s, [0, 4, 8 + 4 * (s % 12)], 100) for s in range(60)]  # LRU misses all of a cycle
    ((_, policy, *_),) = decision(tmp_path, cyclic, lru_caps=(10,), policies=("all",))
    rates = {k.removesuffix("_hit_rate"): v for k, v in policy["measured"].items() if k.endswith("_hit_rate")}
    best = max((name for name in rates if name != "opt"), key=lambda name: rates[name])
    assert rates[best] > rates["lru"] + 0.01
    assert policy["answer"].startswith(f"{best}: at 10 blocks")
    ((_, policy, *_),) = decision(tmp_path, drifting(), lru_caps=(10,), policies=("none",))
    assert "--policies all" in policy["answer"]


def test_no_decision_without_reuse_and_a_warning_where_all_is_needed(tmp_path: Path) -> None:
    assert decision(tmp_path, [record(0, 0, 0, [1, 2, 3])]) == [[]]
    everything = [record(0, 0, s, list(range(16)), 16 + s) for s in range(5)]
    ((memory, policy, *_),) = decision(tmp_path, everything)
    assert "no small near tier" in memory["answer"]
    assert policy["answer"].startswith("Any: ")
    assert memory["measured"]["hit_rate"] == pytest.approx(0.8)


def test_a_size_without_reuse_is_compared_all_the_same(tmp_path: Path) -> None:
    once = [record(0, 0, s, [s * 128], 128 * 50) for s in range(50)]
    small, medium, large = decision(tmp_path, once, block_sizes=(16, 64, 1024))
    assert small == medium == []
    assert large[2]["answer"].startswith("16 tokens.")
    assert large[2]["measured"]["far_tokens_per_step_16"] == 16
    assert "Little is read twice" not in large[0]["answer"]


def test_caches_of_different_sizes_may_still_evict(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    tiny = [record(r, 0, s, [0, 4], 8) for r in range(1, 30) for s in range(3)]
    long = [record(0, 0, s, sorted(rng.choice(2000, 40, replace=False).tolist()), 2000) for s in range(60)]
    ((memory, policy, *_),) = decision(tmp_path, tiny + long)
    assert "all of the" in memory["answer"]
    assert not policy["answer"].startswith("Any")
