"""Every broken checkpoint and every wrong place is told before anything is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsakv.cli import run
from tests.convert.checkpoints import Tensors, hollow, make, save

COMMAND = "convert --hf-ckpt-path source --save-path out"
FIRST = "source/model-00001-of-00002.safetensors"
SECOND = "source/model-00002-of-00002.safetensors"
INDEX = "source/model.safetensors.index.json"
UP = "model.layers.0.mlp.up_proj.weight"
GATE = "model.layers.1.mlp.gate.weight"
EXPERT = "model.layers.2.mlp.experts.7.down_proj.weight"


class Case(NamedTuple):
    """A command in a folder with a good fp8 checkpoint ``source``."""

    message: str
    prepare: Callable[[], object] = lambda: None
    arguments: str = ""
    code: int = 2


def tensors(change: Callable[[Tensors], object], *, index: bool = True) -> Callable[[], None]:
    """The checkpoint with other tensors, and a fresh index or none."""

    def prepare() -> None:
        found = load_file(FIRST) | load_file(SECOND)
        change(found)
        save(Path("source"), found, 2)
        if not index:
            Path(INDEX).unlink()

    return prepare


def drop(name: str) -> Callable[[], None]:
    return tensors(lambda t: t.pop(name))


def put(name: str, tensor: torch.Tensor) -> Callable[[], None]:
    return tensors(lambda t: t.update({name: tensor}))


def config(**values: Any) -> Callable[[], None]:
    """Other values in config.json; None takes the key out."""

    def prepare() -> None:
        path = Path("source/config.json")
        changed = json.loads(path.read_text()) | values
        path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))

    return prepare


def write(path: str, content: str | bytes) -> Callable[[], None]:
    def prepare() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)

    return prepare


def odd_name(name: str) -> Callable[[], None]:
    def prepare() -> None:
        shutil.copy(FIRST, Path("source", name))

    return prepare


def circle() -> None:
    Path("circle").symlink_to("circle")


def header(text: str, data: bytes = b"") -> Callable[[], None]:
    """A first shard with this header."""
    return write(FIRST, len(text).to_bytes(8, "little") + text.encode() + data)


def in_order(*steps: Callable[[], object]) -> Callable[[], None]:
    def prepare() -> None:
        for step in steps:
            step()

    return prepare


def listed(**entries: str) -> Callable[[], None]:
    """The index with these places besides."""

    def prepare() -> None:
        index = json.loads(Path(INDEX).read_text())
        index["weight_map"] |= {name.replace("__", "."): file for name, file in entries.items()}
        Path(INDEX).write_text(json.dumps(index))

    return prepare


def stray() -> None:
    """A shard's tensor in a second file, with no index that would choose."""
    Path(INDEX).unlink()
    save_file({GATE: torch.zeros(8, 192)}, "source/stray.safetensors")


def swapped() -> None:
    os.rename(FIRST, "source/x")
    os.rename(SECOND, FIRST)
    os.rename("source/x", SECOND)


def huge() -> None:
    """A checkpoint of 17.6 TB that takes no room."""
    shutil.rmtree("source")
    hollow(Path("source"), vocab_size=1 << 31, hidden_size=2048)


SHARDS = {
    "no checkpoint": Case("no checkpoint at source", lambda: shutil.rmtree("source")),
    "no shards": Case("source holds no .safetensors file", in_order(*(Path(p).unlink for p in (FIRST, SECOND, INDEX)))),
    "missing shard": Case(f"checkpoint shard {SECOND} is missing", Path(SECOND).unlink),
    "truncated shard": Case(f"{FIRST} cannot be read: it has ", lambda: os.truncate(FIRST, 900_000)),
    "longer shard": Case(f"{FIRST} cannot be read: it has ", lambda: os.truncate(FIRST, 100_000_000)),
    "truncated header": Case(f"{FIRST} cannot be read: 100 bytes are too few", lambda: os.truncate(FIRST, 100)),
    "empty shard": Case(f"{FIRST} cannot be read: 0 bytes are too few", lambda: os.truncate(FIRST, 0)),
    "page of a proxy": Case("cannot be read", write(FIRST, "<!DOCTYPE html><html>sign in</html>")),
    "header no JSON": Case("its header is no JSON", header("{hidden")),
    "header no object": Case("its header is no JSON object", header("[1]")),
    "deep header": Case("its header is no JSON", header("[" * 100_000)),
    "name twice": Case(
        "its header names a twice",
        header(
            '{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
        ),
    ),
    "unknown dtype": Case(
        "a has the unknown dtype 'F7'", header('{"a":{"dtype":"F7","shape":[1],"data_offsets":[0,1]}}', b"x")
    ),
    "negative shape": Case(
        "shape or data_offsets of a", header('{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}', b"x")
    ),
    "no offsets": Case("its header describes a otherwise", header('{"a":{"dtype":"U8","shape":[1]}}', b"x")),
    "shape and bytes": Case(
        "a takes 1 bytes, its dtype and shape need 2",
        header('{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,1]}}', b"x"),
    ),
    "overlap": Case(
        "b begins at byte",
        header(
            '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
            b"xyz",
        ),
    ),
    "gap": Case("a begins at byte", header('{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', b"xy")),
    "in two files": Case(f"tensor {GATE} stands in two files", stray),
    "index elsewhere": Case("places elsewhere", swapped),
    "index lists more": Case("lacks tensor more.weight that", listed(more__weight="model-00001-of-00002.safetensors")),
    "index is damaged": Case(f"{INDEX} is damaged", write(INDEX, '{"weight_map": [')),
    "index lists nothing": Case(f"{INDEX} lists no tensor", write(INDEX, '{"weight_map": {}}')),
    "index leads away": Case("which is no .safetensors file of its folder", listed(a="../other.safetensors")),
}

TENSORS = {
    "missing tensor": Case(f"source lacks tensor {EXPERT}", drop(EXPERT)),
    "missing bias": Case(
        "lacks tensor model.layers.1.mlp.gate.e_score_correction_bias", drop(f"{GATE[:-6]}e_score_correction_bias")
    ),
    "missing indexer": Case(
        "lacks tensor model.layers.1.self_attn.indexer.wk.weight", drop("model.layers.1.self_attn.indexer.wk.weight")
    ),
    "missing scale": Case(f"lacks tensor {UP}_scale_inv, the scales of {UP}, which is fp8", drop(f"{UP}_scale_inv")),
    "scale without weight": Case(f"lacks tensor {UP}", drop(UP)),
    "scale of bf16": Case(
        "holds scales of a weight that is not fp8", put(UP, torch.zeros(1024, 192, dtype=torch.bfloat16))
    ),
    "scale's shape": Case(
        f"tensor {UP}_scale_inv in source has shape [8, 1], the model needs [8, 2]",
        put(f"{UP}_scale_inv", torch.ones(8, 1)),
    ),
    "scale's dtype": Case(
        f"tensor {UP}_scale_inv in source has dtype BF16",
        put(f"{UP}_scale_inv", torch.ones(8, 2, dtype=torch.bfloat16)),
    ),
    "wrong shape": Case(
        f"tensor {GATE} in source has shape [192, 8], the model needs [8, 192]", put(GATE, torch.zeros(192, 8))
    ),
    "integers": Case(f"tensor {GATE} in source has dtype I64", put(GATE, torch.zeros(8, 192, dtype=torch.int64))),
    "fp8 gate": Case(
        f"tensor {GATE} in source has dtype F8_E4M3", put(GATE, torch.zeros(8, 192).to(torch.float8_e4m3fn))
    ),
    "other fp8": Case(
        f"tensor {UP} in source has dtype F8_E5M2", put(UP, torch.zeros(1024, 192).to(torch.float8_e5m2))
    ),
    "unknown tensor": Case(
        "holds tensor model.vision.weight that the model has no place for", put("model.vision.weight", torch.zeros(2))
    ),
    "unknown layer": Case(
        "holds tensor model.layers.3.", put("model.layers.3.input_layernorm.weight", torch.zeros(192))
    ),
    "converted already": Case(
        "source lacks tensor model.embed_tokens.weight",
        tensors(lambda t: t.update(embed=t.pop("model.embed_tokens.weight"))),
    ),
}

CONFIGS = {
    "no config": Case("no model config at source/config.json", Path("source/config.json").unlink),
    "config no JSON": Case("cannot read model config source/config.json", write("source/config.json", "{")),
    "config no object": Case("source/config.json is no JSON object", write("source/config.json", "[]")),
    "other model": Case("a Llama model is not converted", config(model_type="llama")),
    "no model type": Case("model_type None is not supported", config(model_type=None, index_topk=None)),
    "missing key": Case("q_lora_rank", config(q_lora_rank=None)),
    "wrong type": Case("Expected `int`, got `str` - at `$.dim`", config(hidden_size="192")),
    "no layers": Case("n_layers is 0", config(num_hidden_layers=0)),
    "one layer more": Case("lacks tensor model.layers.3.", config(num_hidden_layers=4)),
    "one layer less": Case("holds tensor model.layers.2.", config(num_hidden_layers=2)),
    "other size": Case("the model needs [130, 192]", config(vocab_size=130)),
    "too few layer types": Case("mlp_layer_types names 1 of 3 layers", config(mlp_layer_types=["dense"])),
    "GLM shares at first": Case(
        "the first layer share", config(model_type="glm_moe_dsa", indexer_types=["shared"] * 3)
    ),
    "GLM lacks an indexer": Case(
        "lacks tensor model.layers.2.self_attn.indexer.wq_b.weight",
        in_order(
            config(model_type="glm_moe_dsa", indexer_types=["full", "shared", "full"]),
            tensors(lambda t: [t.pop(n) for n in list(t) if ".2.self_attn.indexer." in n]),
        ),
    ),
}

RANKS = {
    "experts": Case("n_routed_experts 8 does not divide among 3 ranks", arguments="--model-parallel 3"),
    "heads": Case("n_heads 4 does not divide among 8 ranks", arguments="--model-parallel 8"),
    "many ranks": Case("does not divide among 2147483647 ranks", arguments="--model-parallel 2147483647"),
    "dimension": Case(
        "vocab_size 261 does not divide among 2 ranks",
        in_order(
            config(vocab_size=261),
            tensors(
                lambda t: t.update({n: torch.zeros(261, 192) for n in ("lm_head.weight", "model.embed_tokens.weight")})
            ),
        ),
        "--model-parallel 2",
    ),
    "fp8 block": Case(
        "is fp8, and 4 ranks would cut dimension 0 of 256 within a block of 128",
        in_order(
            config(n_shared_experts=2),
            tensors(lambda t: t.update(smaller(t))),
        ),
        "--model-parallel 4",
    ),
    "n_experts": Case("--n-experts is 16, source/config.json says 8", arguments="--n-experts 16"),
}


def smaller(t: Tensors) -> Tensors:
    """Shared experts half as wide."""
    made = {}
    for name, tensor in t.items():
        if ".shared_experts." in name:
            dim = 1 if "down_proj" in name else 0
            made[name] = tensor.chunk(2, dim)[0].contiguous()
    return made


PLACES = {
    "no source": Case("--hf-ckpt-path is missing", arguments="X"),
    "odd name beside": Case("has a name that is no UTF-8", odd_name("notes-\udcff.txt")),
    "odd shard name": Case(
        "has a name that is no UTF-8", in_order(Path(INDEX).unlink, odd_name("odd-\udcff.safetensors"))
    ),
    "links in a circle": Case("leads nowhere", circle, arguments="--save-path circle"),
    "into itself": Case("lie within each other", arguments="--save-path source"),
    "below itself": Case("lie within each other", arguments="--save-path source/out"),
    "above itself": Case("lie within each other", arguments="--save-path ."),
    "half converted": Case(
        "source holds weights converted for 1 rank, and", write("source/model0-mp1.safetensors", "")
    ),
    "into a file": Case("--save-path out is no folder", write("out", "mine")),
    "foreign files": Case("out is not empty: it holds thesis.tex", write("out/thesis.tex", "mine"), code=1),
    "damaged record": Case("out/conversion.json is damaged", write("out/conversion.json", "{"), code=1),
    "foreign beside a torn journal": Case(
        "out is not empty: it holds thesis.tex",
        in_order(write("out/conversion.journal", ""), write("out/thesis.tex", "mine")),
        code=1,
    ),
    "a link to nowhere": Case("source/vocab.json is no file", lambda: os.symlink("gone", "source/vocab.json")),
    "a link to a folder": Case("source/more is no file", lambda: os.symlink("..", "source/more")),
    "disk too small": Case("the disk is too full: 17592186", huge, code=1),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("good") / "source"
    make(directory, "fp8", shards=2, extras=False)
    return directory


def contents() -> dict[str, bytes]:
    """Whatever stands at the place of the result."""
    place = Path("out")
    paths = [place, *place.rglob("*")] if place.exists() else []
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in paths}


CASES = SHARDS | TENSORS | CONFIGS | RANKS | PLACES


@pytest.mark.parametrize("name", CASES)
def test_it_is_said_before_anything_is_written(
    name: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(good, tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    for variable in ("HF_CKPT_PATH", "SAVE_PATH", "EXPERTS", "MP"):
        monkeypatch.delenv(variable, raising=False)
    case = CASES[name]
    case.prepare()
    before, listing = contents(), sorted(Path("source").rglob("*")) if Path("source").exists() else []
    arguments: Sequence[str] = [*COMMAND.split(), *case.arguments.split()]
    if name == "no source":
        arguments = ["convert", "--save-path", "out"]
    assert run(arguments) == case.code
    caught = capsys.readouterr()
    first, second = caught.err.splitlines()
    assert first.startswith("error: ")
    assert case.message in first
    assert second.startswith("hint: ")
    assert caught.out == ""
    assert contents() == before
    assert [path for path in listing if path.exists() or path.is_symlink()] == listing


def test_every_case_starts_from_a_checkpoint_that_converts(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(good, tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    assert run([*COMMAND.split(), "--model-parallel", "4"]) == 0
