"""What ``dsakv bench links`` measures and leaves behind."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from dsakv.analysis.links import LinkProfile, load_links
from dsakv.analysis.links_speeds import DiskSpeed, DiskSpeeds, MemorySpeeds
from dsakv.cli import run
from dsakv.config import Config, KvConfig, LinksConfig
from dsakv.console import Console
from dsakv.errors import DsakvError
from dsakv.jobs.bench_links import Measured, bench_links
from dsakv.kv import copy_bench, link_bench
from dsakv.report.links_report import render
from dsakv.weights import disk_bench

SIZES = (1024, 65536)


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine's caches do not matter here."""
    for name in ("ARENA", "BETWEEN"):
        monkeypatch.setattr(link_bench, name, 24 << 20)
    monkeypatch.setattr(link_bench, "LARGEST", {"local_pool": 2 << 20, "remote_pool": 1 << 20})
    monkeypatch.setattr(disk_bench, "REQUESTS", (4096, 65536))
    monkeypatch.setattr(disk_bench, "THREADS", (1, 2))
    monkeypatch.setattr(disk_bench, "LARGEST", 1 << 20)
    monkeypatch.setattr(copy_bench, "COPIED", 1 << 20)


def measured(folder: Path, remote: str | None = None, disk: str | None = None) -> Measured:
    links = LinksConfig(block_bytes=SIZES, rounds=1, device="cpu", disk=disk, out=str(folder / "new" / "mine.json"))
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
    Console(out, io.StringIO()).print_table(render(found.profile, found.batches, found.disk, found.memory))
    for title in ("host memory, to the device", "remote pool, from the device", "rows gathered on the device"):
        assert title in out.getvalue()


def test_disk_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command, with a file of its own: they are shown, and stand in the profile."""
    out = tmp_path / "new" / "mine.json"
    command = f"bench links --device cpu --block-bytes 1024 --rounds 2 --out {out}"
    assert run(command.split()) == 0
    assert [path.name for path in out.parent.iterdir()] == ["mine.json"]
    shown = capsys.readouterr().out
    about = json.loads(out.read_text())
    disk, memory = about["disk"], about["memory"]
    assert (disk["path_kind"], disk["source_bytes"], disk["read_bytes"]) == ("temporary", 1 << 20, 1 << 20)
    assert [entry[:2] for entry in disk["gb_s"]] == [[4096, 1], [4096, 2], [65536, 1], [65536, 2]]
    assert all(gb_s > 0 for *_, gb_s in disk["gb_s"])
    best = [disk["best"][name] for name in ("request_bytes", "threads", "gb_s")]
    assert best == max(disk["gb_s"], key=lambda entry: entry[2])
    assert f"disk to host memory, {'past' if disk['direct'] else 'through'} the page cache" in shown
    assert "1.0 MB of a temporary file at a time" in shown
    assert memory["host_to_host"] > 0
    assert memory["bytes"] == 1 << 20
    assert memory["host_to_device"] is memory["device_to_host"] is None
    assert "within host memory" in shown
    assert "pinned" not in shown
    assert load_links(str(out)).tiers == ("local_pool",)


def test_tables_of_a_machine_with_a_device_that_refuses_direct_reads(tmp_path: Path) -> None:
    disk = DiskSpeeds(
        "checkpoint", False, 9 << 30, 1 << 28, ((1 << 20, 1, 0.5), (1 << 20, 4, 2.25)), DiskSpeed(1 << 20, 4, 2.25)
    )
    out = io.StringIO()
    shown = render(LinkProfile("none"), {}, disk, MemorySpeeds(1 << 27, 9.5, 24.0, 23.5))
    Console(out, io.StringIO()).print_table(shown)
    rows = [line.split() for line in out.getvalue().splitlines()]
    assert "through the page cache, emptied before: direct reads are refused" in out.getvalue()
    assert ["1", "MiB", "0.50", "2.25"] in rows
    assert "Best: 1 MiB, 4 threads, 2.25 GB/s. Up to 268 MB of the checkpoint at a time." in out.getvalue()
    assert [row[-1] for row in rows if "host" in row and row[0] != "disk"] == ["9.50", "24", "23.5"]


def test_a_checkpoint_or_file_to_read(tmp_path: Path, small_checkpoint: Path) -> None:
    found = measured(tmp_path, disk=str(small_checkpoint)).disk
    files = list(small_checkpoint.glob("*.safetensors"))
    assert (found.path_kind, found.source_bytes) == ("checkpoint", sum(path.stat().st_size for path in files))
    found = measured(tmp_path, disk=str(files[0])).disk
    assert (found.path_kind, found.source_bytes) == ("file", files[0].stat().st_size)


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
        ("--disk none.bin", "none.bin is missing"),
        ("--disk configs", "configs holds no .safetensors file"),
        ("--disk /dev/null", "/dev/null is no file"),
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
