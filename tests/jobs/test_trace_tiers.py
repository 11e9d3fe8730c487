"""`dsakv trace` and `generate` with KV tiers, from the command line to the files."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dsakv.cli import run
from dsakv.request import TIERS
from dsakv.trace.formats import read_records, shard_paths
from dsakv.trace.summary import summarize
from dsakv.trace.validate import validate

LENGTHS = [49 + 8, 56 + 8, 63 + 8, 25 + 8, 55 + 8, 85 + 8]
"""Tokens whose KV each request leaves."""


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("DSAKV_", "DS_TRACE_")):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six requests, of which three begin alike."""
    path = tmp_path_factory.mktemp("prompts") / "own.jsonl"
    start = [5 * i % 256 for i in range(70)]
    ids = [start[: 40 + 7 * i] + [(31 * i + j) % 256 for j in range(9)] for i in range(3)]
    ids += [[(17 * i + j * j) % 256 for j in range(25 + 30 * i)] for i in range(3)]
    path.write_text("".join(json.dumps({"prompt_token_ids": tokens, "max_new_tokens": 9}) + "\n" for tokens in ids))
    return path


def trace(checkpoint: Path, prompts: Path, out: Path, *options: str) -> Path:
    command = ["trace", "file", str(prompts), "--ckpt-path", str(checkpoint), "--device", "cpu", "--kv-block-size", "4"]
    assert run([*command, "--temperature", "0.5", "--trace-out", str(out), *options]) == 0
    return out / "block4"


def records(folder: Path) -> dict[Any, dict[str, Any]]:
    return {
        (r["request_id"], r["step_idx"], r["layer_id"]): r
        for shard in shard_paths(folder)
        for _, r in read_records(shard)
    }


STACKS: list[list[str]] = [
    ["--kv-hot-capacity", "0.2"],
    ["--kv-hot-capacity", "3", "--kv-scope", "shared", "--kv-policy", "s3fifo", "--kv-start", "warm"],
    ["--kv-hot-capacity", "20kB", "--kv-remote", "file://{}", "--kv-local", "0.3", "--kv-write", "back"],
]


@pytest.mark.parametrize("stack", STACKS, ids=["host", "shared", "disk"])
@pytest.mark.parametrize("serving", [[], ["--batch-size", "3", "--prefix-cache", "--admission", "continuous"]])
def test_a_tiered_trace_is_a_plain_one_with_other_costs(
    small_checkpoint: Path, prompts: Path, tmp_path: Path, stack: list[str], serving: list[str]
) -> None:
    plain = records(trace(small_checkpoint, prompts, tmp_path / "plain", *serving))
    stack = [option.format(tmp_path) for option in stack]
    parquet = ["--trace-format", "parquet"] if serving else []
    folder = trace(
        small_checkpoint, prompts, tmp_path / "tiered", *serving, *stack, *parquet, "--trace-store-block-ids"
    )
    tiered = records(folder)
    assert tiered.keys() == plain.keys()
    for key, record in tiered.items():
        assert record["selected_token_pos"] == plain[key]["selected_token_pos"]
        assert record["scores_stats"] == pytest.approx(plain[key]["scores_stats"], rel=1e-7)  # JSON has fewer digits
        assert plain[key]["kv_fetch"]["local_pool"]["hit_blocks"] == 0
    assert validate(folder).records == len(tiered)

    meta = json.loads((folder / "run_meta.json").read_bytes())
    assert meta["kv_tiers"]["home"] == ("remote_pool" if "--kv-remote" in stack else "local_pool")
    assert meta["kv_tiers"]["block_bytes"] == 4 * meta["model"]["kv_bytes_per_token_layer"]
    summary = json.loads((folder / "summary.json").read_bytes())
    assert summary["kv_tiers"]["records"] == summarize(folder)["kv_tiers"]["records"]
    found = Counter({tier: sum(r["kv_fetch"][tier]["hit_blocks"] for r in tiered.values()) for tier in TIERS})
    assert {tier: found[tier] for tier in TIERS} == {
        tier: summary["kv_tiers"]["records"][tier]["hit_blocks"] for tier in TIERS
    }
    decode = summary["kv_tiers"]["transfers"]["decode"]
    for tier in TIERS[1:]:
        traffic = decode.get(tier, {"hits": 0, "read_ops": 0, "bytes_read": 0})
        assert traffic["hits"] == traffic["read_ops"]
        assert traffic["bytes_read"] == traffic["read_ops"] * meta["kv_tiers"]["block_bytes"]
        if not serving:  # one request at a time: nothing is read for two
            assert traffic["read_ops"] == found[tier]
    tables = [json.loads(line)["kv_blocks"] for line in (folder.parent / "requests.jsonl").read_text().splitlines()]
    assert [sum(count for _, count in runs) for runs in tables] == [-(-n // 4) for n in LENGTHS]


def test_a_run_that_goes_on_says_what_it_counted(small_checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    options = ["--kv-hot-capacity", "0.2", "--requests-per-shard", "1"]
    whole = trace(small_checkpoint, prompts, tmp_path / "whole", *options)
    cut = trace(small_checkpoint, prompts, tmp_path / "cut", *options)
    log = cut.parent / "requests.jsonl"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines()[:2]))  # as if killed in the third
    trace(small_checkpoint, prompts, tmp_path / "cut", *options, "--resume")
    validate(cut)
    found, expected = (json.loads((folder / "summary.json").read_bytes())["kv_tiers"] for folder in (cut, whole))
    assert found["records"] == expected["records"]
    assert found["transfers"]["since_resume"] is True
    assert (
        found["transfers"]["decode"]["local_pool"]["read_ops"]
        < expected["transfers"]["decode"]["local_pool"]["read_ops"]
    )


def test_generate_tells_what_its_tiers_did(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "generate",
        "--ckpt-path",
        str(small_checkpoint),
        "--device",
        "cpu",
        "--prompt",
        "abcdefgh" * 5,
        "--json",
    ]
    command += ["--max-new-tokens", "6", "--temperature", "0"]
    assert run(command) == 0
    plain = json.loads(capsys.readouterr().out)
    assert run([*command, "--kv-hot-capacity", "2", "--kv-block-size", "8"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["token_ids"] == plain["token_ids"]
    assert "where KV was found and what moved" in shown.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kv-policy", "fifo"], "error: --kv-policy does nothing while all KV is on the device"),
        (["--kv-remote", "file:///tmp"], "error: --kv-remote does nothing while all KV is on the device"),
        (["--kv-hot-capacity", "half"], "error: --kv-hot-capacity 'half' is no size"),
        (["--kv-hot-capacity", "1", "--kv-local", "2"], "error: --kv-local 2 holds 2 blocks of each layer"),
        (["--kv-hot-capacity", "1", "--kv-remote", "ftp://h"], "error: the URL of the remote pool"),
        (
            ["--kv-hot-capacity", "1", "--kv-policy", "sink_recent", "--batch-size", "2"],
            "error: --kv-policy sink_recent goes by positions",
        ),
    ],
)
def test_bad_options_are_told_before_there_is_a_run(
    small_checkpoint: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str],
    message: str,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    command = ["trace", "file", str(prompts), "--ckpt-path", str(small_checkpoint), "--kv-block-size", "4"]
    assert run([*command, "--trace-out", str(out), *options]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
