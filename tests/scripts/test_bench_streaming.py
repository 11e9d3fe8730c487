"""The bench of weight streaming runs all that it compares, and its counts come out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from scripts import bench_streaming, streaming_runs, synthetic_llama

SHAPE = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def here(kind: str, **arguments: Any) -> dict[str, Any]:
    """A run in this process, which has torch loaded."""
    return streaming_runs.KINDS[kind](**arguments)


def test_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in SHAPE.items():
        monkeypatch.setitem(synthetic_llama.CONFIG, name, value)
    monkeypatch.setattr(synthetic_llama, "NOISE", 1 << 16)
    monkeypatch.setattr(streaming_runs, "MOST", 2)
    monkeypatch.setattr(bench_streaming, "BESIDE", 1 << 40)  # this process is that of all tests
    alone = bench_streaming.child
    monkeypatch.setattr(bench_streaming, "child", here)
    monkeypatch.setattr(bench_streaming, "has_accelerate", lambda: False)
    flags = ["--size-gb", "0.001", "--budget", "400000B", "--prompt", "6", "--steps", "3", "--rounds", "1"]
    places = ["--dir", str(tmp_path / "made"), "--save", str(tmp_path / "all.json")]
    monkeypatch.setattr(sys, "argv", ["bench", *flags, *places])
    assert bench_streaming.main() == 0
    out = capsys.readouterr().out
    assert "accelerate is not installed" in out
    assert "MISSED" not in out
    found = orjson.loads((tmp_path / "all.json").read_bytes())
    streamed, half = found["rounds"][0]["stream"], found["half"]
    assert 0 < half["decode"]["disk"]["bytes"] < streamed["decode"]["disk"]["bytes"]
    assert found["resident"]["counted_bytes"] == 0
    assert len(list((tmp_path / "made").glob("*.safetensors"))) > 2

    monkeypatch.setattr(bench_streaming, "BESIDE", 0)
    monkeypatch.setattr(bench_streaming, "measure", lambda *_: found | {"overlap": {}})
    assert bench_streaming.main() == 1
    assert "missed: peak memory" in capsys.readouterr().err
    last = alone("plain", folder=str(tmp_path / "made"), request=1 << 16, threads=2)
    assert last["bytes"] == sum(path.stat().st_size for path in (tmp_path / "made").glob("*.safetensors"))
