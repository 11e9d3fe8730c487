"""Models in other places than a checkpoint folder: GGUF files, and those that come with dsakv."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from dsakv.cli import run
from dsakv.config import ModelConfig
from dsakv.console import Console
from dsakv.errors import DsakvError, InputError
from dsakv.jobs import model_files
from dsakv.jobs.model import load_model
from dsakv.jobs.model_files import find_model
from dsakv.models.indexer import IndexerShape
from dsakv.tokenizer import write_byte_tokenizer
from dsakv.weights.indexer_file import read_indexer_file
from tests.gguf.files import HIDDEN, N_LAYERS, stored, tiny_llama, write
from tests.models.llamas import save_indexers

SHAPE = IndexerShape(dim=HIDDEN, query_dim=HIDDEN, n_heads=2, head_dim=16, rope_dim=8, top_k=24)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file with tokenizer and indexers beside it."""
    folder = tmp_path_factory.mktemp("gguf")
    write_byte_tokenizer(folder)
    save_indexers(folder / "indexer.safetensors", SHAPE, N_LAYERS)
    return write(folder / "tiny.gguf", stored(tiny_llama()))


def test_a_gguf_file_generates_what_transformers_does(
    gguf: Path, prompts: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = cast(Any, tiny_llama()).eval()
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt_token_ids": ids}) + "\n" for ids in prompts))
    options = f"--ckpt-path {gguf} --device cpu --temperature 0 --max-new-tokens 12 --batch-size 3 --json"
    assert run(["generate", "--input-file", str(file), *options.split()]) == 0
    lines = sorted(map(json.loads, capsys.readouterr().out.splitlines()), key=lambda line: int(line["request_id"]))
    for ids, line in zip(prompts, lines, strict=True):
        with torch.inference_mode():
            out = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=257)
        found = out[0, len(ids) :].tolist()
        assert line["token_ids"] == (found[:-1] if found[-1] == 257 else found)


def test_a_gguf_file_cannot_be_streamed(gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "--ckpt-path", str(gguf), "--prompt", "a", "--host-budget", "1GB"]) == 2
    err = capsys.readouterr().err
    assert "error: tiny.gguf is a GGUF file" in err
    assert "hint: leave the budget out" in err


def test_a_gguf_file_with_indexers_is_traced(gguf: Path, tmp_path: Path) -> None:
    options = f"--ckpt-path {gguf} --indexer {gguf.parent / 'indexer.safetensors'} --device cpu --max-new-tokens 9"
    command = ["generate", "--prompt", "hello" * 20, "--trace-enable", "--trace-out", str(tmp_path / "run")]
    assert run([*command, *options.split()]) == 0
    model = json.loads((tmp_path / "run" / "block64" / "run_meta.json").read_text())["model"]
    assert (model["name"], model["selection"], model["index_topk"]) == ("tiny.gguf", "indexer", 24)
    assert not model["random_weights"]


def test_a_gguf_file_without_tokenizer_takes_token_ids(
    gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare.GGUF"
    bare.write_bytes(gguf.read_bytes())
    (tmp_path / "ids.jsonl").write_text('{"prompt_token_ids": [1, 2, 3]}\n')
    options = f"--ckpt-path {bare} --device cpu --max-new-tokens 2 --json"
    assert run(["generate", "--input-file", str(tmp_path / "ids.jsonl"), *options.split()]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 3
    assert run(["generate", "--prompt", "x", "--ckpt-path", str(bare)]) == 2


def test_the_default_model_is_its_base_with_the_indexers_that_come_along(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    homes: list[Path] = []

    def base(home: Path, console: Console) -> Path:
        homes.append(home)
        return gguf

    monkeypatch.setenv("DSAKV_HOME", str(tmp_path))
    monkeypatch.setattr(model_files, "ensure_default_model", base)
    monkeypatch.setattr(model_files, "INDEXER", gguf.parent / "indexer.safetensors")
    loaded = load_model(ModelConfig(device="cpu"))
    assert homes == [tmp_path]
    assert loaded.name == "smollm2-135m-dsa (base tiny.gguf)"
    assert (loaded.selection, loaded.model.top_k) == ("indexer", 24)
    assert load_model(ModelConfig(device="cpu", selection="dense")).model.top_k == 0
    assert load_model(ModelConfig(device="cpu", selection="oracle", index_topk=9)).model.top_k == 9


def test_the_indexers_that_come_along_fit_the_default_model() -> None:
    about = model_files.INDEXER.parent
    assert {path.name for path in about.iterdir()} >= {"indexer.safetensors", "README.md", "indexer_texts.md"}
    assert model_files.INDEXER.stat().st_size <= 12_000_000
    assert "@" not in (about / "README.md").read_text()
    found = read_indexer_file(model_files.INDEXER, 30, 576)
    assert found.shape == IndexerShape(dim=576, query_dim=576, n_heads=4, head_dim=64, rope_dim=32, top_k=256)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(ckpt_path="absent"), "no checkpoint at absent"),
        (ModelConfig(ckpt_path="weights.bin"), "no checkpoint at weights.bin"),
        (ModelConfig(config="config_671B_v3.2"), "--config without --ckpt-path"),
        (ModelConfig(name="tiny-random", indexer="absent"), "no indexer file at absent"),
    ],
)
def test_names_of_nothing(config: ModelConfig, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"no GGUF")
    with pytest.raises(InputError, match=message):
        find_model(config, Console())


def test_a_damaged_gguf_file(tmp_path: Path, gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf.read_bytes()[:-1000])
    assert run(["generate", "--prompt", "x", "--ckpt-path", str(cut)]) == 2
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error.startswith(f"error: {cut}")
    assert hint.startswith("hint: ")


def test_the_default_model_is_not_shared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "--model", "smollm2-135m-dsa", "--prompt", "x", "--model-parallel", "2"]) == 2
    assert "the model smollm2-135m-dsa runs on one rank" in capsys.readouterr().err


def test_an_unwritable_home(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSAKV_HOME", str(tmp_path / "file"))
        for name in ("tiny-random", "smollm2-135m-dsa"):
            with pytest.raises(DsakvError) as raised:
                find_model(ModelConfig(name=cast(Any, name)), Console())
            assert "DSAKV_HOME" in str(raised.value.hint)
