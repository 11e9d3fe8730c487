"""`dsakv trace` from the command line to the files: complete, exact, and the same after an interruption."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsakv.cli import run
from dsakv.config import ModelConfig
from dsakv.engine.engine import Engine
from dsakv.engine.options import EngineOptions
from dsakv.jobs.loaded import LoadedModel
from dsakv.jobs.model import load_model
from dsakv.request import Completion, Request, StepRecords
from dsakv.trace.summary import summarize
from dsakv.trace.validate import validate

LAYERS = 3
ROOM = 512
Records = dict[tuple[int, int, int], dict[str, Any]]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("DSAKV_", "DS_TRACE_")) or name in ("CKPT_PATH", "CONFIG", "LIMIT"):
            monkeypatch.delenv(name)


def row(index: int, characters: int, answers: tuple[str, ...] = ("a", "zzzz"), prefix: str = " Answer:") -> str:
    text = "".join(chr(97 + (index * 7 + i * i) % 26) for i in range(characters))
    return json.dumps({"index": index, "input": text, "outputs": answers, "answer_prefix": prefix}) + "\n"


@pytest.fixture(scope="session")
def ruler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RULER rows of two tasks, taken in turn: two of the eight are too long for the model."""
    folder = tmp_path_factory.mktemp("ruler")
    (folder / "cwe.jsonl").write_text("".join(row(i, n) for i, n in enumerate((60, 700, 3, 200))))
    needle = "One of the special magic numbers for green-cup is: 4711. "
    rows = [
        {"index": 9, "input": "x" * 90 + ". " + needle + "y" * n, "outputs": ["4711"], "answer_prefix": ""}
        for n in (50, 10, 480, 100)
    ]
    (folder / "niah_single_1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def stopping(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint with many end-of-sequence tokens, so that completions stop at different steps."""
    copy = tmp_path_factory.mktemp("stopping") / "model"
    shutil.copytree(small_checkpoint, copy)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, *range(5, 256, 20)]}))
    return copy


@pytest.fixture(scope="session")
def loaded(stopping: Path) -> LoadedModel:
    return load_model(ModelConfig(ckpt_path=str(stopping), device="cpu"))


def command(checkpoint: Path, data: Path, out: Path, *options: str) -> list[str]:
    base = ["trace", "ruler", "--ckpt-path", str(checkpoint), "--device", "cpu", "--ruler-data", str(data)]
    return [*base, "--trace-out", str(out), *options]


def lines(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    assert content.endswith(b"\n") or not content
    return [json.loads(line) for line in content.splitlines()]


def shards(out: Path, block_size: int = 64) -> list[Path]:
    return sorted((out / f"block{block_size}").glob("trace_steps_*.jsonl"))


def records(out: Path, block_size: int = 64) -> Records:
    """All records by (request, layer, step), none twice."""
    found: Records = {}
    for shard in shards(out, block_size):
        for record in lines(shard):
            key = (record["request_id"], record["layer_id"], record["step_idx"])
            assert key not in found
            found[key] = record
    return found


def untimed(summary: dict[str, Any]) -> dict[str, Any]:
    """Without how long things took."""
    return {name: value for name, value in summary.items() if name != "serving"}


def requests(out: Path) -> dict[int, dict[str, Any]]:
    entries = lines(out / "requests.jsonl")
    assert len({entry["request_id"] for entry in entries}) == len(entries)
    return {entry["request_id"]: entry for entry in entries}


def selections(engine: Engine, prompts: list[Request]) -> tuple[dict[tuple[int, int, int], Any], dict[int, Completion]]:
    """What the layers selected: (step of the engine, its records, column) by (request, layer, step)."""
    selected: dict[tuple[int, int, int], tuple[int, StepRecords, int]] = {}
    completions: dict[int, Completion] = {}
    for step in engine.run(prompts):
        completions |= {completion.request_id: completion for completion in step.finished}
        if step.records is not None:
            for b, request_id in enumerate(step.records.request_id.tolist()):
                for layer in range(LAYERS):
                    selected[request_id, layer, int(step.records.step_idx[b])] = (step.index, step.records, b)
    return selected, completions


@pytest.mark.parametrize(
    ("batch_size", "temperature", "further"),
    [
        (1, 0.0, ["--trace-store-scores"]),
        (3, 0.7, ["--trace-store-scores", "--trace-prefill-tail", "5", "--prefill-chunk", "100"]),
        (3, 0.0, []),
    ],
)
def test_a_trace_holds_exactly_what_the_indexers_selected(
    stopping: Path,
    loaded: LoadedModel,
    ruler: Path,
    tmp_path: Path,
    batch_size: int,
    temperature: float,
    further: list[str],
) -> None:
    out = tmp_path / "run"
    options = f"--batch-size {batch_size} --temperature {temperature} --max-new-tokens 20 --kv-block-size 16 --seed 3"
    assert run(command(stopping, ruler, out, *options.split(), "--trace-store-text", *further)) == 0
    log = requests(out)
    assert log.keys() == set(range(8))
    prompts = [Request(i, log[i]["prompt_token_ids"], 20) for i in range(8)]
    tail = 5 if "--trace-prefill-tail" in further else 0
    engine = EngineOptions(
        batch_size=batch_size,
        admission="batch",
        block_size=16,
        prefill_chunk=100 if tail else 512,
        temperature=temperature,
        seed=3,
        eos_token_ids=loaded.eos_token_ids,
        record=True,
        record_prefill_tail=tail,
    )
    expected, completions = selections(Engine(loaded.model, engine), prompts)
    found = records(out, 16)
    assert found.keys() == expected.keys()
    for (request_id, layer, step_idx), record in found.items():
        index, columns, b = expected[request_id, layer, step_idx]
        count = columns.counts[b]
        assert record["selected_token_pos"] == columns.positions[layer, b, :count].tolist()
        assert record["unique_token_pos_count"] == count == min(record["seq_len_current"], 16)
        assert (
            record["seq_len_current"] == columns.seq_len[b] == len(prompts[request_id].prompt_token_ids) + step_idx + 1
        )
        assert max(record["selected_token_pos"]) < record["seq_len_current"]
        assert (record["index_layer_id"], record["engine_step"]) == (layer, index)
        assert record["kv_fetch"]["hbm"]["bytes_read"] == count * columns.row_bytes
        assert record["kv_fetch"]["hbm"]["batch_size"] == columns.fetch_batch[0, layer, b]
        scores = columns.scores[layer, b, :count]
        if "--trace-store-scores" in further:
            assert np.array_equal(np.array(record["scores_topk"], dtype=np.float32), scores)
        else:
            assert record["scores_stats"] == pytest.approx(
                {"min": scores.min(), "mean": scores.mean(dtype=np.float64), "max": scores.max()}, rel=1e-6
            )

    untraced = EngineOptions(temperature=temperature, seed=3, eos_token_ids=loaded.eos_token_ids)
    plain = {c.request_id: c for step in Engine(loaded.model, untraced).run(prompts) for c in step.finished}
    for request_id, entry in log.items():
        completion = completions[request_id]
        assert entry["completion_token_ids"] == completion.token_ids == plain[request_id].token_ids
        assert entry["finish_reason"] == completion.finish_reason
        assert entry["decode_steps"] == completion.decode_steps <= 19
        assert entry["records"] == LAYERS * (completion.decode_steps + min(tail, entry["prompt_tokens"]))
        steps = sorted(s for r, layer, s in found if r == request_id and layer == 0)
        assert steps == list(range(-min(tail, entry["prompt_tokens"]), completion.decode_steps))
    report = validate(out / "block16")
    assert (report.records, report.requests) == (len(found), 8)


def test_inputs_are_cut_to_fit_counted_and_scored(
    stopping: Path, loaded: LoadedModel, ruler: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(ruler, data)
    with (data / "cwe.jsonl").open("a") as file:
        file.write(row(4, 40, prefix="a prefix that alone is too long " * 30))
    out = tmp_path / "run"
    options = ["--max-new-tokens", "12", "--trace-store-text", "--trace-store-block-ids"]
    assert run(command(stopping, data, out, *options)) == 0
    caught = capsys.readouterr()
    assert "prompts cut to fit: 2" in caught.err
    assert "warning: inputs dropped: 1 (no room beside template and answer prefix)" in caught.err
    counts = {"kept": 8, "truncated": 2, "dropped": {"no room beside template and answer prefix": 1}}
    assert json.loads((out / "block64" / "summary.json").read_text())["inputs"] == counts
    assert json.loads((out / "block64" / "run_meta.json").read_text())["inputs"] == counts

    log = requests(out)
    cut = {i for i, entry in log.items() if entry["truncated"]}
    assert cut == {i for i, entry in log.items() if entry["truncated_tokens"]}
    assert len(cut) == 2
    for i, entry in log.items():
        ids = loaded.tokenizer.encode_prompt_with_offsets(entry["prompt"], entry["metadata"]["answer_prefix"]).ids
        assert len(entry["prompt_token_ids"]) == entry["prompt_tokens"] == len(ids) - entry["truncated_tokens"]
        assert entry["prompt_tokens"] == (ROOM - 12 if i in cut else len(ids))
        if i not in cut:
            assert entry["prompt_token_ids"] == ids
        for begin, end in entry["needle_spans"]:
            assert loaded.tokenizer.decode(entry["prompt_token_ids"][begin:end]).endswith("is: 4711.")
        assert entry["completion"] == loaded.tokenizer.decode(entry["completion_token_ids"])
        hits = [answer in entry["completion"].lower() for answer in entry["answers"]]
        assert entry["score"] == sum(hits) / len(hits)
        assert entry["source_id"].startswith(str(data / entry["metadata"]["task"]))
    assert [log[i]["metadata"]["task"] for i in range(8)] == ["cwe", "niah_single_1"] * 4
    assert any(entry["needle_spans"] for entry in log.values())
    for task in ("cwe", "niah_single_1"):
        assert re.search(rf"{task} +│ +4 │", caught.out)
    assert caught.err.splitlines()[-1] == f"next: dsakv analyze --input {out}"
    assert run(["analyze", "--input", str(out), "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["input"]["records"] == len(records(out))


@pytest.mark.parametrize("cut", ["head", "tail", "middle"])
def test_the_part_that_is_cut_away(stopping: Path, loaded: LoadedModel, ruler: Path, tmp_path: Path, cut: str) -> None:
    options = ["--limit", "3", "--tasks", "cwe", "--truncate", cut, "--max-new-tokens", "1", "--trace-store-text"]
    assert run(command(stopping, ruler, tmp_path / "run", *options)) == 0
    entry = requests(tmp_path / "run")[1]
    text = entry["prompt"].encode()
    whole = loaded.tokenizer.encode_prompt_with_offsets(entry["prompt"], " Answer:")
    keep = len(text) - entry["truncated_tokens"]
    kept = {"head": text[-keep:], "tail": text[:keep], "middle": text[: -(-keep // 2)] + text[-(keep // 2) :]}[cut]
    lead, trail = whole.ids[: whole.start], whole.ids[whole.stop :]
    assert entry["prompt_token_ids"] == [*lead, *kept, *trail]
    assert entry["prompt_tokens"] == ROOM - 1
    assert entry["records"] == 0  # one new token comes from the prefill
    assert not records(tmp_path / "run")


def test_a_sample_keeps_whole_steps_of_the_same_trace(stopping: Path, ruler: Path, tmp_path: Path) -> None:
    def traced(name: str, *options: str) -> Records:
        assert run(command(stopping, ruler, tmp_path / name, "--max-new-tokens", "20", *options)) == 0
        validate(tmp_path / name / "block64")
        return {key: without_times(record) for key, record in records(tmp_path / name).items()}

    whole, sample = traced("whole"), traced("sample", "--trace-sample-rate", "0.4")
    assert 0 < len(sample) < len(whole)
    assert all(whole[key] == record for key, record in sample.items())
    steps = {(request_id, step) for request_id, _, step in sample}
    assert sample.keys() == {(request_id, layer, step) for request_id, step in steps for layer in range(LAYERS)}
    assert sum(entry["records"] for entry in requests(tmp_path / "sample").values()) == len(sample)


def test_shards_hold_requests_by_their_number(stopping: Path, ruler: Path, tmp_path: Path) -> None:
    options = "--requests-per-shard 3 --batch-size 2 --max-new-tokens 9 --limit 7"
    assert run(command(stopping, ruler, tmp_path / "run", *options.split())) == 0
    assert {path.name for path in shards(tmp_path / "run")} == {f"trace_steps_{a}_{a + 3}.jsonl" for a in (0, 3, 6)}
    for shard in shards(tmp_path / "run"):
        begin, end = map(int, re.findall(r"\d+", shard.name))
        own = lines(shard)
        assert {record["request_id"] for record in own} <= set(range(begin, end))
        for request_id in range(begin, end):
            order = [(r["step_idx"], r["layer_id"]) for r in own if r["request_id"] == request_id]
            assert order == sorted(order)


# An interrupted run


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    hbm = {key: value for key, value in record["kv_fetch"]["hbm"].items() if key != "latency_us"}
    plain = {key: value for key, value in record.items() if key != "step_wall_us"}
    return plain | {"kv_fetch": record["kv_fetch"] | {"hbm": hbm}}


def contents(out: Path, *, alone: bool) -> dict[str, list[str]]:
    """Records and log by request as JSON text, without measured times.

    ``alone`` says whether each request ran by itself; if not, what depends on its neighbours goes too.
    """
    found: dict[str, list[str]] = {}
    for shard in shards(out):
        for record in map(without_times, lines(shard)):
            if not alone:
                del record["engine_step"], record["kv_fetch"]["hbm"]["batch_size"]
            found.setdefault(f"{shard.name} {record['request_id']}", []).append(json.dumps(record))
    for request_id, entry in requests(out).items():
        kept = {key: value for key, value in entry.items() if not key.endswith("_ms")}
        found[f"request {request_id}"] = [json.dumps(kept)]
    return found


def bytes_of(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


LONG = "--max-new-tokens 100 --temperature 0.7 --requests-per-shard 1 --trace-store-text"


@pytest.fixture(scope="session")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("five")
    (folder / "cwe.jsonl").write_text("".join(row(i, 20 + 15 * i) for i in range(5)))
    return folder


@pytest.fixture(scope="session")
def uninterrupted(
    small_checkpoint: Path, five: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The whole run at a batch size, made once."""
    made: dict[str, Path] = {}

    def get(batch_size: str) -> Path:
        if batch_size not in made:
            out = tmp_path_factory.mktemp("whole") / "run"
            assert run(command(small_checkpoint, five, out, *LONG.split(), "--batch-size", batch_size)) == 0
            made[batch_size] = out
        return made[batch_size]

    return get


def poll(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Look again every few milliseconds; a process that ends before it is ready has failed."""
    while not ready():
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.003)
            pytest.fail(process.communicate()[1])


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that must not outlive the test."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("signal_number", "batch_size"), [(signal.SIGKILL, "1"), (signal.SIGINT, "2")])
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    small_checkpoint: Path,
    five: Path,
    uninterrupted: Callable[[str], Path],
    processes: list[subprocess.Popen[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    signal_number: int,
    batch_size: str,
) -> None:
    out = tmp_path / "run"
    started = command(small_checkpoint, five, out, *LONG.split(), "--batch-size", batch_size)
    process = subprocess.Popen(
        [sys.executable, "-m", "dsakv", *started],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    processes.append(process)
    third = out / "block64" / "trace_steps_2_3.jsonl"  # 200 steps of others and more are still to come
    poll(lambda: third.exists() and third.stat().st_size > 0, process)
    process.send_signal(signal_number)
    stdout, stderr = process.communicate()
    assert "Traceback" not in stderr
    assert stdout == ""
    before = (out / "requests.jsonl").read_bytes()
    assert 1 <= before.count(b"\n") < 5
    if signal_number == signal.SIGINT:
        assert process.returncode == 130
        assert stderr.splitlines()[-1] == "interrupted"
        assert all(path.read_bytes().endswith(b"}\n") for path in (out / "requests.jsonl", *shards(out)))
        validate(out / "block64")
    else:
        assert process.returncode == -signal_number
    assert not list(out.rglob("*tmp"))

    # What is there can be analyzed; another configuration is refused and changes nothing.
    assert run(["analyze", "--input", str(out), "--out", str(tmp_path / "analysis.json")]) == 0
    capsys.readouterr()
    left = bytes_of(out)
    assert run([*started, "--resume", "--seed", "1", "--temperature", "0.5"]) == 2
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error == f"error: the run in {out} was started with another configuration: engine.seed, engine.temperature"
    assert hint.startswith("hint: ")
    assert run(started) == 1
    assert "holds a run already" in capsys.readouterr().err
    assert bytes_of(out) == left

    assert run([*started, "--resume"]) == 0
    caught = capsys.readouterr()
    assert re.search(r"cwe +│ +5 │", caught.out)  # scores of the requests before the interruption too
    assert (out / "requests.jsonl").read_bytes().startswith(before)
    whole = uninterrupted(batch_size)
    assert contents(out, alone=batch_size == "1") == contents(whole, alone=batch_size == "1")
    summary = summarize(out / "block64")
    assert json.loads((out / "block64" / "summary.json").read_bytes()) == summary
    assert untimed(summary) == untimed(summarize(whole / "block64"))
    assert len(records(out)) == sum(entry["records"] for entry in requests(out).values())
    validate(out / "block64")
    (out / "analysis.json").write_text("a result of the user's own")

    # Going on with a finished run changes nothing.
    left = bytes_of(out)
    assert run([*started, "--resume"]) == 0
    assert bytes_of(out) == left
    assert ": 0 of " in capsys.readouterr().err


def test_a_folder_without_a_run_cannot_be_gone_on_with(
    small_checkpoint: Path, ruler: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(small_checkpoint, ruler, tmp_path / "none", "--resume")
    assert run(arguments) == 2
    assert "holds no run to go on with" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    at = arguments.index("--trace-out")
    assert run(arguments[:at] + arguments[at + 2 :]) == 2
    assert "hint: name its folder with --trace-out" in capsys.readouterr().err
