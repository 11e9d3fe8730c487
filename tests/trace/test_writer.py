"""The live writer: shards, the log of finished requests, errors of its thread."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsakv.config import TraceConfig
from dsakv.errors import DsakvError
from dsakv.request import Completion, Request, Step
from dsakv.trace import selfcheck as sample
from dsakv.trace.records import sampled
from dsakv.trace.run_dir import RunDir
from dsakv.trace.size import expected_bytes
from dsakv.trace.validate import validate
from dsakv.trace.writer import TraceWriter

REQUESTS = sample.sample_requests()
PREFIX = sample.sample_prefix(REQUESTS)
INPUTS: dict[str, Any] = {"kept": len(REQUESTS), "truncated": 0, "dropped": {}}


def new_run(path: Path, options: TraceConfig) -> RunDir:
    return RunDir.create(path, "test", sample.BLOCK_SIZE, sample.sample_config(options))


def trace(path: Path, options: TraceConfig, tail: int = 0) -> RunDir:
    run = new_run(path, options)
    sample.write_sample(run, options, REQUESTS, sample.sample_steps(REQUESTS, tail))
    return run


def lines(path: Path) -> list[dict[str, Any]]:
    """What stands in the file so far; a line without its end is still being written."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def all_records(run: RunDir) -> list[dict[str, Any]]:
    shards = sorted(run.trace_dir.glob("trace_steps_*.jsonl"), key=lambda p: int(p.name.split("_")[2]))
    return [record for shard in shards for record in lines(shard)]


def writer(run: RunDir, options: TraceConfig, **changes: Any) -> TraceWriter:
    given = {"seed": 0, "requests": REQUESTS, "prefix": PREFIX, "inputs": INPUTS, **changes}
    return TraceWriter(run, options, **given)


@pytest.mark.parametrize("per_shard", [1, 2, 4, 100])
def test_a_record_stands_in_the_shard_of_its_request(tmp_path: Path, per_shard: int) -> None:
    run = trace(tmp_path / "run", TraceConfig(requests_per_shard=per_shard))
    found: dict[int, set[str]] = {}
    for shard in run.trace_dir.glob("trace_steps_*.jsonl"):
        for record in lines(shard):
            found.setdefault(record["request_id"], set()).add(shard.name)
    assert found == {
        r: {f"trace_steps_{r // per_shard * per_shard}_{r // per_shard * per_shard + per_shard}.jsonl"}
        for r in (request.request_id for request in REQUESTS if request.max_new_tokens > 1)
    }
    validate(run.trace_dir)


def test_every_decode_step_is_recorded_once_in_every_layer(tmp_path: Path) -> None:
    run = trace(tmp_path / "run", TraceConfig())
    keys = [(r["request_id"], r["step_idx"], r["layer_id"]) for r in all_records(run)]
    assert sorted(keys) == [
        (request.request_id, step, layer)
        for request in REQUESTS
        for step in range(request.max_new_tokens - 1)
        for layer in range(sample.LAYERS)
    ]


def test_a_sampled_run_is_the_whole_run_filtered(tmp_path: Path) -> None:
    whole = all_records(trace(tmp_path / "whole", TraceConfig(), tail=3))
    run = trace(tmp_path / "part", TraceConfig(sample_rate=0.4), tail=3)
    keep = sampled(
        sample.SEED, np.array([r["request_id"] for r in whole]), np.array([r["step_idx"] for r in whole]), 0.4
    )
    part = all_records(run)
    assert part == [record for record, kept in zip(whole, keep, strict=True) if kept]
    assert 0 < len(part) < len(whole)
    validate(run.trace_dir)


@pytest.mark.parametrize(
    "options",
    [
        TraceConfig(store_token_pos=False),
        TraceConfig(store_scores=True),
        TraceConfig(store_block_ids=True, store_scores=True),
        TraceConfig(store_text=True, sample_rate=0.5),
    ],
)
def test_every_option_gives_a_valid_trace(tmp_path: Path, options: TraceConfig) -> None:
    report = validate(trace(tmp_path / "run", options).trace_dir)
    assert report.requests == len(REQUESTS)
    assert report.records > 0


def test_long_lists_come_last(tmp_path: Path) -> None:
    record = all_records(trace(tmp_path / "run", TraceConfig(store_block_ids=True)))[0]
    assert list(record)[:3] == ["event", "request_id", "layer_id"]
    assert list(record)[-2:] == ["selected_block_ids", "selected_token_pos"]


def test_requests_jsonl(tmp_path: Path) -> None:
    options = TraceConfig(store_text=True)
    request = Request(
        5,
        [1, 2, 3],
        2,
        "id-5",
        prompt="abc",
        truncated_tokens=4,
        answers=("a",),
        needle_spans=((0, 2),),
        metadata={"task": "niah"},
    )
    done = Completion(5, 3, [7], "stop", 0, 1.0, 2.0, 3.0, None, 4.0, kv_blocks=[4, 5, 6, 2, 1, 8, 9])
    run = new_run(tmp_path / "run", options)
    with writer(
        run, options, requests=[request], prefix={5: PREFIX[0]}, text=lambda c: f"<{c.token_ids}>", score=lambda c: 0.5
    ) as live:
        live.write(Step(0, "prefill", 1, [(5, 7)], 3, [done], None))
    assert lines(run.requests_path) == [
        {
            "request_id": 5,
            "source_id": "id-5",
            "prompt_tokens": 3,
            "completion_tokens": 1,
            "decode_steps": 0,
            "records": 0,
            "finish_reason": "stop",
            "truncated": True,
            "truncated_tokens": 4,
            "arrival_ms": 1.0,
            "queue_ms": 2.0,
            "ttft_ms": 3.0,
            "tpot_ms": None,
            "latency_ms": 4.0,
            "forced": False,
            "cached_tokens": 0,
            "prefix_cache_hit": False,
            "prefix_cached_blocks": 0,
            "prefix_key": PREFIX[0].prefix_key,
            "prefix_owners": [],
            "kv_blocks": [[4, 3], [2, 1], [1, 1], [8, 2]],
            "score": 0.5,
            "needle_spans": [[0, 2]],
            "metadata": {"task": "niah"},
            "prompt": "abc",
            "completion": "<[7]>",
            "answers": ["a"],
            "prompt_token_ids": [1, 2, 3],
            "completion_token_ids": [7],
        }
    ]


def test_a_request_is_logged_after_its_records(tmp_path: Path) -> None:
    options = TraceConfig()
    run = new_run(tmp_path / "run", options)
    written = {request.request_id: 0 for request in REQUESTS}
    with writer(run, options) as live:
        for step in sample.sample_steps(REQUESTS):
            live.write(step)
            for entry in lines(run.requests_path) if run.requests_path.exists() else []:
                if not written[entry["request_id"]]:
                    mine = [r for r in all_records(run) if r["request_id"] == entry["request_id"]]
                    assert len(mine) == entry["records"]
                    written[entry["request_id"]] = 1
    assert len(lines(run.requests_path)) == len(REQUESTS)


def test_leaving_by_an_error_keeps_what_was_written(tmp_path: Path) -> None:
    options = TraceConfig()
    run = new_run(tmp_path / "run", options)
    run.write_meta(dataset="test", model={}, seed=0, options=options, inputs=INPUTS)
    with pytest.raises(KeyboardInterrupt), writer(run, options) as live:  # noqa: PT012
        for step in sample.sample_steps(REQUESTS):
            if step.index == 9:
                raise KeyboardInterrupt
            live.write(step)
    report = validate(run.trace_dir)
    assert 0 < report.requests < len(REQUESTS)
    assert (run.trace_dir / "summary.json").exists()


def test_an_error_of_the_thread_reaches_the_next_write(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", TraceConfig())
    steps = list(sample.sample_steps(REQUESTS))
    known = [request for request in REQUESTS if request.request_id != 1]
    with pytest.raises(ValueError, match="unknown requests"), writer(run, TraceConfig(), requests=known) as live:  # noqa: PT012
        for step in steps * 100:
            live.write(step)
    assert not (run.trace_dir / "summary.json").exists()


def test_an_error_in_the_last_step_reaches_close(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", TraceConfig())
    live = writer(run, TraceConfig())
    live.__enter__()
    step = next(step for step in sample.sample_steps(REQUESTS) if step.records is not None)
    assert step.records is not None
    live.write(replace(step, records=replace(step.records, positions=step.records.positions + 1000)))
    with pytest.raises(ValueError, match="not ascending"):
        live.close()
    with pytest.raises(ValueError, match="not ascending"):
        live.write(step)


def test_a_step_that_was_not_handed_over_is_noticed(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", TraceConfig())
    live = writer(run, TraceConfig())
    live.__enter__()
    for step in sample.sample_steps(REQUESTS[:1]):
        if step.index != 2:
            live.write(step)
    with pytest.raises(ValueError, match="request 0 ran 3 decode steps, but 2 were traced"):
        live.close()


def test_a_full_disk_says_what_is_complete_and_how_to_go_on(tmp_path: Path) -> None:
    options = TraceConfig(requests_per_shard=2)
    run = new_run(tmp_path / "run", options)
    (run.trace_dir / "trace_steps_4_6.jsonl").symlink_to("/dev/full")
    with pytest.raises(DsakvError, match=r"the disk is full: cannot write .*trace_steps_4_6\.jsonl") as error:
        sample.write_sample(run, options, REQUESTS, sample.sample_steps(REQUESTS))
    complete = len(lines(run.requests_path))
    assert 0 < complete < len(REQUESTS)
    assert f"{complete} of {len(REQUESTS)} requests are complete" in error.value.hint
    assert f"--resume --trace-out {run.path}" in error.value.hint
    assert error.value.exit_code == 1


@pytest.mark.parametrize(
    "options",
    [
        TraceConfig(),
        TraceConfig(store_scores=True),
        TraceConfig(store_block_ids=True),
        TraceConfig(store_token_pos=False, store_text=True),
        TraceConfig(format="parquet"),
        TraceConfig(format="parquet", store_scores=True, store_block_ids=True),
    ],
)
def test_the_expected_size_is_about_right(tmp_path: Path, options: TraceConfig) -> None:
    run = trace(tmp_path / "run", options)
    real = sum(path.stat().st_size for path in (run.requests_path, *run.trace_dir.glob("trace_steps_*")))
    expected = expected_bytes(REQUESTS, sample.LAYERS, sample.TOPK, sample.BLOCK_SIZE, options)
    assert expected == pytest.approx(real, rel=0.2)
