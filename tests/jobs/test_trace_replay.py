"""`dsakv trace` with KV in tiers, then `dsakv analyze`: the replay of the trace gives the counts of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsakv.cli import run
from tests.jobs.test_trace import command, ruler, stopping
from tests.kv.tiers.conftest import redis_server
from tests.kv.tiers.servers import RedisServer
from tests.models.llamas import save_llama

__all__ = ["redis_server", "ruler", "stopping"]  # fixtures

CASES = {
    "host memory": ["--kv-hot-capacity", "3", "--kv-block-size", "16", "--batch-size", "2"],
    "warm, write back": [
        "--kv-hot-capacity", "4", "--kv-block-size", "8", "--batch-size", "3", "--kv-start", "warm",
        "--kv-write", "back", "--kv-policy", "s3fifo",
    ],
    "prefix cache": [
        "--kv-hot-capacity", "0.1", "--kv-block-size", "8", "--batch-size", "3", "--prefix-cache", "--kv-policy", "lfu",
        "--kv-scope", "shared",
    ],
    "remote with copies": [
        "--kv-hot-capacity", "2", "--kv-block-size", "16", "--batch-size", "2", "--kv-remote", "file://POOL",
        "--kv-local", "5", "--kv-policy", "sieve", "--admission", "batch", "--prefix-cache", "--kv-write", "back",
    ],
    "one at a time": [
        "--kv-hot-capacity", "5", "--kv-block-size", "4", "--batch-size", "1", "--kv-policy", "sink_recent",
        "--kv-remote", "file://POOL", "--kv-start", "warm", "--trace-format", "parquet",
    ],
    "blocks of a token": [
        "--kv-hot-capacity", "40", "--kv-block-size", "1", "--batch-size", "4", "--kv-policy", "fifo",
        "--kv-scope", "shared", "--kv-start", "warm", "--trace-prefill-tail", "3", "--requests-per-shard", "1",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_replay_gives_the_counts_of_the_run(stopping: Path, ruler: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "pool").mkdir()
    options = [option.replace("POOL", str(tmp_path / "pool")) for option in CASES[name]]
    assert run(command(stopping, ruler, tmp_path / "run", "--max-new-tokens", "40", *options)) == 0
    assert run(["analyze", "--input", str(tmp_path / "run"), "--policies", "none"]) == 0
    (trace,) = (tmp_path / "run").glob("block*")
    (result,) = json.loads((trace / "analysis.json").read_bytes())["results"]
    tiers: dict[str, Any] = result["kv_tiers"]
    assert tiers["agree"] is True, tiers["reason"]
    found = {tier: figures["hits"] for tier, figures in tiers["replayed"].items()}
    assert found["hbm"] > 0
    assert sum(found.values()) - found["hbm"] > 0
    assert (found.get("local_pool", 0) > 0) == (name != "one at a time")
    written = tiers["replayed"][result["run_meta"]["kv_tiers"]["home"]]["write_ops"]
    assert written is None if name == "remote with copies" else written > 0


def test_planned_counted_and_served_are_the_same(
    stopping: Path, ruler: Path, tmp_path: Path, redis_server: RedisServer
) -> None:
    """Blocks and bytes of the replay, of the tiers' own books, and of the Redis server's."""
    tiers = ["--kv-hot-capacity", "4", "--kv-local", "6", "--kv-remote", redis_server.url, "--kv-policy", "clock"]
    with redis_server.client() as client:
        client.config_resetstat()
        assert run(command(stopping, ruler, tmp_path / "run", "--batch-size", "2", "--kv-block-size", "8", *tiers)) == 0
        stats: Any = client.info("commandstats")
        network: Any = client.info("stats")
    assert run(["analyze", "--input", str(tmp_path / "run"), "--policies", "none"]) == 0
    trace = tmp_path / "run" / "block8"
    (result,) = json.loads((trace / "analysis.json").read_bytes())["results"]
    assert result["kv_tiers"]["agree"] is True
    transfers = json.loads((trace / "summary.json").read_bytes())["kv_tiers"]["transfers"]
    block_bytes = result["run_meta"]["kv_tiers"]["block_bytes"]
    books = [phase["remote_pool"] for phase in transfers.values() if "remote_pool" in phase]
    assert sum(book["read_ops"] for book in books) == stats["cmdstat_get"]["calls"]
    assert sum(book["write_ops"] for book in books) == stats["cmdstat_set"]["calls"]
    assert sum(book["bytes_read"] for book in books) == stats["cmdstat_get"]["calls"] * block_bytes
    for way, calls in (("output", stats["cmdstat_get"]["calls"]), ("input", stats["cmdstat_set"]["calls"])):
        assert network[f"total_net_{way}_bytes"] > calls * block_bytes
    planned = result["kv_tiers"]["replayed"]["remote_pool"]
    for name in ("hits", "reads", "read_ops", "bytes_read", "writes", "write_ops", "bytes_written"):
        assert planned[name] == transfers["decode"]["remote_pool"][name] > 0


def test_what_an_oracle_reads_to_score_is_no_part_of_decode(ruler: Path, tmp_path: Path) -> None:
    save_llama(tmp_path / "llama", "tied")
    options = ["--selection", "oracle", "--index-topk", "16", "--kv-hot-capacity", "3", "--kv-block-size", "8"]
    assert run(command(tmp_path / "llama", ruler, tmp_path / "run", "--max-new-tokens", "20", *options)) == 0
    assert run(["analyze", "--input", str(tmp_path / "run"), "--policies", "none"]) == 0
    trace = tmp_path / "run" / "block8"
    (result,) = json.loads((trace / "analysis.json").read_bytes())["results"]
    assert result["kv_tiers"]["agree"] is True, result["kv_tiers"]["reason"]
    transfers = json.loads((trace / "summary.json").read_bytes())["kv_tiers"]["transfers"]
    assert transfers["scoring"]["local_pool"]["read_ops"] > transfers["decode"]["local_pool"]["read_ops"]
