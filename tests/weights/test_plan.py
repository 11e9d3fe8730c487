"""Every checkpoint that does not fit is refused, by name, before a weight is read."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import torch
from torch import nn

from dsakv.errors import InputError
from dsakv.weights.checkpoint import Checkpoint, Part
from dsakv.weights.layout import Layout
from dsakv.weights.load import load_parameters
from dsakv.weights.plan import plan_loading
from tests.weights.toy import CPU, NAMES, TOY, Scaled, Tensors, Toy, load, part_of, quantized, toy_tensors, write

F8 = torch.float8_e4m3fn
W8 = torch.zeros(2, 3).to(F8)
ONE = torch.ones(1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.zeros(3, 2)}, "tensor w in {} has shape [3, 2], the model needs [2, 3]"),
        ({"w": torch.zeros(6)}, "tensor w in {} has shape [6], the model needs [2, 3]"),
        ({"w": torch.zeros(2, 3, dtype=torch.int64)}, "tensor w in {} has dtype I64"),
        ({"w": torch.zeros(2, 3, dtype=torch.float64)}, "tensor w in {} has dtype F64"),
        ({"g": torch.zeros(2).to(F8)}, "tensor g in {} has dtype F8_E4M3"),
        ({"w": torch.zeros(2, 3).to(torch.float8_e5m2)}, "tensor w in {} has dtype F8_E5M2"),
        ({"extra": ONE, "more": torch.ones(2)}, "{} holds tensor extra that the model has no place for (2 in all)"),
        ({"g": None}, "{} lacks tensor g"),
        ({"w": W8}, "{} lacks tensor w_scale, the scales of w"),
        ({"w": W8, "w_scale": torch.ones(2, 1)}, "tensor w_scale in {} has shape [2, 1], squares of 128 need [1, 1]"),
        ({"w": W8, "w_scale": torch.ones(1)}, "tensor w_scale in {} has shape [1], squares of 128 need [1, 1]"),
        ({"w": W8, "w_scale": ONE.bfloat16()}, "tensor w_scale in {} has dtype BF16"),
        ({"w_scale": ONE}, "{} holds scales w_scale, but w is in F32"),
    ],
)
def test_tensors_that_do_not_fit(change: dict[str, torch.Tensor | None], message: str, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in (toy_tensors() | change).items() if tensor is not None}
    write(tmp_path, {"model.safetensors": tensors})
    model = Toy()
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(InputError) as caught:
        load_parameters(model, checkpoint, TOY, device=CPU)
    assert caught.value.message == message.format(tmp_path)
    assert caught.value.hint
    assert caught.value.exit_code == 2
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("tensors", "layout", "message"),
    [
        (
            {"weight": torch.zeros(256, 256), "scale": torch.ones(2, 2)},
            Layout(),
            "tensor weight in {} has dtype F32, the model needs F8_E4M3",
        ),
        (
            {"weight": torch.zeros(256, 512).to(F8), "scale": torch.ones(2, 2)},
            Layout(),
            "tensor weight in {} has shape [256, 512], the model needs [256, 256]",
        ),
        ({"weight": torch.zeros(256, 256).to(F8)}, Layout(), "{} lacks tensor scale"),
        (
            {"weight": torch.zeros(256, 256).to(F8), "scale": torch.ones(2, 1)},
            Layout(),
            "tensor scale in {} has shape [2, 1], the model needs [2, 2]",
        ),
    ],
)
def test_float8_parameters_take_float8_with_their_scales(
    tensors: Tensors, layout: Layout, message: str, tmp_path: Path
) -> None:
    write(tmp_path, {"model.safetensors": tensors})
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(InputError) as caught:
        plan_loading(Scaled(256, 256), checkpoint, layout, CPU)
    assert caught.value.message == message.format(tmp_path)


@pytest.mark.parametrize("dim", [0, 1])
def test_squares_that_ranks_would_share(dim: int, tmp_path: Path) -> None:
    """A rank would need half a scale: it must not happen by rounding sizes up."""
    write(tmp_path, {"model.safetensors": {"weight": torch.zeros(128, 128).to(F8), "scale": torch.ones(1, 1)}})
    shape = [128, 128]
    shape[dim] = 64
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(InputError) as caught:
        plan_loading(Scaled(*shape), checkpoint, Layout(part=part_of(dim, 1, 2)), CPU)
    assert "weight in" in caught.value.message
    assert "128 does not divide among 2 ranks in squares of 128" in caught.value.message


def test_two_parameters_of_one_tensor_are_a_mistake_of_the_names(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": toy_tensors()})
    names = NAMES | {"norm.bias": "g"}
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(RuntimeError) as caught:
        plan_loading(Toy(), checkpoint, replace(TOY, stored_name=names.__getitem__), CPU)
    assert str(caught.value) == "norm.weight and norm.bias are both stored as g"


def test_readings_follow_the_files(tmp_path: Path) -> None:
    """Whatever order the model has: a disk reads best from front to back."""

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i in range(12):
                self.register_parameter(f"p{i}", nn.Parameter(torch.empty(4, device="meta", dtype=torch.bfloat16)))

    tensors = {f"p{i}": torch.zeros(4, dtype=torch.float32 if i % 3 else torch.bfloat16) for i in range(12)}
    shards = {"b.safetensors": {n: tensors[n] for n in tensors if int(n[1:]) % 2}, "a.safetensors": {}}
    shards["a.safetensors"] = {n: tensors[n] for n in tensors if n not in shards["b.safetensors"]}
    write(tmp_path, shards)
    with Checkpoint(tmp_path) as checkpoint:
        plan = plan_loading(Many(), checkpoint, Layout(), CPU)
        places = [checkpoint.tensors[reading.stored].place for reading in plan.readings]
        where = [checkpoint.read(reading.stored).data_ptr() for reading in plan.readings]
    assert places == sorted(places)
    assert where[:6] == sorted(where[:6])
    assert where[6:] == sorted(where[6:])
    # What is stored as it is needed stays in the file.
    assert {reading.name: reading.n_bytes for reading in plan.readings} == {
        f"p{i}": 16 * (i % 3 > 0) for i in range(12)
    }
    assert plan.n_bytes == 8 * 16


def test_what_a_rank_reads_is_counted(tmp_path: Path) -> None:
    values, scale, _ = quantized(256, 512)
    write(tmp_path, {"model.safetensors": {"weight": values, "scale": scale}})
    with Checkpoint(tmp_path) as checkpoint:
        model = nn.Linear(128, 256, bias=False, device="meta")
        plan = plan_loading(model, checkpoint, Layout(part=part_of(1, 3, 4)), CPU)
    assert plan.n_bytes == 256 * 128
    assert plan.readings[0].part == Part(1, 3, 4)


def header(text: bytes, data: int = 0) -> bytes:
    return struct.pack("<Q", len(text)) + text + bytes(data)


def entry(**fields: object) -> bytes:
    return orjson.dumps({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | fields})


@pytest.mark.parametrize(
    "content",
    [
        header(b"{"),
        header(b"[]"),
        header(b'{"w": 3}'),
        struct.pack("<Q", 1 << 60) + b"{}",
        header(entry(), 23),
        header(entry(), 25),
        header(entry(dtype="F33"), 24),
        header(entry(shape=[2, -3]), 24),
        header(entry(shape=[2, 4]), 24),
        header(entry(shape=[1 << 62, 4]), 24),
        header(entry(data_offsets=[24, 0]), 24),
        header(entry(data_offsets=[8, 32]), 32),
        header(entry(data_offsets=[0, 1 << 62]), 24),
    ],
)
def test_a_header_that_makes_no_sense(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert caught.value.message.startswith(f"checkpoint shard {tmp_path / 'model.safetensors'} cannot be read: ")
    assert caught.value.hint == "it is truncated or damaged: download it again"


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_an_index_that_cannot_be_read(make: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": toy_tensors()})
    index = tmp_path / "model.safetensors.index.json"
    make(index)
    if index.exists():
        with pytest.raises(InputError, match="is damaged"):
            load(tmp_path)
    else:  # as one that a download left behind: there is no index
        assert load(tmp_path).norm.weight.shape == (2,)
