"""Known answers, reused prefixes and service times of `dsakv trace`, from the command line to the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from dsakv.cli import run
from dsakv.engine.engine import Engine
from dsakv.engine.options import EngineOptions
from dsakv.jobs.loaded import LoadedModel
from dsakv.models.contracts import Model
from dsakv.request import Request
from dsakv.trace.validate import validate
from tests.engine.test_forced import Dictated
from tests.jobs.test_trace import command, loaded, records, requests, row, ruler, selections, stopping

__all__ = ["loaded", "ruler", "stopping"]  # fixtures


def summary(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "block16" / "summary.json").read_bytes()))


OPTIONS = ["--kv-block-size", "16", "--trace-store-text", "--max-new-tokens", "9", "--temperature", "0"]


def test_forced_records_are_those_of_decoding_the_known_answer(
    stopping: Path, loaded: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows"
    data.mkdir()
    answers = (("a", "long answer"), ("b",), ("cc", "d", "e"))
    (data / "cwe.jsonl").write_text("".join(row(i, 30 + 60 * i, answers[i % 3]) for i in range(5)))
    out = tmp_path / "run"
    options = ["--forced", "--prefill-chunk", "50", "--batch-size", "2", "--prefix-cache"]
    assert run(command(stopping, data, out, *OPTIONS, *options)) == 0
    assert "answers found" not in capsys.readouterr().out
    found, log = records(out, 16), requests(out)
    validate(out / "block16")
    expected: dict[tuple[int, int, int], Any] = {}
    for request_id, entry in log.items():
        forced = loaded.tokenizer.encode(" " + ", ".join(answers[request_id % 3]))[:9]
        assert entry["completion_token_ids"] == forced
        assert entry["forced"]
        assert "score" not in entry
        plain = Request(request_id, entry["prompt_token_ids"], len(forced))
        engine = Engine(cast(Model, Dictated(loaded.model, forced)), EngineOptions(block_size=16, record=True))
        expected |= selections(engine, [plain])[0]
    assert found.keys() == expected.keys()
    for (request_id, layer, step_idx), record in found.items():
        _, columns, b = expected[request_id, layer, step_idx]
        assert record["selected_token_pos"] == columns.positions[layer, b, : columns.counts[b]].tolist()
        assert record["seq_len_current"] == columns.seq_len[b]
        assert record["prefix"]["prefix_cached_blocks"] == log[request_id]["prefix_cached_blocks"]
    served = summary(out)["serving"]
    assert (served["forced"], served["requests_per_s"], served["total_tokens_per_s"]) == (5, None, None)
    for name in ("queue_ms", "ttft_ms", "tpot_ms", "latency_ms"):
        assert served[name] == {"p50": None, "p95": None, "p99": None, "max": None}


def test_the_prefix_cache_saves_prefill_and_changes_no_token(
    stopping: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows"
    data.mkdir()
    text = "a shared document of some length that every question is about. " * 4
    rows = [{"input": text + "x" * i, "outputs": ["x"], "answer_prefix": f"? {i}"} for i in range(6)]
    (data / "qa_1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = []
    for out, options in ((tmp_path / "off", []), (tmp_path / "on", ["--prefix-cache"])):
        assert run(command(stopping, data, out, *OPTIONS, "--batch-size", "3", *options)) == 0
        said.append(capsys.readouterr())
        validate(out / "block16")
    off, on = requests(tmp_path / "off"), requests(tmp_path / "on")
    for request_id, entry in on.items():
        assert entry["completion_token_ids"] == off[request_id]["completion_token_ids"]
        assert (
            entry["cached_tokens"] == 16 * entry["prefix_cached_blocks"] == 16 * off[request_id]["prefix_cached_blocks"]
        )
        assert entry["cached_tokens"] > 200 or request_id == 0
        assert off[request_id]["cached_tokens"] == 0
    without_cost = [
        [
            {name: r[name] for name in ("selected_token_pos", "prefix", "unique_blocks")}
            for r in records(out, 16).values()
        ]
        for out in (tmp_path / "off", tmp_path / "on")
    ]
    assert without_cost[0] == without_cost[1]
    served = summary(tmp_path / "on")["serving"]
    assert served["cached_tokens"] == sum(entry["cached_tokens"] for entry in on.values())
    assert f"{served['cached_tokens']:,} of {served['prompt_tokens']:,} prompt tokens reused" in said[1].out
    assert "reused" not in said[0].out


def test_serving_is_what_the_requests_say(stopping: Path, ruler: Path, tmp_path: Path) -> None:
    assert run(command(stopping, ruler, tmp_path / "run", *OPTIONS)) == 0
    log, served = requests(tmp_path / "run"), summary(tmp_path / "run")["serving"]
    for name in ("queue_ms", "ttft_ms", "tpot_ms", "latency_ms"):
        values = sorted(entry[name] for entry in log.values() if entry[name] is not None)
        assert served[name] == {
            "p50": values[round((len(values) - 1) * 0.5)],
            "p95": values[round((len(values) - 1) * 0.95)],
            "p99": values[round((len(values) - 1) * 0.99)],
            "max": values[-1],
        }
    seconds = max(entry["arrival_ms"] + entry["latency_ms"] for entry in log.values()) / 1e3
    assert served["requests"] == len(log) == 8
    assert served["duration_s"] == pytest.approx(seconds)
    assert served["output_tokens"] == sum(entry["completion_tokens"] for entry in log.values())
    assert served["output_tokens_per_s"] == pytest.approx(served["output_tokens"] / seconds)
    assert served["total_tokens_per_s"] == pytest.approx((served["output_tokens"] + served["prompt_tokens"]) / seconds)
    assert served["requests_per_s"] == pytest.approx(8 / seconds)


def test_a_replay_is_the_same_run_again(stopping: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"]
    for second, prompt, response in ((30, 40, 5), (31, 7, 0), (31, 90, 3), (33, 8, 12), (31.5, 33, 4), (500, 64, 2)):
        lines.append(f"{second},GPT-4,{prompt},{response},{prompt + response},API log")
    csv = tmp_path / "load.csv"
    csv.write_text("\n".join(lines) + "\n")
    base = ["trace", "burstgpt", "--ckpt-path", str(stopping), "--device", "cpu", "--burstgpt-csv", str(csv)]
    options = ["--max-new-tokens-cap", "6", "--batch-size", "2", "--seed", "5", "--trace-store-text"]
    runs = []
    for name in ("once", "again"):
        out = tmp_path / name
        assert run([*base, *options, "--trace-out", str(out)]) == 0
        runs.append(requests(out))
    assert "1 (failed in the trace: no response tokens)" in capsys.readouterr().err
    kept = ("source_id", "arrival_ms", "prompt_token_ids", "completion_token_ids", "metadata")
    once, again = ([{name: log[i][name] for name in kept} for i in sorted(log)] for log in runs)
    assert once == again
    assert [entry["arrival_ms"] for entry in once] == [0, 1000, 1500, 3000, 470_000]
    assert [len(entry["prompt_token_ids"]) for entry in once] == [40, 90, 33, 8, 64]
    assert all(len(entry["completion_token_ids"]) <= 6 for entry in once)


def test_an_unfinished_run_is_analyzed_with_a_warning(
    stopping: Path, ruler: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(command(stopping, ruler, out, *OPTIONS)) == 0
    analyze = ["analyze", "--input", str(out), "--out", str(tmp_path / "a.json")]
    assert run(analyze) == 0
    assert "the run is unfinished" not in capsys.readouterr().err
    log = (out / "requests.jsonl").read_text().splitlines(keepends=True)
    (out / "requests.jsonl").write_text("".join(log[:5]))
    assert run(analyze) == 0
    assert "the run is unfinished: 5 of its 8 requests are complete" in capsys.readouterr().err


def test_a_run_goes_on_only_with_the_requests_it_began_with(
    stopping: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "own.jsonl", tmp_path / "run"
    path.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(3)))
    base = ["trace", "file", str(path), "--ckpt-path", str(stopping), "--device", "cpu", "--max-new-tokens", "3"]
    assert run([*base, "--trace-out", str(out)]) == 0
    assert run([*base, "--trace-out", str(out), "--resume"]) == 0
    path.write_text(path.read_text().replace("question 1", "question 7"))
    capsys.readouterr()
    assert run([*base, "--trace-out", str(out), "--resume"]) == 2
    assert "was begun with other requests: the data has changed" in capsys.readouterr().err


def test_a_cache_without_room_leaves_no_run(
    stopping: Path, ruler: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(command(stopping, ruler, out, *OPTIONS, "--kv-blocks", str(2**31 - 1))) == 1
    assert "no room on cpu for a KV cache of" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("clock", ["virtual", "wall"])
def test_arrivals_of_another_age_are_refused(
    stopping: Path, ruler: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: str
) -> None:
    options = ["--arrival", "constant", "--request-rate", "1e-12", "--clock", clock]
    assert run(command(stopping, ruler, tmp_path / "run", *OPTIONS, *options)) == 2
    assert "more than 1e+09 s after the first" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
