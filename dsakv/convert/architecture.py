"""What tensors a checkpoint must have, and in which shapes."""

from __future__ import annotations

from collections.abc import Iterator

from dsakv.models.deepseek_v32_names import BLOCK
from dsakv.models.dsa_shape import DsaShape

_QUANTIZED = {"wq_a", "wq_b", "wkv_a", "wkv_b", "wo", "wk", "w1", "w2", "w3"}
"""Projections whose weights may be fp8, by the last part of their name."""

Named = tuple[str, tuple[int, ...]]


def tensors(d: DsaShape) -> Iterator[Named]:
    """DeepSeek's name and the shape of each tensor, scales aside: whether these are there depends on dtypes."""
    shared = set(d.shared_layers)
    yield "embed.weight", (d.vocab_size, d.dim)
    for layer_id in range(d.n_layers):
        prefix = f"layers.{layer_id}"
        yield f"{prefix}.attn_norm.weight", (d.dim,)
        yield f"{prefix}.ffn_norm.weight", (d.dim,)
        yield from _attention(d, f"{prefix}.attn")
        if layer_id not in shared:
            yield from _indexer(d, f"{prefix}.attn.indexer")
        if layer_id < d.n_dense_layers:
            yield from _mlp(d, f"{prefix}.ffn", d.inter_dim)
        else:
            yield from _experts(d, f"{prefix}.ffn")
    yield "norm.weight", (d.dim,)
    yield "head.weight", (d.vocab_size, d.dim)


def _attention(d: DsaShape, prefix: str) -> Iterator[Named]:
    heads, latent = d.n_heads, d.kv_lora_rank
    yield f"{prefix}.wq_a.weight", (d.q_lora_rank, d.dim)
    yield f"{prefix}.q_norm.weight", (d.q_lora_rank,)
    yield f"{prefix}.wq_b.weight", (heads * (d.qk_nope_head_dim + d.qk_rope_head_dim), d.q_lora_rank)
    yield f"{prefix}.wkv_a.weight", (latent + d.qk_rope_head_dim, d.dim)
    yield f"{prefix}.kv_norm.weight", (latent,)
    yield f"{prefix}.wkv_b.weight", (heads * (d.qk_nope_head_dim + d.v_head_dim), latent)
    yield f"{prefix}.wo.weight", (d.dim, heads * d.v_head_dim)


def _indexer(d: DsaShape, prefix: str) -> Iterator[Named]:
    yield f"{prefix}.wq_b.weight", (d.index_n_heads * d.index_head_dim, d.q_lora_rank)
    yield f"{prefix}.wk.weight", (d.index_head_dim, d.dim)
    yield f"{prefix}.k_norm.weight", (d.index_head_dim,)
    yield f"{prefix}.k_norm.bias", (d.index_head_dim,)
    yield f"{prefix}.weights_proj.weight", (d.index_n_heads, d.dim)


def _mlp(d: DsaShape, prefix: str, width: int) -> Iterator[Named]:
    dim = d.dim
    yield f"{prefix}.w1.weight", (width, dim)
    yield f"{prefix}.w2.weight", (dim, width)
    yield f"{prefix}.w3.weight", (width, dim)


def _experts(d: DsaShape, prefix: str) -> Iterator[Named]:
    yield f"{prefix}.gate.weight", (d.n_routed_experts, d.dim)
    yield f"{prefix}.gate.bias", (d.n_routed_experts,)
    yield from _mlp(d, f"{prefix}.shared_experts", d.n_shared_experts * d.moe_inter_dim)
    for expert in range(d.n_routed_experts):
        yield from _mlp(d, f"{prefix}.experts.{expert}", d.moe_inter_dim)


def may_be_fp8(name: str) -> bool:
    """Whether the tensor with DeepSeek's name ``name`` is the weight of a quantised projection."""
    stem, _, leaf = name.rpartition(".")
    return leaf == "weight" and stem.rpartition(".")[2] in _QUANTIZED


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of an fp8 weight: one for each square of ``BLOCK``, also where it is cut off."""
    return tuple(-(-size // BLOCK) for size in shape)
