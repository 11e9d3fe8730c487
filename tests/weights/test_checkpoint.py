"""A model filled from safetensors files: exactly its tensors, from any division into shards, or a clear refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsakv.errors import InputError
from dsakv.weights.checkpoint import Checkpoint, load_parameters

INDEX = "model.safetensors.index.json"
CPU = torch.device("cpu")
Tensors = dict[str, Tensor]


class Toy(nn.Module):
    """Parameters of two dtypes on ``meta``, as model families declare them."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 2, bias=False, device="meta", dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(2, device="meta", dtype=torch.float32)


def toy_tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(2, 3, generator=generator),
        "g": torch.randn(2, generator=generator),
        "b": torch.randn(2, generator=generator),
    }


NAMES = {"proj.weight": "w", "norm.weight": "g", "norm.bias": "b"}


def nothing(names: set[str]) -> set[str]:
    return set()


def load(directory: Path, unused: Callable[[set[str]], set[str]] = nothing) -> Toy:
    model = Toy()
    with Checkpoint(directory) as checkpoint:
        load_parameters(model, checkpoint, NAMES.__getitem__, device=CPU, unused=unused)
    return model


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


@pytest.mark.parametrize("layout", ["one file", "two files", "two files and an index"])
def test_parameters_are_filled_in_the_dtype_that_they_declare(layout: str, tmp_path: Path) -> None:
    tensors = toy_tensors()
    shards, index = two_shards(tensors)
    if layout == "one file":
        write(tmp_path, {"model.safetensors": tensors})
    else:
        write(tmp_path, shards, index if layout.endswith("index") else None)
    model = load(tmp_path)
    assert torch.equal(model.proj.weight, tensors["w"].bfloat16())
    assert torch.equal(model.norm.weight, tensors["g"])
    assert torch.equal(model.norm.bias, tensors["b"])
    assert model.norm.weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_floats_of_any_width_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in toy_tensors().items()}
    model = load(write(tmp_path, {"model.safetensors": tensors}))
    assert torch.equal(model.norm.weight, tensors["g"].float())


def test_files_beside_those_of_the_index_are_left_alone(tmp_path: Path) -> None:
    shards, index = two_shards(toy_tensors())
    write(tmp_path, shards | {"stray.safetensors": {"w": torch.zeros(1)}}, index)
    assert load(tmp_path).proj.weight.shape == (2, 3)


def test_tensors_without_a_part_in_the_model_may_be_ignored(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": toy_tensors() | {"mtp.w": torch.zeros(1, dtype=torch.int64)}})
    assert load(
        tmp_path, unused=lambda names: {name for name in names if name.startswith("mtp.")}
    ).norm.weight.shape == (2,)


def test_the_header_tells_dtype_and_shape(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": {"w": torch.zeros(2, 3, dtype=torch.bfloat16)}})
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.names == {"w"}
        assert checkpoint.describe("w") == ("BF16", (2, 3))


def refusal(directory: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        load(directory)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.zeros(3, 2)}, r"tensor w in .* has shape \[3, 2\], the model needs \[2, 3\]"),
        ({"w": torch.zeros(6)}, r"has shape \[6\]"),
        ({"w": torch.zeros(2, 3, dtype=torch.int64)}, "has dtype I64"),
        ({"w": torch.zeros(2, 3, dtype=torch.float64)}, "has dtype F64"),
        ({"w": torch.zeros(2, 3).to(torch.float8_e4m3fn)}, "has dtype F8_E4M3"),
        ({"extra": torch.zeros(1), "more": torch.zeros(1)}, r"holds tensor extra .* \(2 in all\)"),
    ],
)
def test_tensors_that_do_not_fit(change: Tensors, message: str, tmp_path: Path) -> None:
    error = refusal(write(tmp_path, {"model.safetensors": toy_tensors() | change}))
    assert str(tmp_path) in error.message
    with pytest.raises(InputError, match=message):
        raise error


def test_nothing_is_loaded_before_everything_is_checked(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": toy_tensors() | {"b": torch.zeros(3)}})
    model = Toy()
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(InputError, match="tensor b"):
        load_parameters(model, checkpoint, NAMES.__getitem__, device=CPU, unused=nothing)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_missing_tensor(tmp_path: Path) -> None:
    tensors = toy_tensors()
    del tensors["g"]
    assert "lacks tensor g" in refusal(write(tmp_path, {"model.safetensors": tensors})).message


def test_a_directory_without_shards(tmp_path: Path) -> None:
    assert "holds no .safetensors file" in refusal(tmp_path).message
    assert "no checkpoint at" in refusal(tmp_path / "none").message


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    write(tmp_path, {"a.safetensors": toy_tensors(), "b.safetensors": {"w": torch.zeros(2, 3)}})
    assert "tensor w stands in two files" in refusal(tmp_path).message


def test_a_missing_shard(tmp_path: Path) -> None:
    write(tmp_path, *two_shards(toy_tensors()))
    (tmp_path / "b.safetensors").unlink()
    error = refusal(tmp_path)
    assert f"shard {tmp_path / 'b.safetensors'} is missing" in error.message
    assert INDEX in error.hint


@pytest.mark.parametrize("place", [0, 7, 8, 60, -1])
def test_a_truncated_shard(place: int, tmp_path: Path) -> None:
    write(tmp_path, *two_shards(toy_tensors()))
    shard = tmp_path / "b.safetensors"
    shard.write_bytes(shard.read_bytes()[:place])
    error = refusal(tmp_path)
    assert f"shard {shard} cannot be read" in error.message
    assert "truncated" in error.hint


@pytest.mark.parametrize("content", [b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}tail", b"PK\x03\x04 a zip of pickles" * 10])
def test_a_file_that_is_no_safetensors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "cannot be read" in refusal(tmp_path).message


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"weight_map": 3}', b'{"weight_map": ["w"]}', b"\xff\xfe", b"[" * 100_000],
)
def test_a_damaged_index(content: bytes, tmp_path: Path) -> None:
    write(tmp_path, *two_shards(toy_tensors()))
    (tmp_path / INDEX).write_bytes(content)
    assert f"{INDEX} is damaged" in refusal(tmp_path).message


def test_an_index_at_odds_with_its_shards(tmp_path: Path) -> None:
    shards, index = two_shards(toy_tensors())
    write(tmp_path, shards, index | {"g": "a.safetensors"})
    assert "places elsewhere" in refusal(tmp_path).message
    write(tmp_path, shards, index | {"more": "a.safetensors"})
    assert "a.safetensors lacks tensor more" in refusal(tmp_path).message
    write(tmp_path, shards, {name: file for name, file in index.items() if name != "g"})
    assert "places elsewhere" in refusal(tmp_path).message
    write(tmp_path, shards, {})
    assert "lists no tensor" in refusal(tmp_path).message


def test_a_model_of_other_shards_reads_the_same(small_checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(small_checkpoint / "model.safetensors")
    names = sorted(tensors)
    shards = {f"model-{i}.safetensors": {name: tensors[name] for name in names[i::3]} for i in range(3)}
    index = {name: file for file, own in shards.items() for name in own}
    with Checkpoint(write(tmp_path, shards, index)) as divided, Checkpoint(small_checkpoint) as whole:
        assert divided.names == whole.names == set(names)
        for name in names:
            assert divided.describe(name) == whole.describe(name)
            assert torch.equal(divided.read(name), whole.read(name))
