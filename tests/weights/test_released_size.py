"""A checkpoint of the released model's size: its headers alone, in sparse files."""

from __future__ import annotations

import struct
from pathlib import Path

import orjson
import pytest
import torch
from torch import nn

from dsakv.distributed import World
from dsakv.models.deepseek_v32 import DeepseekV32
from dsakv.models.deepseek_v32_names import hf_name, split_of
from dsakv.models.options import ModelOptions
from dsakv.models.shapes import dsa_shape_of, read_config
from dsakv.weights.checkpoint import Checkpoint
from dsakv.weights.layout import layout_of
from dsakv.weights.plan import plan_loading
from tests.weights.toy import INDEX

CONFIG = Path(__file__).parents[2] / "configs" / "config_671B_v3.2.json"
SHARDS = 163
META = torch.device("meta")
ITEM = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
WIDE = ("embed", "head", "gate", "weights_proj")
"""Matrices that the released checkpoint keeps in bfloat16."""


def build(world: World, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    raw = read_config(CONFIG)
    return DeepseekV32(dsa_shape_of(raw, "config"), ModelOptions(dtype, world=world))


def released_tensors(model: nn.Module) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape by name, with the layer of multi-token prediction behind the last one."""
    tensors: dict[str, tuple[str, list[int]]] = {}
    for name, parameter in model.named_parameters():
        shape, stem = list(parameter.shape), name.split(".")
        if len(shape) == 1:
            tensors[hf_name(name)] = ("F32" if name.endswith("bias") else "BF16", shape)
        elif stem[-2] in WIDE:
            tensors[hf_name(name)] = ("BF16", shape)
        else:
            tensors[hf_name(name)] = ("F8_E4M3", shape)
            tensors[hf_name(name) + "_scale_inv"] = ("F32", [-(-size // 128) for size in shape])
    extra = {name.replace(".60.", ".61."): told for name, told in tensors.items() if ".layers.60." in name}
    return tensors | extra | {"model.layers.61.eh_proj.weight": ("BF16", [7168, 14336])}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[str, list[int]]]]:
    directory, tensors = tmp_path_factory.mktemp("released"), released_tensors(build(World()))
    shards: list[dict[str, object]] = [{} for _ in range(SHARDS)]
    ends = [0] * SHARDS
    index = {}
    for number, (name, (dtype, shape)) in enumerate(tensors.items()):
        shard = number * SHARDS // len(tensors)
        begin = ends[shard]
        ends[shard] += torch.Size(shape).numel() * ITEM[dtype]
        shards[shard][name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, ends[shard]]}
        index[name] = f"model-{shard + 1:05}-of-{SHARDS:06}.safetensors"
    for shard, (entries, size) in enumerate(zip(shards, ends, strict=True)):
        header = orjson.dumps(entries)
        with (directory / f"model-{shard + 1:05}-of-{SHARDS:06}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + size)
    (directory / INDEX).write_bytes(orjson.dumps({"weight_map": index}))
    return directory, tensors


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (5, 8)])
def test_every_tensor_of_the_released_checkpoint_has_its_place(
    released: tuple[Path, dict[str, tuple[str, list[int]]]], rank: int, size: int
) -> None:
    directory, tensors = released
    assert len(tensors) > 90_000
    assert sum(path.stat().st_size for path in directory.glob("*.safetensors")) > 680e9
    world = World(rank, size)
    raw = read_config(CONFIG)
    layout = layout_of(directory, dsa_shape_of(raw, "config"), world)
    with Checkpoint(directory) as checkpoint:
        plan = plan_loading(build(world), checkpoint, layout, torch.device("cpu"))
    expected = 0
    stored = {reading.stored for reading in plan.readings}
    assert len(stored) == len(plan.readings)
    for reading in plan.readings:
        dtype, shape = tensors[reading.stored]
        split = split_of(reading.name)
        n_bytes = torch.Size(shape).numel() * ITEM[dtype] // (size if split.dim is not None else 1)
        expected += 0 if reading.mapped else n_bytes
        assert (reading.scale is not None) == (dtype == "F8_E4M3")
        assert split.expert is None or split.expert // (256 // size) == rank
    assert plan.n_bytes == expected
    experts = 58 * 3 * 256 // size
    assert sum(".mlp.experts." in name for name in stored) == experts
