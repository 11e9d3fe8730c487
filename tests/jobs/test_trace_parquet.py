"""Parquet from the command line: traced, killed, gone on with, converted and analyzed as JSON lines are."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dsakv.cli import run
from dsakv.trace.formats import read_records, shard_paths
from dsakv.trace.summary import summarize
from dsakv.trace.validate import validate
from tests.jobs.test_trace import untimed


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("DSAKV_", "DS_TRACE_")) or name in ("CKPT_PATH", "CONFIG", "LIMIT"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def ruler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ruler")
    rows = [
        {"index": i, "input": chr(97 + i) * (20 + 15 * i), "outputs": ["a"], "answer_prefix": " Answer:"}
        for i in range(5)
    ]
    (folder / "cwe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(checkpoint: Path, data: Path, out: Path, *options: str) -> list[str]:
    base = ["trace", "ruler", "--ckpt-path", str(checkpoint), "--device", "cpu", "--ruler-data", str(data)]
    return [*base, "--trace-out", str(out), "--kv-block-size", "16", *options]


def facts(out: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """The records of a run by shard, without what was measured; scores as the float32 numbers that they are."""
    found = []
    for shard in shard_paths(out / "block16"):
        records = []
        for _, record in read_records(shard):
            del record["step_wall_us"], record["kv_fetch"]["hbm"]["latency_us"]
            scores = record.pop("scores_topk", None) or list(record.pop("scores_stats").values())
            records.append(record | {"scores": np.array(scores, dtype=np.float32).tolist()})
        found.append((shard.stem, records))
    return found


def result(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    """What analyze says of a run, but for names and sizes of files."""
    capsys.readouterr()
    assert run(["analyze", "--input", str(folder), "--json", *options]) == 0
    (found,) = json.loads(capsys.readouterr().out)["results"]
    for name in ("trace_dir", "run_meta"):
        del found[name]
    del found["input"]["bytes"], found["config"]["input"]
    return dict(found)


@pytest.mark.parametrize(
    "options",
    [
        "--max-new-tokens 20 --batch-size 3 --requests-per-shard 2 --trace-prefill-tail 4",
        "--max-new-tokens 12 --trace-store-scores --trace-store-block-ids --trace-sample-rate 0.5",
    ],
)
def test_both_formats_hold_the_same_trace(
    small_checkpoint: Path, ruler: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str
) -> None:
    for name in ("jsonl", "parquet"):
        arguments = [*options.split(), "--trace-format", name]
        assert run(command(small_checkpoint, ruler, tmp_path / name, *arguments)) == 0
    lines, columns = tmp_path / "jsonl", tmp_path / "parquet"
    assert facts(columns) == facts(lines)
    assert len(facts(columns)[0][1]) > 0
    for shard in shard_paths(columns / "block16"):
        assert pq.read_table(shard).to_pylist() == [record for _, record in read_records(shard)]
    summary = summarize(columns / "block16")
    assert json.loads((columns / "block16" / "summary.json").read_bytes()) == summary
    assert untimed(summary) == untimed(summarize(lines / "block16"))
    assert validate(columns / "block16").requests == 5
    assert result(columns, capsys) == result(lines, capsys)
    assert run(["analyze", "--input", str(lines), "--to-parquet", str(tmp_path / "copy")]) == 0
    assert f"copy: {tmp_path / 'copy'}" in capsys.readouterr().err
    assert (tmp_path / "copy" / "block16" / "analysis.json").exists()
    assert facts(tmp_path / "copy") == facts(lines)
    assert result(tmp_path / "copy", capsys, "--workers", "2") == result(lines, capsys)
    assert validate(tmp_path / "copy" / "block16").requests == 5


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_goes_on(small_checkpoint: Path, ruler: Path, tmp_path: Path, signal_number: int) -> None:
    options = ["--max-new-tokens", "60", "--requests-per-shard", "2", "--trace-format", "parquet"]
    out = tmp_path / "run"
    started = command(small_checkpoint, ruler, out, *options)
    process = subprocess.Popen(
        [sys.executable, "-m", "dsakv", *started],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not list((out / "block16").glob(".trace_steps_2_4.parquet.*")):
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.003)
                pytest.fail(process.communicate()[1])
        process.send_signal(signal_number)
    finally:
        if signal_number == signal.SIGKILL:
            process.kill()
        _, stderr = process.communicate()
    assert "Traceback" not in stderr
    finished = (out / "requests.jsonl").read_text().count("\n")
    assert 2 <= finished < 5
    assert validate(out / "block16").requests == finished  # nothing is declared that is not there
    if signal_number == signal.SIGINT:
        assert process.returncode == 130
        assert not list(out.rglob("*tmp"))
    assert run([*started, "--resume"]) == 0
    assert not list(out.rglob("*tmp"))
    whole = tmp_path / "whole"
    assert run(command(small_checkpoint, ruler, whole, *options)) == 0
    assert facts(out) == facts(whole)
    assert untimed(summarize(out / "block16")) == untimed(summarize(whole / "block16"))
    before = {path: path.stat().st_ino for path in out.rglob("trace_steps*")}
    assert run([*started, "--resume"]) == 0
    assert {path: path.stat().st_ino for path in out.rglob("trace_steps*")} == before


def test_a_run_goes_on_in_its_own_format(
    small_checkpoint: Path, ruler: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = command(small_checkpoint, ruler, tmp_path / "run", "--max-new-tokens", "4", "--limit", "1")
    assert run([*started, "--trace-format", "parquet"]) == 0
    assert run([*started, "--resume"]) == 2
    assert "was started with another configuration: trace.format" in capsys.readouterr().err


def test_generate_and_selfcheck_write_parquet_too(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = f"generate --ckpt-path {small_checkpoint} --device cpu --max-new-tokens 5 --trace-enable".split()
    out = ["--trace-format", "parquet", "--trace-out"]
    assert run([*arguments, "--prompt", "hello", *out, str(tmp_path / "run")]) == 0
    assert [path.name for path in shard_paths(tmp_path / "run" / "block64")] == ["trace_steps_0_4.parquet"]
    assert validate(tmp_path / "run" / "block64").records == 4 * 3
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n/clear\ntwo\nthree\n"))
    assert run([*arguments, "--interactive", *out, str(tmp_path / "chat")]) == 0
    assert validate(tmp_path / "chat" / "block64").requests == 3
    capsys.readouterr()
    assert run(["trace", "selfcheck", *out, str(tmp_path / "check")]) == 0
    assert "in 4 files passed" in capsys.readouterr().out
    assert len(list((tmp_path / "check" / "block16").glob("*.parquet"))) == 4
