"""Weights of a GGUF file: transformers' own, bit by bit, or what the gguf package makes of a quantisation."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Encoding
from torch import nn
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from dsakv.errors import InputError
from dsakv.weights.checkpoint import Part
from dsakv.weights.gguf import GgufCheckpoint, half_split
from dsakv.weights.layout import Layout
from dsakv.weights.load import load_parameters
from tests.gguf.files import HEAD_DIM, N_HEADS, N_KV_HEADS, VOCAB, metadata, stored, tiny_llama, turned, write


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}])
def test_the_weights_are_those_of_the_model(changes: dict[str, bool], tmp_path: Path) -> None:
    model = tiny_llama(**changes)
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    with GgufCheckpoint(write(tmp_path / "m.gguf", stored(model))) as checkpoint:
        assert set(checkpoint.tensors) == set(expected)
        for name, value in expected.items():
            found = checkpoint.read(name)
            assert (checkpoint.tensors[name].dtype, found.dtype) == ("F32", torch.float32)
            assert checkpoint.tensors[name].shape == found.shape
            assert torch.equal(found, value), name


@pytest.mark.parametrize(
    ("encoding", "dtype"),
    [(Encoding.F16, "F16"), (Encoding.BF16, "BF16"), (Encoding.Q4_1, "F32"), (Encoding.Q8_0, "F32")],
)
def test_each_encoding_is_what_the_gguf_package_makes_of_it(encoding: Encoding, dtype: str, tmp_path: Path) -> None:
    tensors = stored(tiny_llama())
    path = write(tmp_path / "m.gguf", tensors, encoding)
    decoded = {
        name: torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(array, encoding), encoding).copy())
        for name, array in tensors.items()
        if array.ndim > 1
    }
    with GgufCheckpoint(path) as checkpoint:
        for name, ours in (("token_embd", "model.embed_tokens"), ("blk.1.ffn_down", "model.layers.1.mlp.down_proj")):
            assert checkpoint.tensors[f"{ours}.weight"].dtype == dtype
            assert torch.equal(checkpoint.read(f"{ours}.weight").float(), decoded[f"{name}.weight"])
        for name, heads in (("q", N_HEADS), ("k", N_KV_HEADS)):
            found = checkpoint.read(f"model.layers.0.self_attn.{name}_proj.weight").float().numpy()
            assert np.array_equal(turned(found, heads), decoded[f"blk.0.attn_{name}.weight"].numpy())
        assert checkpoint.tensors["model.norm.weight"].dtype == "F32"


def test_transformers_reads_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", stored(tiny_llama()), Encoding.Q8_0)
    theirs = load_gguf_checkpoint(  # type: ignore[no-untyped-call]
        str(path), return_tensors=True, model_to_load=tiny_llama()
    )["tensors"]
    with GgufCheckpoint(path) as checkpoint:
        assert set(theirs) == set(checkpoint.tensors)
        for name, value in theirs.items():
            assert torch.equal(checkpoint.read(name), value), name


@pytest.mark.parametrize("encoding", [Encoding.F32, Encoding.Q8_0])
def test_parts_are_cut_from_the_whole(encoding: Encoding, tmp_path: Path) -> None:
    with GgufCheckpoint(write(tmp_path / "m.gguf", stored(tiny_llama()), encoding)) as checkpoint:
        for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
            whole = checkpoint.read(name)
            for dim in (0, 1):
                parts = [checkpoint.read(name, Part(dim, number, 2)) for number in range(2)]
                assert torch.equal(torch.cat(parts, dim), whole)


def test_a_model_is_filled_from_it(tmp_path: Path) -> None:
    """By the loader of checkpoint folders; what it filled stays when the file is closed, and may be written to."""

    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCAB, 64, device="meta", dtype=torch.bfloat16)
            self.norm = nn.RMSNorm(64, device="meta", dtype=torch.float32)

    source = tiny_llama()
    path = write(tmp_path / "m.gguf", stored(source))
    before = path.read_bytes()
    names = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    layout = Layout(names.__getitem__, unused=lambda found: found - set(names.values()))
    model = Output()
    with GgufCheckpoint(path) as checkpoint:
        load_parameters(model, checkpoint, layout, device=torch.device("cpu"))
    assert torch.equal(model.embed.weight, source.model.embed_tokens.weight.bfloat16())
    assert torch.equal(model.norm.weight, source.model.norm.weight)
    model.norm.weight.data.zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("n_heads", [1, 3])
def test_half_split_undoes_the_order_of_gguf(n_heads: int) -> None:
    rows = torch.arange(n_heads * HEAD_DIM * 2).reshape(-1, 2)
    assert torch.equal(half_split(torch.from_numpy(turned(rows.numpy(), n_heads)), n_heads), rows)
    bias = rows[:, 0].contiguous()
    assert torch.equal(half_split(torch.from_numpy(turned(bias.numpy(), n_heads)), n_heads), bias)


def refused(path: Path) -> InputError:
    with pytest.raises(InputError) as caught, GgufCheckpoint(path):
        pass
    assert str(path) in caught.value.message
    assert caught.value.hint
    return caught.value


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    for name in ("blk.0.attn_qkv.weight", "blk.x.attn_q.weight", "extra.weight", "blk.0.attn_q.scale"):
        path = write(tmp_path / "m.gguf", stored(tiny_llama()) | {name: np.zeros((32, 32), np.float32)})
        assert f"holds tensor {name}" in refused(path).message


def test_rows_that_are_not_those_of_the_heads_are_refused(tmp_path: Path) -> None:
    tensors = stored(tiny_llama())
    tensors["blk.1.attn_k.weight"] = tensors["blk.1.attn_k.weight"][:-1]
    assert "blk.1.attn_k.weight has 31 rows" in refused(write(tmp_path / "m.gguf", tensors)).message


def test_a_type_that_cannot_be_undone_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    tensors = stored(tiny_llama()) | {"output.weight": np.zeros((32, 32), np.int32)}
    metadata(writer)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "output.weight is in I32, which cannot be dequantised" in refused(tmp_path / "m.gguf").message
