"""The validator passes what the writer writes and finds what was changed in it."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from dsakv.config import TraceConfig
from dsakv.errors import DsakvError, InputError
from dsakv.trace.run_dir import RunDir
from dsakv.trace.selfcheck import (
    BLOCK_SIZE,
    LAYERS,
    ROW_BYTES,
    sample_config,
    sample_requests,
    sample_steps,
    selfcheck,
    write_sample,
)
from dsakv.trace.validate import validate

Record = dict[str, Any]


@pytest.fixture
def trace_dir(tmp_path: Path) -> Path:
    return selfcheck(tmp_path / "run").trace_dir


@pytest.mark.parametrize("name", ["jsonl", "parquet"])
def test_selfcheck_reports_what_it_checked(tmp_path: Path, name: Literal["jsonl", "parquet"]) -> None:
    report = selfcheck(tmp_path / "run", name)
    steps = [request.max_new_tokens - 1 + 2 for request in sample_requests()]
    assert report.records == sum(steps) * LAYERS == report.checks["selections"]
    assert report.requests == len(steps)
    assert report.files == 4
    assert report.checks["summary"] == 30
    assert report.without_positions == 0


def test_selfcheck_refuses_a_folder_that_holds_a_run(tmp_path: Path) -> None:
    selfcheck(tmp_path / "run")
    with pytest.raises(DsakvError, match="holds a run already"):
        selfcheck(tmp_path / "run")


def test_no_torch_is_imported() -> None:
    code = "import sys, dsakv.trace.selfcheck; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def change(path: Path, line: int, edit: Callable[[Record], object]) -> None:
    lines = path.read_text().splitlines()
    record = json.loads(lines[line])
    edit(record)
    lines[line] = json.dumps(record)
    path.write_text("\n".join(lines) + "\n")


def put(*path: str, value: Any) -> Callable[[Record], object]:
    def edit(record: Record) -> None:
        for key in path[:-1]:
            record = record[key]
        record[path[-1]] = value

    return edit


RECORD_EDITS = [
    (put("event", value="topk"), "event"),
    (put("request_id", value=9), "request 9 is not of this shard"),
    (put("layer_id", value=7), "order"),
    (put("layer_id", value=1.0), "layer_id is 1.0"),
    (put("index_layer_id", value=5), "index_layer_id"),
    (put("step_wall_us", value=-1), "step_wall_us"),
    (put("seq_len_current", value=400), "seq_len_current"),
    (put("unique_token_pos_count", value=4), "read_ops"),
    (put("offset_min", value=-3), "offset_min"),
    (put("offset_p50", value=77), "offset_p50"),
    (put("offset_max", value=77), "offset_max"),
    (put("block_size_tokens", value=64), "block_size_tokens"),
    (put("unique_blocks", value=40), "hit_blocks"),
    (put("touched_block_ratio", value=0.123), "touched_block_ratio"),
    (put("touched_block_ratio", value=float("nan")), "the line is damaged"),
    (put("tokens_per_touched_block", "mean", value=0.5), "tokens_per_touched_block.mean"),
    (put("tokens_per_touched_block", "p50", value=99), "tokens_per_touched_block.p50"),
    (put("tokens_per_touched_block", "p95", value=99), "tokens_per_touched_block.p95"),
    (put("prefix", "prefix_cache_hit", value=None), "prefix_cache_hit is None"),
    (put("prefix", "prefix_cached_blocks", value=1), "prefix_cache_hit is False, not True"),
    (put("prefix", "prefix_key", value="x"), "prefix_key"),
    (put("prefix", "intersection_ratio", value=0.5), "intersection_ratio"),
    (put("prefix", "intersection_blocks", value=3), "intersection_blocks"),
    (put("scores_stats", "mean", value=1e9), "the mean is not between"),
    (put("selected_block_ids", value=[9]), "selected_block_ids|hit_block_ids"),
    (put("selected_token_pos", value=[]), "positions are not integers"),
    (put("selected_token_pos", value=[0, 1, 1]), "ascending"),
    (put("selected_token_pos", value=[-1, 0]), "out of range"),
    (put("selected_token_pos", value=[0, 999]), "out of range"),
    (put("selected_token_pos", value=[0, True]), "not integers"),
    (put("selected_token_pos", value=[0]), "unique_token_pos_count"),
    (put("surprise", value=1), "surprise is not a field"),
    (lambda record: record.pop("offset_p50"), "offset_p50 missing"),
    (lambda record: record.pop("selected_token_pos"), "selected_token_pos missing"),
]


@pytest.mark.parametrize(("edit", "complaint"), RECORD_EDITS)
def test_a_changed_record_is_found(trace_dir: Path, edit: Callable[[Record], object], complaint: str) -> None:
    shard = trace_dir / "trace_steps_0_2.jsonl"
    change(shard, 6, edit)
    with pytest.raises(InputError, match=complaint) as error:
        validate(trace_dir)
    assert str(shard) in error.value.message


def swap(record: Record) -> None:
    """A block of the device for one of a pool, of which other rows were selected."""
    hbm, pool = (record["kv_fetch"][name]["hit_block_ids"] for name in ("hbm", "remote_pool"))
    rows = Counter(position // BLOCK_SIZE for position in record["selected_token_pos"])
    a, b = next((a, b) for a in hbm for b in pool if rows[a] != rows[b])
    hbm[:], pool[:] = sorted({*hbm, b} - {a}), sorted({*pool, a} - {b})


def more(tier: str, figure: str, by: int = 1) -> Callable[[Record], object]:
    def edit(record: Record) -> None:
        record["kv_fetch"][tier][figure] += by

    return edit


def row_to_pool(record: Record) -> None:
    """One row less on the device, its bytes too."""
    hbm = record["kv_fetch"]["hbm"]
    hbm["bytes_read"] -= hbm["bytes_read"] // hbm["read_ops"]
    hbm["read_ops"] -= 1


TIER_EDITS = [
    (put("kv_fetch", "hbm", "bytes_read", value=5), "hbm: bytes_read is not"),
    (put("kv_fetch", "hbm", "latency_us", value=None), "hbm: a used tier lacks figures"),
    (put("kv_fetch", "remote_pool", "latency_us", value=None), "remote_pool: a used tier lacks figures"),
    (put("kv_fetch", "local_pool", "batch_size", value=0), "local_pool: a used tier lacks figures"),
    (put("kv_fetch", "local_pool", "latency_us", value=-1.0), "local_pool: a used tier lacks figures"),
    (put("kv_fetch", "local_pool", "hit_blocks", value=0), "local_pool: an unused tier has figures"),
    (put("kv_fetch", "local_pool", value=None), "local_pool: not an object"),
    (lambda record: record["kv_fetch"].pop("local_pool"), "kv_fetch holds"),
    (more("local_pool", "read_ops"), "local_pool: read_ops are not the blocks found"),
    (more("local_pool", "bytes_read", -16), "local_pool: bytes_read is not"),
    (more("hbm", "hit_blocks"), "hit_blocks are not the touched blocks"),
    (row_to_pool, "read_ops of hbm are not the|rows cannot lie in"),
    (put("kv_fetch", "hbm", "hit_block_ids", value=[]), "hbm: hit_block_ids are not hit_blocks"),
    (lambda record: record["kv_fetch"]["hbm"]["hit_block_ids"].reverse(), "hbm: hit_block_ids are not ascending"),
    (
        lambda record: record["kv_fetch"]["hbm"].update(hit_block_ids=record["kv_fetch"]["hbm"]["hit_block_ids"][1:]),
        "hbm: hit_block_ids are not hit_blocks",
    ),
    (
        lambda record: record["kv_fetch"]["remote_pool"]["hit_block_ids"].__setitem__(-1, 99),
        "hit_block_ids are not the touched ones",
    ),
    (swap, "read_ops of hbm are not the"),
]


def tiered_line(shard: Path, blocks: int = 2) -> int:
    """The first record that found some blocks in every tier."""
    records = map(json.loads, shard.read_text().splitlines())
    return next(i for i, r in enumerate(records) if all(t["hit_blocks"] >= blocks for t in r["kv_fetch"].values()))


@pytest.mark.parametrize(("edit", "complaint"), TIER_EDITS)
def test_a_changed_tier_is_found(trace_dir: Path, edit: Callable[[Record], object], complaint: str) -> None:
    shard = trace_dir / "trace_steps_2_4.jsonl"
    line = tiered_line(shard)
    change(shard, line, edit)
    with pytest.raises(InputError, match=complaint) as error:
        validate(trace_dir)
    assert f"{shard}:{line + 1}" in error.value.message


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("edit", [more("hbm", "read_ops", 40), more("hbm", "read_ops", -40), row_to_pool])
def test_rows_that_cannot_lie_on_the_device_are_found(
    tmp_path: Path, edit: Callable[[Record], object], positions: bool
) -> None:
    """Without block ids the rows of each tier are known up to a choice of blocks."""
    options = TraceConfig(store_token_pos=positions)
    run = RunDir.create(tmp_path / "run", "selfcheck", BLOCK_SIZE, sample_config(options))
    requests = sample_requests()
    write_sample(run, options, requests, sample_steps(requests))
    shard = run.trace_dir / "trace_steps_0_4.jsonl"

    def scaled(record: Record) -> None:
        edit(record)
        record["kv_fetch"]["hbm"]["bytes_read"] = record["kv_fetch"]["hbm"]["read_ops"] * ROW_BYTES

    lines = [json.loads(line)["kv_fetch"] for line in shard.read_text().splitlines()]
    whole = next(
        i for i, tiers in enumerate(lines) if not tiers["local_pool"]["hit_blocks"] + tiers["remote_pool"]["hit_blocks"]
    )
    change(shard, whole, scaled)
    with pytest.raises(InputError, match=r"selected rows cannot lie in|read_ops of hbm|lacks figures"):
        validate(run.trace_dir)


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda lines: lines[1:], "other requests|lacks a layer|counts other records|order"),
        (lambda lines: lines[:-1], "lacks a layer|counts other records"),
        (lambda lines: lines[:6] + lines[9:], "counts other records"),
        (lambda lines: [*lines, lines[-1]], "order"),
        (lambda lines: lines[::-1], "order"),
        (lambda lines: [*lines[:4], "{", *lines[4:]], "the line is damaged"),
    ],
)
def test_lost_repeated_and_mixed_up_lines_are_found(
    trace_dir: Path, edit: Callable[[list[str]], list[str]], complaint: str
) -> None:
    shard = trace_dir / "trace_steps_4_6.jsonl"
    shard.write_text("\n".join(edit(shard.read_text().splitlines())) + "\n")
    with pytest.raises(InputError, match=complaint):
        validate(trace_dir)


def test_a_lost_shard_is_found(trace_dir: Path) -> None:
    (trace_dir / "trace_steps_4_6.jsonl").unlink()
    with pytest.raises(InputError, match=r"request 4: its records are missing|request 5: its records are missing"):
        validate(trace_dir)


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (put("offsets", "p95", value=0), "offsets is"),
        (put("unique_blocks", "count", value=0), "unique_blocks is"),
        (put("touched_block_ratio", "mean", value=0.1), "touched_block_ratio is"),
        (put("prefix_hot_blocks", "4", value=[]), "prefix_hot_blocks"),
        (put("inputs", "kept", value=0), "inputs differ"),
        (lambda summary: summary.pop("offsets"), "offsets missing"),
        (lambda summary: summary.pop("kv_tiers"), "kv_tiers is missing"),
        (lambda summary: summary["kv_tiers"].pop("records"), "records missing"),
        (lambda summary: summary["kv_tiers"].pop("decode"), "kv_tiers lacks transfers or decode"),
        (put("kv_tiers", "records", "hbm", "hit_blocks", value=1), "records.hbm is not"),
        (put("kv_tiers", "records", "remote_pool", "hit_rate", value=0.5), "records.remote_pool is not"),
        (lambda summary: summary["kv_tiers"]["records"].pop("local_pool"), "records.local_pool is not"),
        (put("kv_tiers", "records", "disk", value={}), "records holds other tiers"),
        (put("kv_tiers", "transfers", "evening", value={}), "transfers holds"),
        (put("kv_tiers", "transfers", "since_resume", value=1), "transfers holds"),
        (put("kv_tiers", "transfers", "decode", "disk", value={}), "other tiers than there are"),
        (put("kv_tiers", "transfers", "decode", "hbm", "hits", value=None), "hits is None"),
        (put("kv_tiers", "transfers", "decode", "local_pool", "hits", value=1), "cold ones more than all"),
        (put("kv_tiers", "transfers", "decode", "hbm", "cold", value=-1), "counts are negative"),
        (put("kv_tiers", "transfers", "decode", "local_pool", "cold", value=0), "decode.hit_rate_without_cold is not"),
        (put("kv_tiers", "transfers", "decode", "local_pool", "bytes_read", value=7), "read_gb_s is"),
        (put("kv_tiers", "transfers", "decode", "local_pool", "bytes_written", value=7), "write_gb_s is"),
        (put("kv_tiers", "transfers", "prefill", "remote_pool", "write_gb_s", value=None), "write_gb_s is None"),
        (put("kv_tiers", "decode", "hit_rate", value=0.5), "decode.hit_rate is not"),
        (lambda summary: summary["kv_tiers"]["decode"].pop("hit_rate"), "hit_rate missing"),
    ],
)
def test_a_changed_summary_is_found(trace_dir: Path, edit: Callable[[Record], object], complaint: str) -> None:
    path = trace_dir / "summary.json"
    summary = json.loads(path.read_bytes())
    edit(summary)
    path.write_text(json.dumps(summary))
    with pytest.raises(InputError, match=complaint):
        validate(trace_dir)


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (put("records", value=1), "counts other records"),
        (put("decode_steps", value=1), "a decode step is missing"),
        (put("prefix_cached_blocks", value=30), "prefix_cache_hit|prefix_cached_blocks"),
        (put("prompt_tokens", value=1), "seq_len_current"),
        (put("latency_ms", value="3"), "latency_ms is '3'"),
        (put("request_id", value=2), "listed twice"),
        (put("kv_blocks", value=[[3, 0]]), "kv_blocks does not hold pairs"),
        (put("kv_blocks", value=[[-1, 9]]), "kv_blocks does not hold pairs"),
        (put("kv_blocks", value=[[1, 9, 2]]), "kv_blocks does not hold pairs"),
        (put("kv_blocks", value=[["1", 9]]), "kv_blocks does not hold pairs"),
        (put("kv_blocks", value=[[3, 4], [0, 4]]), "kv_blocks names a block twice"),
        (put("kv_blocks", value=[]), "kv_blocks: 0 blocks do not hold"),
    ],
)
def test_a_changed_log_is_found(trace_dir: Path, edit: Callable[[Record], object], complaint: str) -> None:
    change(trace_dir.parent / "requests.jsonl", 1, edit)
    with pytest.raises(InputError, match=complaint):
        validate(trace_dir)


def test_what_is_no_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run_meta\.json: No such file"):
        validate(tmp_path)
