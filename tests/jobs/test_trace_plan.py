"""`dsakv trace`, with and without tiers, then `dsakv analyze --plan`: what is planned is what a run with tiers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsakv.cli import run
from tests.jobs.test_trace import command, ruler, stopping

__all__ = ["ruler", "stopping"]  # fixtures


def plan_of(folder: Path, *flags: str) -> dict[str, Any]:
    assert run(["analyze", "--input", str(folder), "--policies", "none", "--plan", *flags]) == 0
    (trace,) = folder.glob("block*")
    results = json.loads((trace / "analysis.json").read_bytes())["results"]
    plan: dict[str, Any] = results[0]["plan"]
    assert all(result["plan"] == plan for result in results)
    return plan


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_a_resident_run_tells_what_one_with_tiers_reads_at_another_block_size(
    stopping: Path, ruler: Path, tmp_path: Path, policy: str
) -> None:
    shared = ("--max-new-tokens", "40", "--batch-size", "2")
    assert run(command(stopping, ruler, tmp_path / "resident", *shared, "--kv-block-size", "16")) == 0
    plan = plan_of(
        tmp_path / "resident", "--block-sizes", "4,16", "--plan-hot", "2", "--plan-policies", policy, "--links",
        "pcie4+nvme",
    )  # fmt: skip
    (row,) = plan["sizes"][0]["rows"]
    assert (row["hot_blocks"], plan["as_run"]) == (8, None)
    tiers = ("--kv-block-size", "4", "--kv-hot-capacity", "8", "--kv-policy", policy)
    assert run(command(stopping, ruler, tmp_path / "tiers", *shared, *tiers)) == 0
    transfers = json.loads((tmp_path / "tiers" / "block4" / "summary.json").read_bytes())["kv_tiers"]["transfers"]
    read = transfers["decode"]["local_pool"]
    assert (row["misses"], row["read_batches"]) == (read["read_ops"], read["reads"])
    assert plan["sizes"][0]["blocks_written"] == read["write_ops"]

    again = plan_of(tmp_path / "tiers", "--plan-hot", "8", "--plan-policies", policy, "--plan-budget", "1e6")
    (own,) = [one for one in again["sizes"] if one["block_size_tokens"] == 4]
    assert own["rows"][0]["misses"] == row["misses"]
    steps = again["run"]["decode_steps"]
    found = again["as_run"]["tiers"]["local_pool"]
    assert found["blocks_per_step"] == pytest.approx(row["misses"] / steps)
    assert found["predicted_ms"] == pytest.approx(own["rows"][0]["tiers"]["local_pool"]["read_ms"])
    assert found["measured_ms"] == pytest.approx(read["read_ms"] / steps)
    assert "less" in again["base"]["source"]
