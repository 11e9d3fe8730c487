"""What is written: the bits of an independent slicing, under the names that the ranks' models ask for."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file

from dsakv.cli import run
from dsakv.config import ConvertConfig
from dsakv.console import Console
from dsakv.distributed import World
from dsakv.jobs.convert import convert
from dsakv.models.deepseek_v32 import DeepseekV32
from dsakv.models.options import ModelOptions
from dsakv.models.shapes import dsa_shape_of, read_config
from tests.convert.checkpoints import COPIED, KINDS, Tensors, assert_same_bits, expected, make

Made = tuple[Path, Tensors]


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A checkpoint of each kind."""
    directory = tmp_path_factory.mktemp("source") / request.param
    return directory, make(directory, request.param)


def config(source: Path, target: Path, ranks: int = 1, *, workers: int = 2, verify: bool = False) -> ConvertConfig:
    return ConvertConfig(
        hf_ckpt_path=str(source), save_path=str(target), model_parallel=ranks, workers=workers, verify=verify
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_bits_equal_an_independent_slicing(made: Made, ranks: int, tmp_path: Path) -> None:
    source, tensors = made
    target = tmp_path / "out"
    # Pieces of a few bytes more than a header's line: tensors lie across them in every way.
    paths = convert(config(source, target, ranks), Console(), piece_bytes=10_007)
    assert paths == [target / f"model{rank}-mp{ranks}.safetensors" for rank in range(ranks)]
    for rank, path in enumerate(paths):
        assert_same_bits(path, expected(tensors, rank, ranks))
        with safe_open(path, framework="pt") as file:
            assert file.metadata() is None
    names = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert names == {path.name for path in paths} | COPIED | {"conversion.json"}
    for name in COPIED:
        assert (target / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_rank_loads_its_file(made: Made, ranks: int, tmp_path: Path) -> None:
    """Names and shapes are those of the model of each rank, none missing, none left over."""
    source, _ = made
    paths = convert(config(source, tmp_path / "out", ranks), Console())
    raw = read_config(source / "config.json")
    shape = dsa_shape_of(raw, "config.json")
    for rank, path in enumerate(paths):
        model = DeepseekV32(shape, ModelOptions(world=World(rank, ranks))).to_empty(device="cpu")
        wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
        found = {name: tensor.shape for name, tensor in load_file(path).items() if not name.endswith(".scale")}
        assert found == wanted
        if source.name == "f32":
            load_model(model, path, strict=True)
            assert torch.equal(
                model.norm.weight, load_file(source / _shard_of(source, "model.norm.weight"))["model.norm.weight"]
            )


def _shard_of(source: Path, name: str) -> str:
    shard: str = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"][name]
    return shard


def test_the_layout_is_the_librarys(made: Made, tmp_path: Path) -> None:
    """As if the safetensors library had saved the file."""
    source, tensors = made
    (path,) = convert(config(source, tmp_path / "out"), Console())
    save_file(expected(tensors, 0, 1), tmp_path / "theirs.safetensors")
    assert path.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_any_number_of_workers_and_any_piece(tmp_path: Path) -> None:
    make(tmp_path / "source", "fp8")
    for workers, piece_bytes in ((1, 4 << 20), (3, 1 << 16), (7, 300_001)):
        target = tmp_path / f"out{workers}"
        convert(config(tmp_path / "source", target, 2, workers=workers), Console(), piece_bytes=piece_bytes)
    for name in ("model0-mp2.safetensors", "model1-mp2.safetensors"):
        contents = {path.read_bytes() for path in tmp_path.glob(f"out*/{name}")}
        assert len(contents) == 1


def test_wide_rows_are_cut_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of rows that are longer than what is read at once."""
    tensors = make(tmp_path / "source", "bf16", shards=1)
    monkeypatch.setattr("dsakv.convert.plan.SPAN", 1500)
    monkeypatch.setattr("dsakv.convert.plan.CHUNK", 700)
    paths = convert(config(tmp_path / "source", tmp_path / "out", 2), Console(), piece_bytes=99_991)
    for rank, path in enumerate(paths):
        assert_same_bits(path, expected(tensors, rank, 2))


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    tensors = make(tmp_path / "blobs", "bf16")
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in (tmp_path / "blobs").rglob("*"):
        if path.is_file():
            place = snapshot / path.relative_to(tmp_path / "blobs")
            place.parent.mkdir(exist_ok=True)
            place.symlink_to(os.path.relpath(path, place.parent))
    (path,) = convert(config(snapshot, tmp_path / "out"), Console())
    assert_same_bits(path, expected(tensors, 0, 1))
    copies = [tmp_path / "out" / name for name in COPIED]
    assert all(copy.is_file() and not copy.is_symlink() for copy in copies)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Variables of older scripts count, the paths come out on stdout, the rest on stderr."""
    make(tmp_path / "source", "bf16")
    for name in [name for name in os.environ if name.startswith("DSAKV_CONVERT")]:
        monkeypatch.delenv(name)
    for name, value in {"HF_CKPT_PATH": "source", "SAVE_PATH": "out", "EXPERTS": "8", "MP": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    assert run(["convert"]) == 0
    caught = capsys.readouterr()
    assert caught.out.splitlines() == ["out/model0-mp2.safetensors", "out/model1-mp2.safetensors"]
    assert "converted: 10 files, " in caught.err
    assert caught.err.splitlines()[-1] == "next: dsakv generate --prompt hello --ckpt-path out"
    assert run(["convert", "--verify"]) == 0
    caught = capsys.readouterr()
    assert "verified: every byte in out is that of source" in caught.err
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    assert run(["convert"]) == 0
    assert "complete already: out" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")} == before
    assert run(["convert", "--hf-ckpt-path", "out", "--save-path", "again"]) == 2
    assert "error: out is converted already" in capsys.readouterr().err
    shutil.rmtree("out")
    assert run(["convert", "--n-experts", "16"]) == 2
    assert "--n-experts is 16, source/config.json says 8" in capsys.readouterr().err
    assert not Path("out").exists()
