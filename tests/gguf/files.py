"""GGUF files of a tiny Llama, written by the gguf package from a model of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from transformers import LlamaConfig, LlamaForCausalLM

F32 = GGMLQuantizationType.F32
N_LAYERS, N_HEADS, N_KV_HEADS, HEAD_DIM, HIDDEN, INTER, VOCAB = 2, 4, 2, 16, 64, 96, 300
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Tensors = dict[str, np.ndarray[Any, Any]]
Edit = Callable[[gguf.GGUFWriter], None]


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """A Llama with random weights, norms and biases included."""
    rope = {"rope_type": "default", "rope_theta": 50000.0}
    further: dict[str, Any] = {"tie_word_embeddings": True, "rope_parameters": rope} | changes
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTER,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        **further,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def stored(model: LlamaForCausalLM) -> Tensors:
    """The model's tensors by GGUF's names, in GGUF's order of rows."""
    found = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        leaf = name.rpartition(".")[2]
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            ours = f"blk.{layer}.{LAYER_NAMES[rest.removesuffix(f'.{leaf}')]}.{leaf}"
        else:
            ours = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[name.split(".")[-2]]
            ours = f"{ours}.{leaf}"
        array = value.numpy()
        if "attn_q." in ours:
            array = turned(array, N_HEADS)
        elif "attn_k." in ours:
            array = turned(array, N_KV_HEADS)
        found[ours] = np.ascontiguousarray(array)
    return found


def turned(rows: np.ndarray[Any, Any], n_heads: int) -> np.ndarray[Any, Any]:
    """Rows i and i + head_dim / 2 of each head side by side, as GGUF's Llama wants them; row by row."""
    size = len(rows) // n_heads
    firsts = [head * size + i for head in range(n_heads) for i in range(size // 2)]
    return rows[[first + half for first in firsts for half in (0, size // 2)]]


def metadata(writer: gguf.GGUFWriter) -> None:
    writer.add_block_count(N_LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTER)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def write(
    path: Path,
    tensors: Tensors,
    encoding: GGMLQuantizationType = F32,
    *,
    architecture: str = "llama",
    describe: Edit = metadata,
    edit: Edit | None = None,
) -> Path:
    """Write ``tensors``, the matrices of them in ``encoding``."""
    writer = gguf.GGUFWriter(path, architecture)
    describe(writer)
    if edit:
        edit(writer)
    for name, array in tensors.items():
        kind = encoding if array.ndim > 1 else F32
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
