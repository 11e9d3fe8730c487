"""``--verify`` finds any byte that differs, and says where."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsakv.cli import run
from dsakv.header import Stored, read_shard
from tests.convert.checkpoints import make
from tests.convert.test_convert_resume import flip

COMMAND = "convert --hf-ckpt-path source --save-path out --model-parallel 2"
RANK1 = "out/model1-mp2.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``source`` and its conversion ``out``."""
    folder = tmp_path_factory.mktemp("verify")
    make(folder / "source", "fp8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(COMMAND.split()) == 0
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder is a copy, with other times on the source's files."""
    shutil.copytree(made, tmp_path / "copied", copy_function=shutil.copyfile)
    monkeypatch.chdir(tmp_path / "copied")


def tensors(path: Path) -> list[Stored]:
    with open(path, "rb") as file:
        return read_shard(path, file, path.stat().st_size, 0).tensors


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_is_found(data: st.DataObject, copied: None, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(data.draw(st.sampled_from([RANK1, RANK1.replace("model1", "model0")])))
    tensor = data.draw(st.sampled_from(tensors(path)))
    place = tensor.start + data.draw(st.integers(0, tensor.size - 1))
    flip(path, place)
    assert run([*COMMAND.split(), "--verify"]) == 1
    assert (
        f"{path.name} differs from the checkpoint in tensor {tensor.name}, at byte {place}" in capsys.readouterr().err
    )
    flip(path, place)


def test_of_several_differences_the_first_is_named(copied: None, capsys: pytest.CaptureFixture[str]) -> None:
    places = [tensor.start for tensor in tensors(Path(RANK1))[5:40:7]]
    for place in places:
        flip(Path(RANK1), place)
    assert run([*COMMAND.split(), "--verify"]) == 1
    assert f"at byte {places[0]} of the file" in capsys.readouterr().err


def edit(name: str, change: Callable[[str], str]) -> Callable[[], object]:
    return lambda: Path(name).write_text(change(Path(name).read_text()))


def redigest(text: str) -> str:
    record = json.loads(text)
    record["files"][1]["digest"] = "0" * 64
    return json.dumps(record)


def rename(text: str) -> str:
    record = json.loads(text)
    record["files"].pop()
    return json.dumps(record)


class Case(NamedTuple):
    message: str
    harm: Callable[[], object]
    always: bool = True
    """Whether it is found without --verify too."""


CASES = {
    "header": Case("differs from the checkpoint in its header, at byte 9", lambda: flip(Path(RANK1), 9), False),
    "gone": Case(f"{RANK1} is missing", Path(RANK1).unlink),
    "short": Case(f"{RANK1} has 100 bytes", lambda: os.truncate(RANK1, 100)),
    "copy gone": Case("out/tokenizer.json is missing", Path("out/tokenizer.json").unlink),
    "copy changed": Case(
        "out/chat_template.jinja differs", edit("out/chat_template.jinja", lambda t: t.swapcase()), False
    ),
    "digest": Case(f"another digest for {Path(RANK1).name}", edit("out/conversion.json", redigest), False),
    "record": Case("names other files", edit("out/conversion.json", rename)),
}


@pytest.mark.parametrize("name", CASES)
def test_harm_is_found(name: str, copied: None, capsys: pytest.CaptureFixture[str]) -> None:
    # The source's times changed with the copy: without --verify they must be those that were noted.
    order = json.loads(Path("out/conversion.json").read_text())["order"]
    for noted in order["sources"]:
        os.utime(f"source/{noted['name']}", ns=(noted["mtime_ns"], noted["mtime_ns"]))
    CASES[name].harm()
    for flags in ([], ["--verify"]):
        found = bool(flags) or CASES[name].always
        assert run([*COMMAND.split(), *flags]) == (1 if found else 0)
        error = capsys.readouterr().err
        assert (CASES[name].message in error) == found
        assert ("hint: " in error) == found


def test_times_of_the_source_count_only_without_it(copied: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*COMMAND.split(), "--verify"]) == 0
    assert "verified: every byte in out is that of source" in capsys.readouterr().err
    assert run(COMMAND.split()) == 1
    assert "another checkpoint, or this one before it changed" in capsys.readouterr().err


def test_another_checkpoint_is_no_match(copied: None, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("source")
    make(Path("source"), "bf16")
    assert run([*COMMAND.split(), "--verify"]) == 1
    assert "out holds another conversion (another checkpoint" in capsys.readouterr().err
