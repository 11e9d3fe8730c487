"""Which folders hold converted weights, and for how many ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsakv.errors import InputError
from dsakv.layout import check_converted, converted_file, converted_ranks


def make(directory: Path, files: list[str]) -> Path:
    for file in files:
        (directory / file).touch()
    return directory


@pytest.mark.parametrize(
    ("files", "ranks"),
    [
        ([], None),
        (["config.json", "model.safetensors"], None),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], None),
        (["model01-mp2.safetensors", "model0-mp0.safetensors", "xmodel0-mp1.safetensors"], None),
        (["model0-mp1.safetensors"], 1),
        (["model0-mp2.safetensors", "model1-mp2.safetensors", "config.json", "tokenizer.json"], 2),
        ([f"model{rank}-mp12.safetensors" for rank in range(12)], 12),
        (["model0-mp1.safetensors", "model1-mp2.safetensors.part"], 1),  # unfinished files have other names
    ],
)
def test_how_many_ranks_a_folder_is_for(files: list[str], ranks: int | None, tmp_path: Path) -> None:
    assert converted_ranks(make(tmp_path, files)) == ranks
    assert converted_ranks(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["model0-mp1.safetensors", "model0-mp2.safetensors", "model1-mp2.safetensors"],
            "{} holds weights converted for 1 and for 2 ranks",
        ),
        (
            ["model0-mp2.safetensors", "model1-mp2.safetensors", "model.safetensors"],
            "{} holds weights converted for 2 ranks, and model.safetensors beside them",
        ),
        (
            ["model0-mp1.safetensors", "model1-mp1.safetensors"],
            "{} holds weights converted for 1 rank, and model1-mp1.safetensors beside them",
        ),
        (
            ["model0-mp4.safetensors", "model3-mp4.safetensors"],
            "{} was converted for 4 ranks, but model1-mp4.safetensors is missing (2 in all)",
        ),
    ],
)
def test_folders_that_make_no_sense(files: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        converted_ranks(make(tmp_path, files))
    assert caught.value.message == message.format(tmp_path)
    assert caught.value.hint
    assert caught.value.exit_code == 2


def test_ranks_must_be_as_many_as_the_folder_is_for(tmp_path: Path) -> None:
    assert not check_converted(tmp_path, 3)
    make(tmp_path, [converted_file(rank, 2) for rank in range(2)])
    assert check_converted(tmp_path, 2)
    with pytest.raises(InputError) as caught:
        check_converted(tmp_path, 4)
    assert caught.value.message == f"{tmp_path} was converted for 2 ranks, this run has 4"
    assert caught.value.hint == "run it with 2, convert the checkpoint for 4, or name the Hugging Face folder itself"
