"""Real layouts, loaded as the commands do: shares of a Hugging Face folder, converted folders, float8."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dsakv.jobs.model as job
from dsakv.config import ModelConfig
from dsakv.console import Console
from dsakv.distributed import World
from dsakv.errors import InputError
from dsakv.models.deepseek_v32_names import own_name
from dsakv.models.tiny import CONFIG, write_checkpoint
from tests.shapes import SMALL_SHAPE

DIVIDED = {"embed": 0, "head": 0, "wq_b": 0, "wkv_b": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}
"""Dimension that ranks divide, by the last part of a module's name: DeepSeek's own table."""
N_EXPERTS = 8
Tensors = dict[str, Tensor]


def share_of(whole: Tensors, rank: int, size: int) -> Tensors:
    """What a rank holds, under DeepSeek's names: sliced here without the loader's tables."""
    share = {}
    for theirs, tensor in whole.items():
        name = own_name(theirs)
        assert name is not None
        stem = name.split(".")[:-1]
        if "experts" in stem:
            if int(stem[stem.index("experts") + 1]) // (N_EXPERTS // size) == rank:
                share[name] = tensor
        elif stem[-1] in DIVIDED and "indexer" not in stem:
            share[name] = tensor.chunk(size, DIVIDED[stem[-1]])[rank].contiguous()
        else:
            share[name] = tensor
    return share


def convert(source: Path, target: Path, size: int) -> Path:
    target.mkdir()
    whole = load_file(source / "model.safetensors")
    for rank in range(size):
        save_file(share_of(whole, rank, size), target / f"model{rank}-mp{size}.safetensors")
    for file in ("config.json", "tokenizer.json"):
        shutil.copy(source / file, target)
    return target


def parameters(directory: Path, world: World, **options: Any) -> Tensors:
    config = ModelConfig(ckpt_path=str(directory), device="cpu", **options)
    model = job.load_model(config, world).model
    assert isinstance(model, nn.Module)
    return dict(model.named_parameters())


def quantize(whole: Tensors) -> tuple[Tensors, Tensors]:
    """Projections in float8 with scales, as released checkpoints have them, and the numbers that they stand for."""
    stored, wide = {}, {}
    for name, tensor in whole.items():
        stored[name] = wide[name] = tensor
        if "proj" not in name or "weights_proj" in name:
            continue
        n, k = tensor.shape
        rows, columns = torch.arange(n) // 128, torch.arange(k) // 128
        scale = torch.empty(-(-n // 128), -(-k // 128))
        for i in range(len(scale)):
            for j in range(scale.shape[1]):
                scale[i, j] = tensor[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128].abs().max() / 448
        values = (tensor / scale[rows][:, columns]).to(torch.float8_e4m3fn)
        stored[name], wide[name] = values, values.float() * scale[rows][:, columns]
        stored[name.replace(".weight", ".weight_scale_inv")] = scale
    return stored, wide


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_share_is_the_same_from_both_layouts(small_checkpoint: Path, tmp_path: Path, size: int) -> None:
    whole = load_file(small_checkpoint / "model.safetensors")
    converted = convert(small_checkpoint, tmp_path / "converted", size)
    for rank in range(size):
        world, expected = World(rank, size), share_of(whole, rank, size)
        for directory in (small_checkpoint, converted):
            loaded = parameters(directory, world)
            assert loaded.keys() == expected.keys()
            assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def float8_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    """A checkpoint of many squares, which shares of ranks cut, and its numbers in float32."""
    directory = tmp_path_factory.mktemp("float8")
    wider = {"hidden_size": 160, "intermediate_size": 328, "q_lora_rank": 136}
    write_checkpoint(directory, CONFIG | SMALL_SHAPE | wider)
    stored, wide = quantize(load_file(directory / "model.safetensors"))
    (directory / "model.safetensors").unlink()  # its tensors are mapped
    save_file(stored, directory / "model.safetensors")
    return directory, wide


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float8_is_widened_for_every_rank(float8_checkpoint: tuple[Path, Tensors], size: int, dtype: str) -> None:
    directory, wide = float8_checkpoint
    for rank in range(size):
        expected = share_of(wide, rank, size)
        for name, value in parameters(directory, World(rank, size), dtype=dtype).items():
            assert torch.equal(value, expected[name].to(value.dtype)), name


def test_float8_in_a_converted_folder(float8_checkpoint: tuple[Path, Tensors], tmp_path: Path) -> None:
    directory, wide = float8_checkpoint
    expected = share_of(wide, 0, 1)
    loaded = parameters(convert(directory, tmp_path / "converted", 1), World())
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_converted_folder_and_other_ranks(small_checkpoint: Path, tmp_path: Path) -> None:
    converted = convert(small_checkpoint, tmp_path / "converted", 2)
    with pytest.raises(InputError, match="was converted for 2 ranks, this run has 1"):
        parameters(converted, World())
    first = converted / "model0-mp2.safetensors"
    whole = {name: tensor.clone() for name, tensor in load_file(first).items()}  # their file is written over
    shutil.copy(first, converted / "model1-mp2.safetensors")
    with pytest.raises(InputError, match=r"lacks tensor layers\.1\.ffn\.experts\.4\.w1\.weight"):
        parameters(converted, World(1, 2))
    save_file(whole | {"layers.1.ffn.experts.7.w1.weight": torch.zeros(1)}, first)
    with pytest.raises(InputError, match=r"holds tensor layers\.1\.ffn\.experts\.7\.w1\.weight that the model has no"):
        parameters(converted, World(0, 2))
    save_file(whole | {"junk": torch.zeros(1)}, first)
    with pytest.raises(InputError, match=r"holds tensor junk that the model has no place for \(1 in all\)"):
        parameters(converted, World(0, 2))


@pytest.mark.parametrize(("size", "message"), [(3, "does not divide among 3 ranks"), (16, "among 16 ranks")])
def test_more_ranks_than_the_model_divides_among(small_checkpoint: Path, size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parameters(small_checkpoint, World(0, size))


def test_layers_that_share_leave_indexers_of_a_converted_folder(small_checkpoint: Path, tmp_path: Path) -> None:
    converted = convert(small_checkpoint, tmp_path / "converted", 1)
    config = json.loads((converted / "config.json").read_text())
    plain = {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    config |= {"model_type": "glm_moe_dsa", "indexer_types": ["full", "shared", "full"]} | plain
    (converted / "config.json").write_text(json.dumps(config))
    names = set(parameters(converted, World()))
    assert "layers.2.attn.indexer.wk.weight" in names
    assert not any(name.startswith("layers.1.attn.indexer.") for name in names)


@pytest.mark.parametrize(("rank", "shown_from", "shown"), [(0, 1, True), (1, 1, False), (0, job.SHOWN_FROM, False)])
def test_rank_0_shows_how_far_a_large_checkpoint_is(
    small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, rank: int, shown_from: int, shown: bool
) -> None:
    monkeypatch.setattr(job, "SHOWN_FROM", shown_from)
    err = io.StringIO()
    config = ModelConfig(ckpt_path=str(small_checkpoint), device="cpu", dtype="bfloat16")
    job.load_model(config, World(rank, 2), Console(io.StringIO(), err))
    assert ("loading weights: 1/1 MB" in err.getvalue()) is shown
    assert shown or not err.getvalue()
