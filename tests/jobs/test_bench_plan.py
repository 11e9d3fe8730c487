"""`dsakv bench plan` says before a run what the run then counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsakv.cli import run
from dsakv.weights.slots import Loader

SIZES = ["--input-len", "20", "--max-new-tokens", "3"]


@pytest.fixture
def shell(
    small_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[str, str]]:
    monkeypatch.chdir(tmp_path)

    def call(command: str, *options: str, code: int = 0) -> tuple[str, str]:
        """stdout and stderr."""
        given = [*command.split(), "--ckpt-path", str(small_checkpoint), "--device", "cpu", *SIZES, *options]
        assert run(given) == code
        caught = capsys.readouterr()
        return caught.out, caught.err

    return call


@pytest.mark.parametrize(
    "options",
    [
        ["--stream-unit", "layer", "--host-budget", "1100KB", "--prefetch-depth", "1"],
        ["--stream-unit", "sublayer", "--host-budget", "1MB", "--prefetch-depth", "2"],
        ["--stream-unit", "sublayer", "--host-budget", "2GB"],
        ["--host-budget", "840KB", "--dtype", "bfloat16", "--batch-size", "2", "--prefetch-depth", "1"],
    ],
)
def test_what_is_planned_is_what_moves(shell: Callable[..., tuple[str, str]], options: list[str]) -> None:
    plan: dict[str, Any] = json.loads(shell("bench plan", "--json", *options)[0])
    results = json.loads(shell("bench", "--json", "--warmup-rounds", "0", "--rounds", "2", *options)[0])
    assert results["placement"].pop("direct") == plan["bound"]["direct"]
    assert plan["weights"] == results["placement"]
    assert results["rejected"] == []
    for kind, name in (("decode", "decode_step"), ("prefill", "prefill_pass")):
        link = results["links"][kind]
        for which in ("disk", "device"):
            low, high = plan["bound"][name][f"{which}_bytes"]
            each = link[which]["bytes"] / link["passes"]
            assert low <= each <= high
            assert low == high or plan["weights"]["n_experts"]


def test_a_plan_reads_no_weight(shell: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loader, "read", lambda *_: pytest.fail("a unit was read"))
    out, err = shell("bench plan", "--stream-unit", "layer", "--host-budget", "1100KB", "--prefetch-depth", "1")
    for words in ("weights", "on disk", "KV cache", "decode step", "GB/s, measured now"):
        assert words in out
    assert "loading weights" not in err


def test_without_a_budget_all_are_loaded(shell: Callable[..., tuple[str, str]]) -> None:
    out, _ = shell("bench plan", "--kv-hot-capacity", "2", "--kv-block-size", "4")
    assert "All are loaded" in out
    assert "home is the local pool" in out
    document = json.loads(shell("bench plan", "--json", "--kv-block-size", "4")[0])
    assert document["weights"] is None
    assert document["bound"] is None
    assert document["kv"]["blocks"] == 6  # of 22 tokens: the last new one's KV is never needed
    assert document["kv"]["hot_bytes"] == document["kv"]["row_bytes"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host-budget", "1KB"], "too small"),
        (["--host-budget", "8"], "is no size"),
        (["--device-budget", "1GB"], "runs on CPU"),
        (["--prefetch-depth", "3"], "does nothing while all weights are loaded"),
        (["--host-budget", "1GB", "--io-request", "1000B"], "--io-request"),
        (["--host-budget", "1GB", "--expert-policy", "lfu", "--stream-unit", "layer"], "--expert-policy"),
    ],
)
def test_budgets_that_do_not_work(shell: Callable[..., tuple[str, str]], options: list[str], words: str) -> None:
    for command in ("bench plan", "bench"):
        _, err = shell(command, *options, code=2)
        assert words in err
        assert "hint: " in err
