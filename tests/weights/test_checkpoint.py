"""A directory of safetensors files read as one table: any division into shards, or a clear refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsakv.errors import DsakvError
from dsakv.weights.checkpoint import Checkpoint, Part, Stored
from tests.weights.toy import INDEX, load, refusal, toy_tensors, two_shards, write


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
        assert checkpoint.tensors == {"w": Stored("BF16", (2, 3), (0, 0))}


def test_parts_and_wholes_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    whole = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    write(tmp_path, {"model.safetensors": {"w": whole}})
    content = (tmp_path / "model.safetensors").read_bytes()
    with Checkpoint(tmp_path) as checkpoint:
        mapped = checkpoint.read("w")
        rows, columns = checkpoint.read("w", Part(0, 1, 3)), checkpoint.read("w", Part(1, 3, 4))
    assert torch.equal(mapped, whole)
    assert torch.equal(rows, whole[2:4])
    assert torch.equal(columns, whole[:, 6:8])
    assert rows.data_ptr() == mapped[2:4].data_ptr()
    assert columns.data_ptr() == mapped[:, 6:].data_ptr()
    mapped.zero_()  # of this process alone
    assert (tmp_path / "model.safetensors").read_bytes() == content


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
        assert set(divided.tensors) == set(whole.tensors) == set(names)
        for name in names:
            assert divided.tensors[name][:2] == whole.tensors[name][:2]
            assert torch.equal(divided.read(name), whole.read(name))


def test_where_tensors_are_is_told_of_the_files_that_were_opened(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": toy_tensors()})
    file = tmp_path / "model.safetensors"
    with Checkpoint(tmp_path) as checkpoint:
        for name, place in checkpoint.locate().items():
            tensor = checkpoint.read(name)
            raw = file.read_bytes()[place.begin : place.begin + tensor.numel() * tensor.element_size()]
            assert raw == tensor.contiguous().view(torch.uint8).numpy().tobytes()
        copy = tmp_path / "copy"
        copy.write_bytes(file.read_bytes())
        copy.replace(file)
        with pytest.raises(DsakvError, match="changed since it was opened"):
            checkpoint.locate()
