"""The head of a GGUF file, whole and damaged, and the config in it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dsakv.errors import InputError
from dsakv.gguf.config import ROPE_FACTORS, gguf_config
from dsakv.gguf.header import read_header
from tests.gguf.files import HEAD_DIM, Tensors, metadata, stored, tiny_llama, write

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return stored(tiny_llama())


@pytest.fixture
def path(tensors: Tensors, tmp_path: Path) -> Path:
    return write(tmp_path / "m.gguf", tensors, gguf.GGMLQuantizationType.Q8_0)


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        gguf_config(path)
    assert str(path) in caught.value.message
    assert caught.value.hint
    return caught.value.message


def test_the_config_is_that_of_the_model(path: Path) -> None:
    config, expected = gguf_config(path), tiny_llama().config.to_dict()
    rope = expected["rope_parameters"]
    assert (config.pop("rope_theta"), config.pop("rope_scaling")) == (rope["rope_theta"], None)
    assert {key: config[key] for key in config if key != "architectures"} == {
        key: expected[key] for key in config if key != "architectures"
    }


def test_the_header_is_what_the_gguf_package_reads(path: Path) -> None:
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    kept = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == {key: pytest.approx(v) if isinstance(v, float) else v for key, v in kept.items()}
    assert {name: (t.encoding, t.shape, t.start, t.n_bytes) for name, t in ours.tensors.items()} == {
        t.name: (int(t.tensor_type), tuple(t.shape.tolist())[::-1], t.data_offset, t.n_bytes) for t in theirs.tensors
    }


def test_every_type_of_value_is_read(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        for size in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
            getattr(writer, f"add_{size}")(f"x.{size}", 7)
        writer.add_float32("x.float32", 0.1)
        writer.add_float64("x.float64", 0.1)
        writer.add_bool("x.bool", True)
        writer.add_string("x.text", "größer")
        writer.add_array("x.texts", ["a", "ü", ""])
        writer.add_array("x.numbers", [1, -2, 3])
        writer.add_array("x.floats", [0.5, 1.5])

    found = read_header(write(tmp_path / "m.gguf", {}, edit=edit)).metadata
    assert {value for key, value in found.items() if "int" in key} == {7}
    assert (found["x.float32"], found["x.float64"], found["x.bool"]) == (0.1, 0.1, True)
    assert (found["x.text"], found["x.texts"]) == ("größer", ["a", "ü", ""])
    assert (found["x.numbers"], found["x.floats"]) == ([1, -2, 3], [0.5, 1.5])


def test_no_prefix_of_a_file_is_taken_for_the_file(path: Path) -> None:
    whole = path.read_bytes()
    begin = min(tensor.start for tensor in read_header(path).tensors.values())
    for size in [*range(0, begin, 7), begin, len(whole) // 2, len(whole) - 32]:
        path.write_bytes(whole[:size])
        message = refused(path)
        assert "ends" in message or "no GGUF file" in message or "lacks" in message, message


def test_damage_is_an_error_and_never_anything_else(path: Path) -> None:
    """Bytes of the head changed at random: read as something else, or refused."""
    whole, chance = path.read_bytes(), random.Random(3)
    begin = min(tensor.start for tensor in read_header(path).tensors.values())
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(begin)] = chance.choice([0, 1, 127, 255, chance.randrange(256)])
        path.write_bytes(damaged)
        with suppress(InputError):
            gguf_config(path)


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    assert "cannot read" in refused(path)
    assert "cannot read" in refused(tmp_path)
    for content in (b"", b"GGU", b"\x80\x04pickle"):
        path.write_bytes(content)
        assert "no GGUF file" in refused(path)
    path.write_bytes(b"GGUF\0\0\0\3" + bytes(16))
    assert "big-endian" in refused(path)
    path.write_bytes(b"GGUF\1\0\0\0" + bytes(16))
    assert "version 1" in refused(path)


def test_other_architectures_are_refused(tensors: Tensors, tmp_path: Path) -> None:
    assert "of architecture qwen3" in refused(write(tmp_path / "m.gguf", tensors, architecture="qwen3"))
    experts = write(tmp_path / "m.gguf", tensors, edit=lambda writer: writer.add_expert_count(8))
    assert "mixture of experts" in refused(experts)
    part = write(tmp_path / "m.gguf", tensors, edit=lambda writer: writer.add_uint16("split.count", 3))
    assert "one of 3 parts" in refused(part)


@pytest.mark.parametrize(
    "key",
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ],
)
def test_a_missing_key_is_named(key: str, tensors: Tensors, tmp_path: Path) -> None:
    def describe(writer: gguf.GGUFWriter, kind: str) -> None:
        metadata(writer)
        del writer.kv_data[0][f"llama.{key}"]
        if kind == "wrong":
            writer.add_string(f"llama.{key}", "many")

    for kind, words in (("missing", f"llama.{key} is missing"), ("wrong", f"llama.{key} is not a")):
        assert words in refused(write(tmp_path / "m.gguf", tensors, describe=partial(describe, kind=kind)))


def test_an_unknown_quantisation_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    name = b"blk.0.ffn_down.weight"
    at = whole.index(name) + len(name) + 4 + 2 * 8
    path.write_bytes(whole[:at] + (4711).to_bytes(4, "little") + whole[at + 4 :])
    assert "blk.0.ffn_down.weight is in quantisation 4711" in refused(path)


def llama3_factors(theta: float) -> np.ndarray[Any, Any]:
    """How far transformers slows each frequency down."""
    rope = LLAMA3 | {"rope_theta": theta}
    config = LlamaConfig(head_dim=HEAD_DIM, rope_parameters=rope, max_position_embeddings=131072)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = theta ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    factors: np.ndarray[Any, Any] = (plain / scaled.numpy()).astype(np.float32)
    return factors


def test_llama_3_factors_are_understood(tensors: Tensors, tmp_path: Path) -> None:
    def write_with(factors: np.ndarray[Any, Any]) -> Path:
        return write(tmp_path / "m.gguf", tensors | {ROPE_FACTORS: factors})

    factors = llama3_factors(50000.0)
    assert math.isclose(factors[-1], 32, rel_tol=1e-5)
    assert any(1 < factor < 31 for factor in factors)
    assert gguf_config(write_with(factors))["rope_scaling"] == LLAMA3
    assert gguf_config(write_with(np.ones(HEAD_DIM // 2, np.float32)))["rope_scaling"] is None
    for wrong in (factors[::-1].copy(), factors * 1.01, factors[1:], llama3_factors(10000.0)):
        assert "other factors than those of Llama 3" in refused(write_with(wrong))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda writer: writer.add_string("llama.rope.scaling.type", "yarn"), "scales RoPE in the way 'yarn'"),
        (lambda writer: writer.add_float32("llama.rope.scale_linear", 2.0), "scales RoPE in the way 'linear'"),
        (lambda writer: writer.add_key_length(32), "differ"),
    ],
)
def test_features_of_other_models_are_refused(
    edit: Callable[[gguf.GGUFWriter], None], words: str, tensors: Tensors, tmp_path: Path
) -> None:
    assert words in refused(write(tmp_path / "m.gguf", tensors, edit=edit))


@pytest.mark.parametrize("offset", [0, 33])
def test_tensors_that_lie_where_they_cannot_are_refused(path: Path, offset: int) -> None:
    """At another's place, and between two places: what is read there would be numbers, too."""
    name = b"blk.1.attn_q.weight"
    content = bytearray(path.read_bytes())
    at = content.index(name) + len(name) + 4 + 2 * 8 + 4  # behind its dimensions and its type
    content[at : at + 8] = offset.to_bytes(8, "little")
    path.write_bytes(content)
    assert "where it cannot" in refused(path)
