"""`dsakv bench` from the command line, on a small model, and with made-up links."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from dsakv.cli import run
from dsakv.config import BenchConfig, Config, EngineConfig, ModelConfig, WeightsConfig
from dsakv.console import Console
from dsakv.distributed import ALONE
from dsakv.errors import DsakvError, InputError
from dsakv.jobs.bench import bench, run_round
from dsakv.jobs.bench_machine import machine, memory
from dsakv.jobs.bench_prompts import bench_requests, read_bench_prompts
from dsakv.jobs.loaded import LoadedModel
from dsakv.jobs.model import load_model
from dsakv.jobs.run import make_engine
from dsakv.report.bench_report import render_bench
from dsakv.request import WeightTraffic
from dsakv.settings import resolved_json
from dsakv.weights.streamer import Streamer

SMALL = ["--input-len", "12", "--max-new-tokens", "3", "--warmup-rounds", "0"]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith(("DSAKV_", "DS_TRACE_")) or name in ("CKPT_PATH", "CONFIG", "LIMIT"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def shell(small_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    def call(*options: object, code: int = 0) -> tuple[str, str]:
        """stdout and stderr of a run."""
        command = ["bench", "--ckpt-path", str(small_checkpoint), "--device", "cpu", *map(str, options)]
        assert run(command) == code
        caught = capsys.readouterr()
        return caught.out, caught.err

    return call


def small(checkpoint: Path, engine: dict[str, Any] | None = None, **options: Any) -> Config:
    given = {"prompt", "prompts"} & set(options)
    return Config(
        model=ModelConfig(ckpt_path=str(checkpoint), device="cpu"),
        engine=EngineConfig(**{"max_new_tokens": 3, "temperature": 0.0} | (engine or {})),
        bench=BenchConfig(**{"input_len": 512 if given else 12, "warmup_rounds": 0, "rounds": 1} | options),
    )


@pytest.fixture
def quiet() -> Console:
    return Console(io.StringIO(), io.StringIO())


@pytest.fixture(scope="module")
def loaded(small_checkpoint: Path) -> LoadedModel:
    return load_model(ModelConfig(ckpt_path=str(small_checkpoint), device="cpu"))


def test_results_in_a_new_folder(shell: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    out, err = shell(*SMALL, "--rounds", 2, "--batch-size", 2, "--verbose", "--warmup-rounds", 1)
    (folder,) = (tmp_path / "outputs").glob("bench_2*")
    assert {path.name for path in folder.iterdir()} == {"config.json", "bench_results.json"}
    results = json.loads((folder / "bench_results.json").read_bytes())
    assert results["config"] == json.loads((folder / "config.json").read_bytes())
    assert results["config"]["engine"]["max_new_tokens"] == 3
    assert results["prompts"] == {
        "source": "random tokens",
        "count": 2,
        "tokens": 24,
        "shortest": 12,
        "longest": 12,
        "cut": 0,
        "cut_tokens": 0,
        "new_tokens": 3,
        "ignore_eos": True,
    }
    assert len(results["rounds"]) == 2
    assert len({one["output_digest"] for one in results["rounds"]}) == 1
    for one in results["rounds"]:
        assert (one["requests"], one["prompt_tokens"], one["output_tokens"]) == (2, 24, 6)
        assert 0 < one["ttft_ms"]["mean"] < one["e2el_ms"]["mean"] <= one["e2e_ms"]
        assert one["prefill_ms"] + one["decode_ms"] <= one["e2e_ms"]
        assert one["links"]["decode"]["passes"] == 2
    assert (results["placement"], results["kv_tiers"]) == (None, None)
    assert results["links"]["decode"]["overlap_efficiency"] is None
    assert results["rejected"] == []
    assert results["drift"]["flag"] in (True, False)
    assert results["machine"]["ranks"] == 1
    for word in ("ttft_ms", "itl_ms p99", "output_throughput", "(e2el_ms - ttft_ms) / (n - 1)", "all loaded"):
        assert word in out
    assert "warm-up round: " in err
    assert "round 1: " in err
    assert f"results: {folder.relative_to(tmp_path)}" in err


def test_json_is_one_document_and_the_file(shell: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    out, _ = shell(*SMALL, "--rounds", 1, "--json", "--out-json", tmp_path / "new" / "r.json")
    assert json.loads(out) == json.loads((tmp_path / "new" / "r.json").read_bytes())
    assert not (tmp_path / "outputs").exists()
    assert json.loads(out)["drift"]["flag"] is None


def test_tiers_are_counted(shell: Callable[..., tuple[str, str]]) -> None:
    out, _ = shell(*SMALL, "--rounds", 1, "--kv-hot-capacity", 0.25, "--kv-block-size", 2, "--json")
    tiers = json.loads(out)["kv_tiers"]
    assert tiers["hot_blocks"] == tiers["n_blocks"] // 4
    (one,) = json.loads(out)["rounds"]
    moved = one["links"]
    assert one["kv_h2d"]["bytes"] == sum(moved[kind]["local_pool_read"]["bytes"] for kind in moved) > 0
    assert one["kv_d2h"]["bytes"] == sum(moved[kind]["local_pool_write"]["bytes"] for kind in moved) > 0
    assert sum(one["kv"]["found"].values()) == pytest.approx(1)
    assert one["kv"]["found"]["local_pool"] > 0
    shown, _ = shell(*SMALL, "--rounds", 1, "--kv-hot-capacity", 0.25, "--kv-block-size", 2)
    assert "host memory to the device, KV" in shown
    assert "KV blocks found in local_pool" in shown


def test_text_is_taken_as_it_stands_and_loses_its_beginning(
    shell: Callable[..., tuple[str, str]],
    loaded: LoadedModel,
    small_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loaded.tokenizer, "_lead", [256])  # this one puts a BOS in front
    text = "one prompt, longer than there is room for"
    lines = tmp_path / "p.txt"
    lines.write_text(f"short\r\n\n  \n{text}\n")
    config = small(small_checkpoint, prompts=str(lines))
    loaded = replace(loaded, model=SimpleNamespace(max_seq_len=13, vocab_size=loaded.model.vocab_size))
    batch = bench_requests(read_bench_prompts(config), config, loaded)
    tokenizer = loaded.tokenizer
    assert [request.prompt_token_ids for request in batch.requests] == [
        tokenizer.encode("short"),
        tokenizer.encode(text)[-10:],
    ]
    assert tokenizer.encode_raw("short") != tokenizer.encode("short"), "a BOS would be seen"
    assert (batch.cut, batch.describe()["cut_tokens"]) == (1, len(tokenizer.encode(text)) - 10)
    _, err = shell(*SMALL[2:], "--rounds", 1, "--prompts", lines, "--max-seq-len", 13)
    assert f"prompts cut to fit: 1 ({len(text) - 10} tokens went, from the beginning)" in err


def test_prompts_of_every_kind(small_checkpoint: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": "text", "request_id": "mine"},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"prompt_token_ids": [5, 6]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    config = small(small_checkpoint, prompts=str(path))
    found = bench_requests(read_bench_prompts(config), config, loaded).requests
    tokenizer = loaded.tokenizer
    assert [request.prompt_token_ids for request in found] == [
        tokenizer.encode("text"),
        tokenizer.encode_messages(rows[1]["messages"]),
        [5, 6],
    ]
    assert [request.source_id for request in found] == ["mine", "", ""]
    assert len(read_bench_prompts(small(small_checkpoint, prompts=str(path), num_prompts=2))) == 2
    (one,) = bench_requests(
        read_bench_prompts(small(small_checkpoint, prompt="hello")), small(small_checkpoint, prompt="hello"), loaded
    ).requests
    assert one.prompt_token_ids == tokenizer.encode("hello")


def test_made_up_prompts_hold_no_special_token(small_checkpoint: Path, loaded: LoadedModel) -> None:
    def made(**options: Any) -> list[list[int]]:
        config = small(small_checkpoint, **options)
        return [request.prompt_token_ids for request in bench_requests([], config, loaded).requests]

    found = made(num_prompts=3, input_len=400)
    assert [len(ids) for ids in found] == [400] * 3
    assert len({tuple(ids) for ids in found}) == 3
    assert found == made(num_prompts=3, input_len=400)
    assert found != made(num_prompts=3, input_len=400, engine={"seed": 1})
    used = set().union(*found)
    assert not any(loaded.tokenizer.is_special(token) or token in loaded.eos_token_ids for token in used)
    assert len(made(engine={"batch_size": 4})) == 4
    bare = replace(loaded, text_tokenizer=None)  # a checkpoint without tokenizer
    config = small(small_checkpoint)
    assert len(bench_requests([], config, bare).requests[0].prompt_token_ids) == 12


def test_an_end_of_sequence_ends_nothing(small_checkpoint: Path, loaded: LoadedModel) -> None:
    """Every token ends a sequence here: without ``ignore_eos`` there is one, with it there are all."""
    config = small(small_checkpoint)
    ends = replace(loaded, eos_token_ids=frozenset(range(loaded.model.vocab_size)))
    requests = bench_requests([], config, loaded).requests
    for ignore, tokens in ((False, 1), (True, 3)):
        engine = make_engine(config, ends, ALONE, record=False, ignore_eos=ignore)
        done: list[int] = []
        log = run_round(engine, requests, done.append)
        assert len(log.tokens[0]) == tokens
        assert sum(done) == 12 + tokens


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--prompt a --prompts b.txt", "--prompt and --prompts name two sources"),
        ("--prompt a --num-prompts 2", "--num-prompts does nothing with --prompt"),
        ("--prompt a --input-len 9", "--input-len does nothing with --prompt"),
        ("--prompts two.txt --input-len 9", "--input-len does nothing with --prompts"),
        ("--prompts two.txt --num-prompts 3", "--num-prompts 3, but two.txt holds 2"),
        ("--prompts two.txt --batch-size 3", "--batch-size 3 is never reached: a round has 2 prompts"),
        ("--prompt a --batch-size 2", "--batch-size 2 is never reached: a round has 1 prompt"),
        ("--num-prompts 2147483647", "2,147,483,647 made-up prompts of "),
        ("--prompts none.txt", "cannot read none.txt"),
        ("--prompts empty.txt", "empty.txt holds no prompt"),
        ("--prompts latin.txt", "cannot read latin.txt"),
        ("--prompts bad.jsonl", "bad.jsonl:2"),
        ("--max-new-tokens 20 --max-seq-len 20", "leaves no room for a prompt"),
        ("--max-new-tokens 512", "leaves no room for a prompt: a sequence has 512 at most"),
        ("--kv-policy fifo", "--kv-policy does nothing while all KV is on the device"),
        ("--out-json .", "is a directory"),
        ("--rounds 0", "--rounds must be an integer >= 1"),
        ("--num-prompts 1 --batch-size 2", "--batch-size 2 is never reached"),
    ],
)
def test_what_is_wrong_is_said(shell: Callable[..., tuple[str, str]], tmp_path: Path, options: str, said: str) -> None:
    (tmp_path / "two.txt").write_text("a\nb\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("ä\n".encode("latin-1"))
    (tmp_path / "bad.jsonl").write_text('{"prompt":"a"}\n{"prompt":1}\n')
    out, err = shell(*options.split(), code=2)
    error, hint = err.splitlines()[-2:]
    assert error.startswith("error: ")
    assert said in error
    assert hint.startswith("hint: ")
    assert out == ""
    assert not (tmp_path / "outputs").exists()


def test_a_place_that_takes_no_file_is_told_of_before_the_model(shell: Callable[..., tuple[str, str]]) -> None:
    _, err = shell("--out-json", "/proc/nothing.json", code=1)
    assert "error: cannot write /proc/nothing.json" in err
    assert "model" not in err


def test_the_password_of_a_pool_stays_out(shell: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    config = Config(kv=msgspec.structs.replace(Config().kv, remote="redis://me:secret@127.0.0.1:1/0"))
    assert b"secret" not in resolved_json(config)
    remote = config.kv.remote
    _, err = shell(*SMALL, "--kv-hot-capacity", 1, "--kv-remote", remote, code=1)
    assert "secret" not in err
    for path in (tmp_path / "outputs").rglob("*.json"):
        assert "secret" not in path.read_text()


def test_streamed_weights_have_a_bound(monkeypatch: pytest.MonkeyPatch, small_checkpoint: Path, quiet: Console) -> None:
    speeds = iter((1e12, 2e12))  # before the rounds and after them
    monkeypatch.setattr(Streamer, "disk_speed", lambda _: next(speeds))
    results = bench(streamed(small_checkpoint), quiet)
    placement = results["placement"]
    assert placement["unit"] == "layer"
    assert sum(row["on_disk"] for row in placement["rows"]) > 0
    assert results["drift"]["disk_bytes_per_s"] == [1e12, 2e12]
    assert results["drift"]["flag"]
    assert results["bound"]["disk_bytes_per_s"] == 2e12
    assert results["bound"]["decode"]["wall_to_bound"] > 1
    decode = results["links"]["decode"]
    assert decode["disk"]["bytes_per_pass"] == placement["pass_disk_bytes"]
    assert decode["disk"]["bytes"] == decode["passes"] * placement["pass_disk_bytes"]
    assert 0 < decode["overlap_efficiency"] <= 1
    out = io.StringIO()
    Console(out, io.StringIO()).print_table(render_bench(results))
    for words in ("disk to host memory, weights", "overlap efficiency", "by layer, static", "DRIFT", "times its bound"):
        assert words in out.getvalue()
    assert "REJECTED" not in out.getvalue()


def streamed(checkpoint: Path, **bench: Any) -> Config:
    """A run whose weights do not fit."""
    config = small(checkpoint, **bench)
    weights = WeightsConfig(host_budget="900KB", unit="layer", prefetch_depth=0)
    return msgspec.structs.replace(config, weights=weights)


@pytest.mark.parametrize(("off", "speed", "faults"), [(0, 1.0, 4), (1, 1e12, 3)])
def test_what_cannot_be_is_written_down_and_ends_with_1(
    off: int, speed: float, faults: int, monkeypatch: pytest.MonkeyPatch, small_checkpoint: Path
) -> None:
    counted = Streamer.traffic

    def traffic(streamer: Streamer) -> WeightTraffic:
        found = counted(streamer)
        found.planned_bytes += off
        return found

    monkeypatch.setattr(Streamer, "disk_speed", lambda _: speed)
    monkeypatch.setattr(Streamer, "traffic", traffic)
    out = io.StringIO()
    with pytest.raises(DsakvError, match="rejected") as caught:
        bench(streamed(small_checkpoint, out_json="r.json"), Console(out, io.StringIO()))
    assert caught.value.exit_code == 1
    assert not isinstance(caught.value, InputError)
    assert "REJECTED" in out.getvalue()
    results = json.loads(Path("r.json").read_bytes())
    assert len(results["rejected"]) == faults  # each pass, and where they are too fast the round
    assert any(fault.startswith("round 0, prefill pass 0: ") for fault in results["rejected"])


def test_the_machine_and_its_memory() -> None:
    cpu = torch.device("cpu")
    found = memory(cpu)
    assert (found["device_allocated"], found["device_reserved"]) == (None, None)
    assert found["host_peak"] is None or found["host_peak"] > 1 << 20
    assert machine(cpu)["threads"] == torch.get_num_threads()
