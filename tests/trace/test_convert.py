"""Copies as Parquet: the same records and figures, old layouts included; all of it or nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsakv.analysis.run import analyze_trace
from dsakv.config import AnalyzeConfig, TraceConfig
from dsakv.errors import DsakvError, InputError
from dsakv.trace import selfcheck as sample
from dsakv.trace.convert import to_parquet
from dsakv.trace.formats import read_records
from dsakv.trace.open import find_traces
from dsakv.trace.run_dir import RunDir
from dsakv.trace.summary import summarize
from dsakv.trace.validate import validate

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

REQUESTS = sample.sample_requests()
OLD: dict[str, Any] = {
    "request_id": "req-b",
    "layer_id": 0,
    "step_idx": 0,
    "seq_len_current": 10,
    "selected_token_pos": [9, 1, 4],
}


def convert(root: Path, target: Path) -> list[str]:
    """Convert what is in ``root``; returns the warnings."""
    said: list[str] = []
    read: list[int] = []
    to_parquet(find_traces(root), root, target, said.append, read.append)
    assert sum(read) == sum(shard.stat().st_size for trace in find_traces(root) for shard in trace.shards)
    return said


def trace(path: Path, options: TraceConfig) -> RunDir:
    run = RunDir.create(path, "test", sample.BLOCK_SIZE, sample.sample_config(options))
    sample.write_sample(run, options, REQUESTS, sample.sample_steps(REQUESTS, options.prefill_tail))
    return run


def records(folder: Path) -> list[list[dict[str, Any]]]:
    (found,) = find_traces(folder)
    return [[with_float32(record) for _, record in read_records(shard)] for shard in found.shards]


def with_float32(record: dict[str, Any]) -> dict[str, Any]:
    for name in ("scores_topk", "scores_stats"):
        if record.get(name) is not None:
            scores = record[name].values() if name == "scores_stats" else record[name]
            record[name] = np.array(list(scores), dtype=np.float32).tolist()
    return record


def lines(path: Path, *records: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def figures(folder: Path, **options: Any) -> list[dict[str, Any]]:
    (found,) = find_traces(folder)
    results = analyze_trace(found, AnalyzeConfig(block_size=16, workers=1, **options), lambda done: None)
    for result in results:
        for name in ("trace_dir", "run_meta"):
            del result[name]
        del result["input"]["bytes"]
    return results


@pytest.mark.parametrize(
    "options",
    [
        TraceConfig(requests_per_shard=2, prefill_tail=2),
        TraceConfig(store_scores=True, store_block_ids=True),
        TraceConfig(format="parquet", requests_per_shard=3),
    ],
)
def test_a_copy_is_the_same_trace(tmp_path: Path, options: TraceConfig) -> None:
    run = trace(tmp_path / "run", options)
    assert convert(run.path, tmp_path / "copy") == []
    copy = tmp_path / "copy" / "block16"
    assert records(copy) == records(run.trace_dir)
    assert validate(copy).checks == validate(run.trace_dir).checks
    assert summarize(copy) == summarize(run.trace_dir)
    assert figures(copy) == figures(run.trace_dir)
    assert figures(copy, step_union=True) == figures(run.trace_dir, step_union=True)
    for name in ("requests.jsonl", "block16/summary.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (run.path / name).read_bytes()
    meta = json.loads((copy / "run_meta.json").read_bytes())
    assert meta["trace"]["format"] == "parquet"
    assert sorted(path.suffix for path in copy.glob("trace_steps*")) == [".parquet"] * len(find_traces(copy)[0].shards)


def test_compressed_lines_are_copied_too(tmp_path: Path) -> None:
    run = trace(tmp_path / "run", TraceConfig(requests_per_shard=2))
    expected = records(run.trace_dir)
    for shard in run.trace_dir.glob("trace_steps*"):
        shard.with_name(f"{shard.name}.zst").write_bytes(zstd.compress(shard.read_bytes()))
        shard.unlink()
    assert convert(run.path, tmp_path / "copy") == []
    assert records(tmp_path / "copy" / "block16") == expected
    validate(tmp_path / "copy" / "block16")


def test_an_interrupted_run_can_go_on_in_its_copy(tmp_path: Path) -> None:
    options = TraceConfig(requests_per_shard=3)
    run = RunDir.create(tmp_path / "run", "test", sample.BLOCK_SIZE, sample.sample_config(options))
    steps = list(sample.sample_steps(REQUESTS))
    sample.write_sample(run, options, REQUESTS, steps[:9])
    convert(run.path, tmp_path / "copy")
    new = TraceConfig(requests_per_shard=3, format="parquet")
    resumed = RunDir.resume(tmp_path / "copy", sample.BLOCK_SIZE, sample.sample_config(new))
    assert resumed.finished
    waiting = [request for request in REQUESTS if request.request_id not in resumed.finished]
    sample.write_sample(resumed, new, REQUESTS, sample.sample_steps(waiting))
    assert validate(resumed.trace_dir).requests == len(REQUESTS)


def test_paths_are_kept_for_runs_a_run_and_a_trace(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    for name in ("a", "b"):
        trace(root / name, TraceConfig())
    lines(root / "old" / "trace_steps.jsonl", OLD)
    (root / "requests.jsonl").write_text("{}")  # of no run
    convert(root, tmp_path / "all")
    assert {path.relative_to(tmp_path / "all").as_posix() for path in (tmp_path / "all").rglob("*.*")} == {
        *(f"{run}/{name}" for run in "ab" for name in ("config.json", "requests.jsonl")),
        *(
            f"{run}/block16/{name}"
            for run in "ab"
            for name in ("run_meta.json", "summary.json", "trace_steps_0_4.parquet", "trace_steps_4_8.parquet")
        ),
        "old/trace_steps.parquet",
    }
    convert(root / "a" / "block16", tmp_path / "one")
    assert (tmp_path / "one" / "config.json").exists()
    assert (tmp_path / "one" / "block16" / "run_meta.json").exists()
    convert(root / "old", tmp_path / "flat")
    assert [path.name for path in (tmp_path / "flat").rglob("*.*")] == ["trace_steps.parquet"]


def test_old_layouts(tmp_path: Path) -> None:
    """String ids, selections in any order with their scores, later fields missing, others unknown."""
    lines(
        tmp_path / "in" / "trace_steps_0_4.jsonl",
        {**OLD, "extra": 1, "scores_topk": [9.5, 1.5, 4.5]},
        {**OLD, "request_id": "req-a", "prefix": {"prefix_key": "k", "age": 3}, "kv_fetch": {"hbm": {"latency_us": 7}}},
        {**OLD, "step_idx": 1, "extra": 2, "unique_blocks": 3},
        {**{k: v for k, v in OLD.items() if k != "selected_token_pos"}, "step_idx": 2},
    )
    with (tmp_path / "in" / "trace_steps_0_4.jsonl").open("a") as file:
        file.write('{"request')
    said = convert(tmp_path / "in", tmp_path / "out")
    assert said == [
        f"{tmp_path}/in: trace_steps_0_4.jsonl:5: an unfinished last line was dropped",
        f"{tmp_path}/in: fields that have no column are left out: extra, prefix.age",
    ]
    ((first, second, third, fourth),) = records(tmp_path / "out" / "in")
    assert first["selected_token_pos"] == second["selected_token_pos"] == [1, 4, 9]
    assert first["scores_topk"] == [1.5, 4.5, 9.5]
    assert [r["request_id"] for r in (first, second, third, fourth)] == ["req-b", "req-a", "req-b", "req-b"]
    assert (second["prefix"], second["kv_fetch"]) == ({"prefix_key": "k"}, {"hbm": {"latency_us": 7.0}})
    assert (third["unique_blocks"], third["prefix"], third["scores_topk"]) == (3, None, None)
    assert fourth["selected_token_pos"] == []
    expected, found = figures(tmp_path / "in"), figures(tmp_path / "out" / "in")
    for result in (*expected, *found):
        del result["warnings"], result["input"]["unfinished_last_lines"]
    assert found == expected
    assert found[0]["input"]["records_without_positions"] == 1


def test_a_trace_without_records_or_positions(tmp_path: Path) -> None:
    lines(tmp_path / "in" / "a" / "trace_steps.jsonl")
    lines(tmp_path / "in" / "b" / "trace_steps.jsonl", {k: v for k, v in OLD.items() if k != "selected_token_pos"})
    convert(tmp_path / "in", tmp_path / "out")
    assert records(tmp_path / "out" / "a") == [[]]
    with pytest.raises(InputError, match="none of the 1 records"):
        figures(tmp_path / "out" / "b")


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"selected_token_pos": [10]}, ":2: bad record: position 10"),
        ({"layer_id": 1.0}, ':2: bad record: "layer_id" is 1.0'),
        ({"step_idx": 0}, "has been there before"),
        ({"block_size_tokens": 0}, '"block_size_tokens" is 0'),
        ({"unique_blocks": 2.0}, ':2: bad record: "unique_blocks" is 2.0, which a column of int64 cannot hold'),
        ({"engine_step": True}, '"engine_step" is true'),
        ({"offset_min": 2**70}, '"offset_min" is'),
        ({"kv_fetch": {"hbm": {"hit_block_ids": [1, "2"]}}}, '"kv_fetch.hbm.hit_block_ids" is [1,"2"]'),
        ({"prefix": []}, '"prefix" is [], not an object'),
    ],
)
def test_a_bad_record_leaves_nothing(tmp_path: Path, bad: dict[str, Any], says: str) -> None:
    source = lines(tmp_path / "in" / "trace_steps.jsonl", OLD, {**OLD, "step_idx": 1, **bad})
    with pytest.raises(InputError) as caught:
        convert(tmp_path / "in", tmp_path / "out")
    assert str(source) in caught.value.message
    assert says in caught.value.message
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


@pytest.mark.parametrize("make", [lambda p: p.write_text("mine"), lambda p: (p.mkdir(), (p / "a").touch())])
def test_nothing_is_overwritten(tmp_path: Path, make: Callable[[Path], object]) -> None:
    lines(tmp_path / "in" / "trace_steps.jsonl", OLD)
    make(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DsakvError, match="out exists already"):
        convert(tmp_path / "in", tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "in", tmp_path / "empty")
    assert records(tmp_path / "empty")


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    lines(tmp_path / "in" / "trace_steps.jsonl", OLD)
    (tmp_path / "file").touch()
    with pytest.raises(DsakvError, match="cannot write"):
        convert(tmp_path / "in", tmp_path / "file" / "out")
