"""A model of two layers, and checkpoints of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dsakv.errors import InputError
from dsakv.weights.checkpoint import WHOLE, Checkpoint, Part
from dsakv.weights.layout import Layout
from dsakv.weights.load import load_parameters

INDEX = "model.safetensors.index.json"
CPU = torch.device("cpu")
Tensors = dict[str, Tensor]


class Toy(nn.Module):
    """Parameters of two dtypes on ``meta``, as model families declare them."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 2, bias=False, device="meta", dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(2, device="meta", dtype=torch.float32)


class Scaled(nn.Module):
    """A float8 weight with its scales, as models that compute in fp8 declare them."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        weight = torch.empty(n, k, device="meta", dtype=torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(torch.empty(-(-n // 128), -(-k // 128), device="meta"))


def toy_tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(2, 3, generator=generator),
        "g": torch.randn(2, generator=generator),
        "b": torch.randn(2, generator=generator),
    }


NAMES = {"proj.weight": "w", "proj.scale": "w_scale", "norm.weight": "g", "norm.bias": "b"}
TOY = Layout(NAMES.__getitem__)


def nothing(names: set[str]) -> set[str]:
    return set()


def load(directory: Path, unused: Callable[[set[str]], set[str]] = nothing) -> Toy:
    model = Toy()
    fill(model, directory, Layout(NAMES.__getitem__, unused=unused))
    return model


def fill(model: nn.Module, directory: Path, layout: Layout) -> None:
    with Checkpoint(directory, layout.file) as checkpoint:
        load_parameters(model, checkpoint, layout, device=CPU)


def part_of(dim: int, number: int, total: int) -> Callable[[str], Part]:
    """Every matrix divided along ``dim``."""
    return lambda name: Part(dim, number, total) if name.endswith(("weight", "scale")) else WHOLE


def refusal(directory: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        load(directory)
    assert caught.value.hint
    return caught.value


def write(directory: Path, shards: dict[str, Tensors], index: dict[str, str] | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    for name, tensors in shards.items():
        save_file(tensors, directory / name)
    if index is not None:
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return directory


def two_shards(tensors: Tensors) -> tuple[dict[str, Tensors], dict[str, str]]:
    shards = {"a.safetensors": {"w": tensors["w"]}, "b.safetensors": {"g": tensors["g"], "b": tensors["b"]}}
    return shards, {name: file for file, own in shards.items() for name in own}


def quantized(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random float8 values ``[n, k]``, scales of their squares, and their product in float32."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, k, generator=generator).mul(100).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-n // 128), -(-k // 128), generator=generator) + 0.5
    rows, columns = torch.arange(n) // 128, torch.arange(k) // 128
    return values, scale, values.float() * scale[rows][:, columns]
