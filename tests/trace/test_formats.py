"""Every format of :data:`FORMATS`: the same facts as the JSON lines, whole files whatever happens, resumable."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsakv.config import TraceConfig
from dsakv.errors import DsakvError, InputError
from dsakv.trace import selfcheck as sample
from dsakv.trace import writer as writer_module
from dsakv.trace.formats import FORMATS, format_of, read_records, shard_paths
from dsakv.trace.parquet_format import ParquetShard
from dsakv.trace.run_dir import RunDir
from dsakv.trace.summary import summarize
from dsakv.trace.validate import validate
from dsakv.trace.writer import TraceWriter

REQUESTS = sample.sample_requests()
PREFIX = sample.sample_prefix(REQUESTS)
INPUTS: dict[str, Any] = {"kept": len(REQUESTS), "truncated": 0, "dropped": {}}
OPTIONS = [
    {"requests_per_shard": 2},
    {"requests_per_shard": 3, "store_scores": True, "prefill_tail": 2},
    {"store_block_ids": True, "sample_rate": 0.6},
    {"requests_per_shard": 1, "store_token_pos": False, "store_text": True},
]
formats = pytest.mark.parametrize("name", FORMATS)


def config(name: str, **options: Any) -> TraceConfig:
    return TraceConfig(format=name, **options)  # type: ignore[arg-type]


def trace(path: Path, options: TraceConfig) -> RunDir:
    run = RunDir.create(path, "test", sample.BLOCK_SIZE, sample.sample_config(options))
    sample.write_sample(run, options, REQUESTS, sample.sample_steps(REQUESTS, options.prefill_tail))
    return run


def as_float32(record: dict[str, Any]) -> dict[str, Any]:
    """Scores are float32 in every format, but JSON writes them as short decimals."""
    scores = record.pop("scores_topk", None) or list(record.pop("scores_stats").values())
    return record | {"scores": np.array(scores, dtype=np.float32).tolist()}


def records(run: RunDir) -> dict[str, list[Any]]:
    return {
        shard.name.split(".")[0]: [as_float32(record) for _, record in read_records(shard)]
        for shard in shard_paths(run.trace_dir)
    }


@formats
@pytest.mark.parametrize("options", OPTIONS)
def test_every_format_holds_the_facts_of_the_json_lines(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    lines = trace(tmp_path / "lines", config("jsonl", **options))
    other = trace(tmp_path / "other", config(name, **options))
    assert records(other) == records(lines)
    for shard in other.trace_dir.glob("trace_steps_*"):
        assert shard.suffix == FORMATS[name].suffix
    assert (other.trace_dir / "summary.json").read_bytes() == (lines.trace_dir / "summary.json").read_bytes()
    report = validate(other.trace_dir)
    assert report.checks == validate(lines.trace_dir).checks
    if options.get("store_token_pos", True):
        written = json.loads((other.trace_dir / "summary.json").read_bytes())
        assert all(tier["hit_blocks"] for tier in written["kv_tiers"]["records"].values())
        del written["kv_tiers"]["transfers"], written["kv_tiers"]["decode"]  # records do not tell
        assert summarize(other.trace_dir) == written
    assert not list(other.path.rglob("*tmp"))


@formats
def test_places_and_fields(tmp_path: Path, name: str) -> None:
    run = trace(tmp_path / "run", config(name))
    shard = shard_paths(run.trace_dir)[0]
    places = [place for place, _ in read_records(shard)]
    assert places == [f"{shard}:{row}" for row in range(1, len(places) + 1)]
    asked = ("request_id", "no_such_field")
    assert [r["request_id"] for _, r in read_records(shard, asked)] == [r["request_id"] for _, r in read_records(shard)]


@formats
def test_keep_drops_other_requests_and_open_adds_to_what_is_there(tmp_path: Path, name: str) -> None:
    options = config(name)
    run = trace(tmp_path / "run", options)
    shard = shard_paths(run.trace_dir)[0]
    before = [record for _, record in read_records(shard)]
    own = format_of(shard)
    own.keep(shard, {1, 3})
    kept = [record for _, record in read_records(shard)]
    assert kept == [record for record in before if record["request_id"] in (1, 3)]
    assert own.complete(shard)
    content = shard.read_bytes()
    own.open(shard, options).discard()
    assert [record for _, record in read_records(shard)] == kept
    own.open(shard, options).close()
    assert [record for _, record in read_records(shard)] == kept
    own.keep(shard, set())
    assert list(read_records(shard)) == []
    assert content
    assert not list(run.path.rglob("*tmp"))


def test_columns_that_parquet_cannot_write_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError):
        ParquetShard(tmp_path / "t.parquet", pa.schema([("a", pa.month_day_nano_interval())]))
    assert not list(tmp_path.iterdir())


@formats
def test_what_cannot_be_encoded_stops_the_run(tmp_path: Path, name: str) -> None:
    """An error that is not the disk's, in the middle of a shard: what was complete stays."""
    options = config(name, requests_per_shard=1)
    run = RunDir.create(tmp_path / "run", "test", sample.BLOCK_SIZE, sample.sample_config(options))
    run.write_meta(dataset="test", model={}, seed=0, options=options, inputs=INPUTS)
    writer = TraceWriter(run, options, seed=0, requests=REQUESTS, prefix=PREFIX, inputs=INPUTS)
    steps = list(sample.sample_steps(REQUESTS))
    records = steps[12].records
    assert records is not None
    steps[12] = replace(steps[12], records=replace(records, positions=records.positions - 1))
    with pytest.raises(ValueError, match="not ascending"), writer:  # noqa: PT012
        for step in steps:
            writer.write(step)
    assert 0 < validate(run.trace_dir).requests < len(REQUESTS)
    assert not list(run.path.rglob("*tmp"))


@formats
def test_leaving_by_an_error_leaves_whole_files(tmp_path: Path, name: str) -> None:
    options = config(name, requests_per_shard=3)
    run = RunDir.create(tmp_path / "run", "test", sample.BLOCK_SIZE, sample.sample_config(options))
    run.write_meta(dataset="test", model={}, seed=0, options=options, inputs=INPUTS)
    writer = TraceWriter(run, options, seed=0, requests=REQUESTS, prefix=PREFIX, inputs=INPUTS)
    with pytest.raises(KeyboardInterrupt), writer:  # noqa: PT012
        for step in sample.sample_steps(REQUESTS):
            if step.index == 12:
                raise KeyboardInterrupt
            writer.write(step)
    report = validate(run.trace_dir)
    assert 0 < report.requests < len(REQUESTS)
    resumed = RunDir.resume(run.path, sample.BLOCK_SIZE, sample.sample_config(options))
    assert len(resumed.finished) == report.requests
    assert not list(run.path.rglob("*tmp"))


@formats
def test_what_open_shards_hold_in_memory_is_bounded(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "HELD_BYTES", 10_000)
    run = trace(tmp_path / "run", config(name))
    monkeypatch.undo()
    assert records(run) == records(trace(tmp_path / "other", config("jsonl")))


def write_until_it_fails(path: str, name: str, limit: int) -> None:
    """Write a trace in a process whose files may not grow beyond ``limit`` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        trace(Path(path), config(name, requests_per_shard=3))
    except DsakvError as error:
        sys.exit(f"{error.message}; {error.hint}")


@formats
@pytest.mark.parametrize("limit", [5_000, 11_000])
def test_a_write_that_fails_stops_the_run_and_leaves_what_can_go_on(tmp_path: Path, name: str, limit: int) -> None:
    code = (
        "import signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from tests.trace import test_formats as t;"
        "t.write_until_it_fails(sys.argv[1], sys.argv[2], int(sys.argv[3]))"
    )
    out = tmp_path / "run"
    ran = subprocess.run(
        [sys.executable, "-c", code, str(out), name, str(limit)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert ran.returncode == 1
    assert "cannot write" in ran.stderr
    assert "File too large" in ran.stderr
    assert not list(out.rglob("*tmp"))
    options = config(name, requests_per_shard=3)
    run = RunDir.resume(out, sample.BLOCK_SIZE, sample.sample_config(options))
    assert f"{len(run.finished)} of {len(REQUESTS)} requests are complete" in ran.stderr
    unfinished = [request for request in REQUESTS if request.request_id not in run.finished]
    sample.write_sample(run, options, REQUESTS, sample.sample_steps(unfinished))
    validate(run.trace_dir)
    assert by_request(run) == by_request(trace(tmp_path / "whole", config("jsonl", requests_per_shard=3)))


def by_request(run: RunDir) -> dict[int, list[Any]]:
    """Records by request, without what depends on the requests that ran beside it."""
    found: dict[int, list[Any]] = defaultdict(list)
    for shard, own in records(run).items():
        for record in own:
            del record["engine_step"]
            for tier in record["kv_fetch"].values():
                del tier["batch_size"]
            found[record["request_id"]].append((shard, record))
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return trace(tmp_path_factory.mktemp("whole") / "run", config("parquet", requests_per_shard=3))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_killed_parquet_run_loses_open_shards_and_traces_their_requests_again(
    whole: RunDir, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Stopped anywhere, so that shards are half-done; then some of them lost while the log still declares them."""
    options = config("parquet", requests_per_shard=3)
    stored = sample.sample_config(options)
    run = RunDir.create(tmp_path_factory.mktemp("killed") / "run", "test", sample.BLOCK_SIZE, stored)
    steps = list(sample.sample_steps(REQUESTS))
    some = steps[: data.draw(st.integers(0, len(steps)))]
    sample.write_sample(run, options, REQUESTS, some)
    log = run.requests_path.read_bytes()
    run.requests_path.write_bytes(log[: data.draw(st.one_of(st.just(len(log)), st.integers(0, len(log))))])
    for start in (0, 3, 6):
        shard = run.trace_dir / f"trace_steps_{start}_{start + 3}.parquet"
        if data.draw(st.booleans()):
            shard.unlink(missing_ok=True)
        (run.trace_dir / f".{shard.name}.1.dsakv-tmp").write_bytes(b"PAR1")

    resumed = RunDir.resume(run.path, sample.BLOCK_SIZE, stored)
    assert RunDir.resume(run.path, sample.BLOCK_SIZE, stored) == resumed  # nothing is left to repair
    assert not list(run.path.rglob("*tmp"))
    unfinished = [request for request in REQUESTS if request.request_id not in resumed.finished]
    sample.write_sample(resumed, options, REQUESTS, sample.sample_steps(unfinished))
    assert by_request(resumed) == by_request(whole)
    validate(resumed.trace_dir)


@formats
def test_a_damaged_shard_is_named_when_a_run_goes_on(tmp_path: Path, name: str) -> None:
    options = config(name)
    run = trace(tmp_path / "run", options)
    shard = shard_paths(run.trace_dir)[0]
    content = bytearray(shard.read_bytes())
    content[10] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(InputError) as caught:
        RunDir.resume(run.path, sample.BLOCK_SIZE, sample.sample_config(options))
    assert str(shard) in caught.value.message
    assert shard.read_bytes() == content
    assert os.path.exists(run.requests_path)
