"""Summary: histograms against sorted lists, live against rebuilt, parts against the whole."""

import json
import math
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsakv.config import TraceConfig
from dsakv.errors import InputError
from dsakv.request import Step, TierTraffic
from dsakv.trace import selfcheck as sample
from dsakv.trace.records import derive, to_batch
from dsakv.trace.run_dir import RunDir
from dsakv.trace.summary import Histogram, Summary, summarize
from dsakv.trace.tiers import Traffic, decode_hit_rates
from dsakv.trace.validate import validate

REQUESTS = sample.sample_requests()
PREFIX = sample.sample_prefix(REQUESTS)
BIG = st.integers(0, 3000)


def trace(path: Path, options: TraceConfig) -> RunDir:
    run = RunDir.create(path, "test", sample.BLOCK_SIZE, sample.sample_config(options))
    sample.write_sample(run, options, REQUESTS, sample.sample_steps(REQUESTS, options.prefill_tail))
    return run


def histogram(parts: list[list[int]]) -> Histogram:
    counted = Histogram()
    for part in parts:
        counted.add(np.array(part, dtype=np.int64))
    return counted


@given(parts=st.lists(st.lists(BIG, max_size=40), max_size=5), scale=st.sampled_from([1, 1000]))
def test_a_histogram_has_the_figures_of_the_sorted_values(parts: list[list[int]], scale: int) -> None:
    found = histogram(parts).distribution(scale)
    values = sorted(value / scale for part in parts for value in part)
    n = len(values)
    if n == 0:
        assert found == {"count": 0, "min": None, "p50": None, "p95": None, "max": None, "mean": None}
        return
    assert math.isclose(found.pop("mean"), math.fsum(values) / n, rel_tol=1e-12)
    ranks = {"min": 0, "p50": round((n - 1) * 0.5), "p95": round((n - 1) * 0.95), "max": n - 1}
    assert found == {"count": n, **{name: values[rank] for name, rank in ranks.items()}}


@pytest.mark.parametrize("options", [TraceConfig(), TraceConfig(sample_rate=0.5, prefill_tail=4, requests_per_shard=2)])
def test_the_shards_give_the_summary_again(tmp_path: Path, options: TraceConfig) -> None:
    run = trace(tmp_path / "run", options)
    written = json.loads((run.trace_dir / "summary.json").read_bytes())
    assert written["kv_tiers"].keys() == {"records", "transfers", "decode"}
    del written["kv_tiers"]["transfers"], written["kv_tiers"]["decode"]  # records do not tell
    assert summarize(run.trace_dir) == written
    assert written["inputs"] == {"kept": len(REQUESTS), "truncated": 0, "dropped": {"empty": 1}}
    assert any(written["prefix_hot_blocks"].values())


def on_the_device() -> list[Step]:
    """The steps, as if no tiers were in use."""
    steps = []
    for step in sample.sample_steps(REQUESTS):
        records = step.records
        if records is not None:
            elsewhere = np.array([0.0, np.nan, np.nan]).reshape(-1, 1, 1)
            fetch_us = np.nan_to_num(records.fetch_us) + elsewhere
            fetch_batch = np.ones(fetch_us.shape, dtype=np.int64) * ~np.isnan(fetch_us)
            records = replace(records, found=None, fetch_us=fetch_us, fetch_batch=fetch_batch)
        steps.append(replace(step, records=records, traffic={}))
    return steps


def test_a_run_without_tiers_says_nothing_of_them(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", "test", sample.BLOCK_SIZE, sample.sample_config(TraceConfig()))
    sample.write_sample(run, TraceConfig(), REQUESTS, on_the_device())
    written = json.loads((run.trace_dir / "summary.json").read_bytes())
    assert "kv_tiers" not in written
    assert summarize(run.trace_dir) == written
    validate(run.trace_dir)
    meta = run.trace_dir / "run_meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"kv_tiers": {}}))  # in use, and nothing left the device
    shares = {name: tier["hit_rate"] for name, tier in summarize(run.trace_dir)["kv_tiers"]["records"].items()}
    assert shares == {"hbm": 1.0, "local_pool": 0.0, "remote_pool": 0.0}


def test_what_moved_is_the_sum_over_all_steps(tmp_path: Path) -> None:
    options = TraceConfig(sample_rate=0.3)
    run = trace(tmp_path / "run", options)
    found = json.loads((run.trace_dir / "summary.json").read_bytes())["kv_tiers"]
    sums: dict[str, dict[str, Counter[str]]] = {}
    for step in sample.sample_steps(REQUESTS):
        for (when, tier), moved in step.traffic.items():
            sums.setdefault(when, {}).setdefault(tier, Counter()).update(asdict(moved))
    assert {phase: tiers.keys() for phase, tiers in found["transfers"].items()} == {
        p: t.keys() for p, t in sums.items()
    }
    for phase, tiers in sums.items():
        for tier, total in tiers.items():
            figures = found["transfers"][phase][tier]
            for verb, size in (("read", "bytes_read"), ("write", "bytes_written")):
                us = total.pop(f"{verb}_us")
                assert figures.pop(f"{verb}_ms") == pytest.approx(us / 1e3)
                assert figures.pop(f"{verb}_gb_s") == (pytest.approx(total[size] / us / 1e3) if us else None)
            assert figures == total
    decode = sums["decode"]
    hits, cold = (sum(tier[name] for tier in decode.values()) for name in ("hits", "cold"))
    assert found["decode"] == {
        "hit_rate": decode["hbm"]["hits"] / hits,
        "hit_rate_without_cold": decode["hbm"]["hits"] / (hits - cold),
    }


def test_rates_of_nothing_are_none() -> None:
    traffic = Traffic()
    traffic.add({("decode", "hbm"): TierTraffic(hits=2, cold=2), ("warm_up", "local_pool"): TierTraffic(writes=1)})
    transfers = traffic.transfers()
    assert list(transfers) == ["warm_up", "decode"]
    assert transfers["decode"]["hbm"]["read_gb_s"] is None
    assert transfers["warm_up"]["local_pool"]["write_gb_s"] is None
    assert decode_hit_rates(transfers) == {"hit_rate": 1.0, "hit_rate_without_cold": None}
    assert decode_hit_rates({}) == {"hit_rate": None, "hit_rate_without_cold": None}


def test_the_hottest_blocks_come_first_and_ties_by_id() -> None:
    steps = [step for step in sample.sample_steps(REQUESTS) if step.records is not None]
    batch = to_batch(steps, seed=0)
    assert batch is not None
    derived = derive(batch, 2, np.full(len(batch), 1000))
    summary = Summary()
    summary.add(batch, derived)
    hot = summary.to_dict({})["prefix_hot_blocks"]["3"]
    rows = np.flatnonzero(batch.request_id == 3)
    touched = [set((batch.positions[batch.offsets[r] : batch.offsets[r + 1]] // 2).tolist()) for r in rows]
    counts = {block: sum(block in one for one in touched) for block in set().union(*touched)}
    best = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:20]
    assert hot == [{"block_id": block, "touches": n} for block, n in best]


def test_a_trace_without_positions_cannot_be_summarized_again(tmp_path: Path) -> None:
    run = trace(tmp_path / "run", TraceConfig(store_token_pos=False))
    assert json.loads((run.trace_dir / "summary.json").read_bytes())["offsets"]["count"] > 0
    with pytest.raises(InputError, match=r"trace_steps_0_4\.jsonl:1: the record holds no positions"):
        summarize(run.trace_dir)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    run = trace(tmp_path / "run", TraceConfig())
    shard = run.trace_dir / "trace_steps_0_4.jsonl"
    lines = shard.read_text().splitlines(keepends=True)
    lines[2] = '{"request_id": 1}\n'
    shard.write_text("".join(lines))
    with pytest.raises(InputError, match=r"trace_steps_0_4\.jsonl:3: the record holds no positions"):
        summarize(run.trace_dir)
    lines[2] = "nonsense\n"
    shard.write_text("".join(lines))
    with pytest.raises(InputError, match=r"trace_steps_0_4\.jsonl:3: the line is damaged"):
        summarize(run.trace_dir)
    with pytest.raises(InputError, match=r"run_meta\.json is missing"):
        summarize(tmp_path)
