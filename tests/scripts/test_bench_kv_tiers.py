"""The bench of a plan runs every set-up that it predicts, and the runs read what the plan says."""

from __future__ import annotations

import sys
from pathlib import Path

import orjson
import pytest

from dsakv.kv import link_bench
from scripts import bench_kv_tiers


def test_predicted_beside_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DSAKV_HOME", str(tmp_path))
    monkeypatch.setattr(link_bench, "ARENA", 1 << 20)
    monkeypatch.setattr(link_bench, "BATCHES", (1, 8))
    flags = ["--no-remote", "--block-sizes", "1", "16", "--hot", "0.2", "--tokens", "700", "--steps", "3"]
    monkeypatch.setattr(sys, "argv", ["bench", *flags, "--save", str(tmp_path / "all.json")])
    bench_kv_tiers.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[2:4]] == ["1", "16"]
    assert lines[-1].startswith("one profile: ")
    assert " of 2 within 25%" in lines[-1]
    runs = orjson.loads((tmp_path / "all.json").read_bytes())
    assert all(len(one["read_us"]) == 3 and min(one["read_us"]) > 0 for one in runs)
    assert all(us for one in runs for *_, us in one["links"])
