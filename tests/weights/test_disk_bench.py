"""The disk bench reads what it says it reads, all of it in turn, and leaves nothing."""

from __future__ import annotations

import errno
import functools
import os
from pathlib import Path

import numpy as np
import pytest

from dsakv.errors import DsakvError, InputError
from dsakv.weights import disk_bench
from dsakv.weights.direct import ALIGN, DirectFiles
from dsakv.weights.disk_bench import DiskBench, Source, disk_source

SIZES = (3 * ALIGN + 5, 9 * ALIGN, 100, 30 * ALIGN)


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "REQUESTS": (ALIGN, 4 * ALIGN),
        "THREADS": (1, 3),
        "LARGEST": 20 * ALIGN,
        "LEAST": 8 * ALIGN,
        "_PART": 7 * ALIGN,
    }.items():
        monkeypatch.setattr(disk_bench, name, value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number, size in enumerate(SIZES):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(rng.bytes(size))
        os.utime(path, (1e9, 1e9))
    (tmp_path / "other.bin").write_bytes(b"not read")
    return tmp_path


def pages(folder: Path) -> list[bytes]:
    """Of all files in turn, none of them over two files."""
    found = []
    for number in range(len(SIZES)):
        content = (folder / f"{number}.safetensors").read_bytes()
        found += [content[at : at + ALIGN] for at in range(0, len(content), ALIGN)]
    return found


@pytest.mark.parametrize("direct", [True, False])
def test_every_page_is_read_in_turn(folder: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    if not direct:
        monkeypatch.setattr(disk_bench, "DirectFiles", functools.partial(DirectFiles, direct=False))
    with disk_source(str(folder), folder / "never made") as source:
        bench = DiskBench(source)
        expected = pages(folder)
        at = disk_bench.LEAST // ALIGN  # what was read to learn how fast the disk is
        for _ in range(3):
            for way in bench.kinds:
                assert bench._read(way) > 0
                for page in range(bench._piece // ALIGN):
                    found = bench._arena[page * ALIGN : (page + 1) * ALIGN]
                    wanted = expected[at % len(expected)]
                    assert found[: len(wanted)] == wanted
                    at += 1
        bench.round(keep=False)
        bench.round()
        for way, gb_s in zip(bench.kinds, (0.5, 3.0, 2.5, 1.0), strict=True):
            assert len(way.gb_s) == 1
            way.gb_s[:] = [9.0, gb_s, 0.1]
        speeds = bench.speeds()
    assert not (folder / "never made").exists()
    assert speeds.gb_s == ((ALIGN, 1, 0.5), (ALIGN, 3, 3.0), (4 * ALIGN, 1, 2.5), (4 * ALIGN, 3, 1.0))
    assert (speeds.best.request_bytes, speeds.best.threads, speeds.best.gb_s) == (ALIGN, 3, 3.0)
    assert (speeds.path_kind, speeds.source_bytes) == ("checkpoint", sum(SIZES))
    assert disk_bench.LEAST <= speeds.read_bytes <= disk_bench.LARGEST
    assert direct or not speeds.direct


def test_a_file_of_its_own_has_no_name(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    before = set(os.listdir("/proc/self/fd"))

    def interrupted(source: Source) -> None:
        bench = DiskBench(source)
        bench.round()
        assert bench.speeds().path_kind == "temporary"
        assert bench.speeds().source_bytes == disk_bench.LARGEST == os.stat(source.paths[0]).st_size
        assert len(set(source.paths[0].read_bytes())) == 256
        assert os.listdir(folder) == []
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), disk_source(None, folder) as source:
        interrupted(source)
    assert os.listdir(folder) == []
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: object, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk_bench, "write_all", full)
    with (
        disk_source(None, tmp_path) as source,
        pytest.raises(DsakvError, match=f"disk is full: .*{tmp_path}") as caught,
    ):
        DiskBench(source)
    assert "--disk" in caught.value.hint


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DsakvError, match=r"cannot write .*file") as caught, disk_source(None, tmp_path / "file"):
        pass
    assert "--out" in caught.value.hint


def test_what_goes_wrong_with_a_file_without_a_name_is_told_of_its_folder(tmp_path: Path) -> None:
    with disk_source(None, tmp_path) as source:
        bench = DiskBench(source)
        bench._source.paths[0].write_bytes(b"")
        with pytest.raises(DsakvError, match=f"a temporary file in {tmp_path} changed"):
            bench._read(bench.kinds[0])


def test_a_file_that_is_named_has_to_hold_something(folder: Path) -> None:
    (folder / "empty").touch()
    with pytest.raises(InputError, match=r"--disk .*empty is empty"), disk_source(str(folder / "empty"), folder):
        pass


def test_a_file_that_changes_or_goes_away(folder: Path) -> None:
    path = folder / "3.safetensors"
    with disk_source(str(path), folder) as source:
        bench = DiskBench(source)
        os.truncate(path, 5)
        with pytest.raises(DsakvError, match=r"3\.safetensors changed since it was opened"):
            bench.round()
        path.unlink()
        with pytest.raises(DsakvError, match=r"3\.safetensors is missing"):
            bench.round()
