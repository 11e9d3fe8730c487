"""What ``dsakv bench links`` measures and leaves behind."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from dsakv.analysis.links import load_links
from dsakv.cli import run
from dsakv.config import Config, KvConfig, LinksConfig
from dsakv.console import Console
from dsakv.errors import DsakvError
from dsakv.jobs.bench_links import Measured, bench_links
from dsakv.kv import link_bench
from dsakv.report.links_report import render

SIZES = (1024, 65536)


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine's caches do not matter here."""
    for name in ("ARENA", "BETWEEN"):
        monkeypatch.setattr(link_bench, name, 24 << 20)
    monkeypatch.setattr(link_bench, "LARGEST", {"local_pool": 2 << 20, "remote_pool": 1 << 20})


def measured(folder: Path, remote: str | None = None) -> Measured:
    links = LinksConfig(block_bytes=SIZES, rounds=1, device="cpu", out=str(folder / "new" / "mine.json"))
    return bench_links(Config(kv=KvConfig(remote=remote), links=links), Console(io.StringIO(), io.StringIO()))


def test_a_profile_of_both_pools(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    found = measured(tmp_path, pool.as_uri())
    assert not list(pool.iterdir())
    profile = load_links(str(found.out))
    assert profile == found.profile
    assert (profile.name, profile.measured, profile.tiers) == ("mine", True, ("local_pool", "remote_pool"))
    assert profile.hbm is not None
    for tier in profile.tiers:
        link = profile.pool(tier)
        assert link is not None
        assert link.read.block_us(1024) < link.read.block_us(65536) * 2
    about = json.loads(found.out.read_text())
    assert about["threads"] == torch.get_num_threads()
    assert [entry[:2] for entry in about["batches"]["remote_pool read"]] == [
        [size, n] for size in SIZES for n in link_bench.BATCHES if size * n <= 1 << 20
    ]
    assert all(us > 0 for entries in about["batches"].values() for *_, us in entries)
    out = io.StringIO()
    Console(out, io.StringIO()).print_table(render(found.profile, found.batches))
    for title in ("host memory, to the device", "remote pool, from the device", "rows gathered on the device"):
        assert title in out.getvalue()


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    """The batches are real ones: blocks arrive in frames, and come home again."""
    bench = link_bench.LinkBench([4096], None, torch.device("cpu"), 5.0)
    kinds = {(kind.direction, kind.blocks): kind for kind in bench.kinds if kind.tier == "local_pool"}
    bench._arena.blocks.fill_(3.0)
    assert kinds["read", 64].once() > 0
    assert int((bench._frames == 3.0).sum()) == 64 * 1024
    bench._frames.fill_(5.0)
    assert kinds["write", 16].once() > 0
    assert int((bench._arena.blocks == 5.0).sum()) == 16 * 1024
    bench.close()


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--block-bytes 1023", "--block-bytes must be multiples of 4"),
        ("--out links.txt", "does not end in .json"),
        ("--device cuda", "sees no CUDA device"),
        ("--kv-remote nothing://here", "no scheme that is known"),
        ("--kv-hot-capacity 4", "--kv-hot-capacity"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(capsys: pytest.CaptureFixture[str], flags: str, error: str) -> None:
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is one")
    assert run(["bench", "links", *flags.split()]) == 2
    said = capsys.readouterr().err.splitlines()
    assert error in said[0]
    assert said[1].startswith("hint: ")


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "new").write_text("in the way")
    with pytest.raises(DsakvError, match="new"):
        measured(tmp_path)
