"""Summary: histograms against sorted lists, live against rebuilt, parts against the whole."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsakv.config import TraceConfig
from dsakv.errors import InputError
from dsakv.trace import selfcheck as sample
from dsakv.trace.records import derive, to_batch
from dsakv.trace.run_dir import RunDir
from dsakv.trace.summary import Histogram, Summary, summarize

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
    assert summarize(run.trace_dir) == written
    assert written["inputs"] == {"kept": len(REQUESTS), "truncated": 0, "dropped": {"empty": 1}}
    assert any(written["prefix_hot_blocks"].values())


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
