from __future__ import annotations

import io
import os
from pathlib import Path

import msgspec
import orjson
import pytest

from dsakv.config import AnalyzeConfig
from dsakv.console import Console
from dsakv.errors import DsakvError, InputError
from dsakv.jobs.analyze import analyze


def make_run(run: Path, block_size: int = 64, requests: int = 2) -> Path:
    trace = run / f"block{block_size}"
    trace.mkdir(parents=True)
    (trace / "run_meta.json").write_bytes(orjson.dumps({"block_size_tokens": block_size}))
    for request in range(requests):
        lines = [
            orjson.dumps(
                {
                    "request_id": request,
                    "layer_id": 0,
                    "step_idx": step,
                    "seq_len_current": 200,
                    "selected_token_pos": [step, 150],
                }
            )
            for step in range(3)
        ]
        (trace / f"trace_steps_{request}_{request + 1}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return trace


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def console(log: io.StringIO) -> Console:
    return Console(io.StringIO(), log)


def test_results_land_in_the_first_trace_directory_and_say_what_was_returned(
    tmp_path: Path, console: Console, log: io.StringIO
) -> None:
    first = make_run(tmp_path / "run_a", 16)
    make_run(tmp_path / "run_b")
    outcome = analyze(AnalyzeConfig(input=str(tmp_path), report=str(tmp_path / "new" / "r.html")), console)
    assert outcome.out == first / "analysis.json"
    assert orjson.loads(outcome.out.read_bytes()) == outcome.document == msgspec.to_builtins(outcome.document)
    assert [(r["trace_dir"], r["block_size_tokens"]) for r in outcome.document["results"]] == [
        (str(first), 16),
        (str(tmp_path / "run_b" / "block64"), 64),
    ]
    assert outcome.report is not None
    assert outcome.report.read_text().startswith("<!doctype html>")
    assert f"results: {outcome.out}" in log.getvalue()
    assert not list(tmp_path.rglob("*tmp"))


def test_without_input_the_newest_run_is_taken(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="there is no outputs/"):
        analyze(AnalyzeConfig(), console)
    for name, time in (("old", 10), ("new", 20)):
        for shard in make_run(tmp_path / "outputs" / name).glob("trace_steps*"):
            os.utime(shard, (time, time))
    assert analyze(AnalyzeConfig(), console).document["results"][0]["trace_dir"] == "outputs/new/block64"


def test_warnings_reach_the_log(tmp_path: Path, console: Console, log: io.StringIO) -> None:
    trace = make_run(tmp_path)
    with (trace / "trace_steps_0_1.jsonl").open("ab") as file:
        file.write(b'{"cut')
    analyze(AnalyzeConfig(input=str(tmp_path), block_sizes=(4, 8)), console)
    assert log.getvalue().count("warning: ") == 1
    assert "trace_steps_0_1.jsonl:4: an unfinished last line was dropped" in log.getvalue()


def test_nothing_is_written_when_a_trace_is_bad(tmp_path: Path, console: Console) -> None:
    make_run(tmp_path / "run_a")
    (make_run(tmp_path / "run_b") / "trace_steps_0_1.jsonl").write_text("{}\n")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(InputError, match='"request_id" is missing'):
        analyze(AnalyzeConfig(input=str(tmp_path), report=str(tmp_path / "r.html")), console)
    assert set(tmp_path.rglob("*")) == before


def test_targets_that_cannot_be_are_refused_before_the_work(tmp_path: Path, console: Console) -> None:
    trace = make_run(tmp_path / "run")
    shard = trace / "trace_steps_0_1.jsonl"
    content = shard.read_bytes()
    with pytest.raises(InputError, match="is part of the trace"):
        analyze(AnalyzeConfig(input=str(tmp_path), out=str(shard)), console)
    with pytest.raises(InputError, match="is a directory"):
        analyze(AnalyzeConfig(input=str(tmp_path), out=str(tmp_path)), console)
    with pytest.raises(InputError, match="name the same file"):
        analyze(AnalyzeConfig(input=str(tmp_path), out=str(tmp_path / "a"), report=f"{trace}/../../a"), console)
    with pytest.raises(DsakvError, match="is not a writable directory") as caught:
        analyze(AnalyzeConfig(input=str(tmp_path), out=f"{shard}/a.json"), console)
    assert caught.value.exit_code == 1
    assert shard.read_bytes() == content


def test_a_full_disk_leaves_the_old_results(tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    old = make_run(tmp_path) / "analysis.json"
    old.write_text("old")

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DsakvError, match="the disk is full: cannot write"):
        analyze(AnalyzeConfig(input=str(tmp_path)), console)
    assert old.read_text() == "old"
    assert not list(tmp_path.rglob("*tmp"))


def test_a_copy_is_analyzed_in_place_of_what_it_was_made_from(
    tmp_path: Path, console: Console, log: io.StringIO
) -> None:
    trace = make_run(tmp_path / "run")
    plain = analyze(AnalyzeConfig(input=str(trace.parent), out=str(tmp_path / "a.json")), console)
    copy = tmp_path / "copy"
    copied = analyze(AnalyzeConfig(input=str(trace.parent), to_parquet=str(copy)), console)
    assert copied.out == copy / "block64" / "analysis.json"
    assert f"copy: {copy}" in log.getvalue()
    (before,), (after,) = plain.document["results"], copied.document["results"]
    assert after["trace_dir"] == str(copy / "block64")
    assert after["cache_sim"] == before["cache_sim"]
    assert after["record_stats"] == before["record_stats"]
    assert not list(trace.glob("analysis.json"))


def test_a_copy_that_cannot_be_is_refused(tmp_path: Path, console: Console) -> None:
    trace = make_run(tmp_path / "run")
    copy = str(tmp_path / "copy")
    with pytest.raises(InputError, match="--on-error skip would leave records out"):
        analyze(AnalyzeConfig(input=str(trace), to_parquet=copy, on_error="skip"), console)
    with pytest.raises(InputError, match="is a directory"):
        analyze(AnalyzeConfig(input=str(trace), to_parquet=copy, out=str(tmp_path)), console)
    (trace / "trace_steps_1_2.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match='"request_id" is missing'):
        analyze(AnalyzeConfig(input=str(trace), to_parquet=copy), console)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    with pytest.raises(DsakvError, match="exists already"):
        analyze(AnalyzeConfig(input=str(trace), to_parquet=str(tmp_path / "run")), console)


def test_links_that_lead_in_a_circle_are_no_traceback(tmp_path: Path, console: Console) -> None:
    make_run(tmp_path / "run")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(DsakvError):
        analyze(AnalyzeConfig(input=str(tmp_path / "run"), out=str(loop / "a.json")), console)
    analyze(AnalyzeConfig(input=str(tmp_path / "run"), out=str(loop)), console)
    assert not loop.is_symlink()
