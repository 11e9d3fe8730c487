"""What tensors a model must have and in which shapes, by the keys of its Hugging Face ``config.json``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import orjson
from msgspec import Meta, Struct

from dsakv.errors import InputError
from dsakv.models.deepseek_v32_names import BLOCK
from dsakv.models.glm_sharing import shared_layers

MODEL_TYPES = ("deepseek_v32", "glm_moe_dsa")
_QUANTIZED = {"wq_a", "wq_b", "wkv_a", "wkv_b", "wo", "wk", "w1", "w2", "w3"}
"""Projections whose weights may be fp8, by the last part of their name."""

_Size = Annotated[int, Meta(ge=1, le=2**31)]


class Dimensions(Struct, frozen=True, kw_only=True):
    """The keys of the config that shapes follow from, under its own names."""

    model_type: str
    vocab_size: _Size
    hidden_size: _Size
    intermediate_size: _Size
    moe_intermediate_size: _Size
    num_hidden_layers: Annotated[int, Meta(ge=1, le=100_000)]
    num_attention_heads: _Size
    n_routed_experts: _Size
    n_shared_experts: _Size
    q_lora_rank: _Size
    kv_lora_rank: _Size
    qk_nope_head_dim: _Size
    qk_rope_head_dim: _Size
    v_head_dim: _Size
    index_n_heads: _Size
    index_head_dim: _Size
    first_k_dense_replace: Annotated[int, Meta(ge=0)] = 0
    mlp_layer_types: list[Literal["dense", "sparse"]] | None = None
    """Where both are there, the list counts."""

    def is_dense(self, layer_id: int) -> bool:
        if self.mlp_layer_types is not None:
            return self.mlp_layer_types[layer_id] == "dense"
        return layer_id < self.first_k_dense_replace


class Architecture(NamedTuple):
    """A model's dimensions, and its layers without an indexer."""

    dimensions: Dimensions
    shared: frozenset[int]

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """DeepSeek's name and the shape of each tensor, scales aside: whether these are there depends on dtypes."""
        d = self.dimensions
        yield "embed.weight", (d.vocab_size, d.hidden_size)
        for layer_id in range(d.num_hidden_layers):
            prefix = f"layers.{layer_id}"
            yield f"{prefix}.attn_norm.weight", (d.hidden_size,)
            yield f"{prefix}.ffn_norm.weight", (d.hidden_size,)
            yield from self._attention(f"{prefix}.attn")
            if layer_id not in self.shared:
                yield from self._indexer(f"{prefix}.attn.indexer")
            if d.is_dense(layer_id):
                yield from self._mlp(f"{prefix}.ffn", d.intermediate_size)
            else:
                yield from self._experts(f"{prefix}.ffn")
        yield "norm.weight", (d.hidden_size,)
        yield "head.weight", (d.vocab_size, d.hidden_size)

    def _attention(self, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        d = self.dimensions
        heads, latent = d.num_attention_heads, d.kv_lora_rank
        yield f"{prefix}.wq_a.weight", (d.q_lora_rank, d.hidden_size)
        yield f"{prefix}.q_norm.weight", (d.q_lora_rank,)
        yield f"{prefix}.wq_b.weight", (heads * (d.qk_nope_head_dim + d.qk_rope_head_dim), d.q_lora_rank)
        yield f"{prefix}.wkv_a.weight", (latent + d.qk_rope_head_dim, d.hidden_size)
        yield f"{prefix}.kv_norm.weight", (latent,)
        yield f"{prefix}.wkv_b.weight", (heads * (d.qk_nope_head_dim + d.v_head_dim), latent)
        yield f"{prefix}.wo.weight", (d.hidden_size, heads * d.v_head_dim)

    def _indexer(self, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        d = self.dimensions
        yield f"{prefix}.wq_b.weight", (d.index_n_heads * d.index_head_dim, d.q_lora_rank)
        yield f"{prefix}.wk.weight", (d.index_head_dim, d.hidden_size)
        yield f"{prefix}.k_norm.weight", (d.index_head_dim,)
        yield f"{prefix}.k_norm.bias", (d.index_head_dim,)
        yield f"{prefix}.weights_proj.weight", (d.index_n_heads, d.hidden_size)

    def _mlp(self, prefix: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        dim = self.dimensions.hidden_size
        yield f"{prefix}.w1.weight", (width, dim)
        yield f"{prefix}.w2.weight", (dim, width)
        yield f"{prefix}.w3.weight", (width, dim)

    def _experts(self, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        d = self.dimensions
        yield f"{prefix}.gate.weight", (d.n_routed_experts, d.hidden_size)
        yield f"{prefix}.gate.bias", (d.n_routed_experts,)
        yield from self._mlp(f"{prefix}.shared_experts", d.n_shared_experts * d.moe_intermediate_size)
        for expert in range(d.n_routed_experts):
            yield from self._mlp(f"{prefix}.experts.{expert}", d.moe_intermediate_size)


def may_be_fp8(name: str) -> bool:
    """Whether the tensor with DeepSeek's name ``name`` is the weight of a quantised projection."""
    stem, _, leaf = name.rpartition(".")
    return leaf == "weight" and stem.rpartition(".")[2] in _QUANTIZED


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of an fp8 weight: one for each square of ``BLOCK``, also where it is cut off."""
    return tuple(-(-size // BLOCK) for size in shape)


def read_architecture(path: Path) -> Architecture:
    """Read a Hugging Face ``config.json``.

    Raises InputError where there is none, it is of another model, a key is missing or has a wrong value.
    """
    hint = "--hf-ckpt-path names a checkpoint in Hugging Face layout, with its config.json"
    try:
        config = orjson.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read model config {path}: {error.strerror}", hint) from error
    except ValueError as error:
        raise InputError(f"model config {path} is no JSON: {error}", "download it again") from error
    if not isinstance(config, dict):
        raise InputError(f"model config {path} is no JSON object", "download it again")
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise InputError(f"{path}: model_type {kind!r} is not supported", f"supported: {', '.join(MODEL_TYPES)}")
    try:
        dimensions = msgspec.convert(config, Dimensions)
    except msgspec.ValidationError as error:
        raise InputError(f"{path}: {error}", f"is this the config.json of a {kind} model?") from error
    layers, types = dimensions.num_hidden_layers, dimensions.mlp_layer_types
    if types is not None and len(types) < layers:
        raise InputError(f"{path}: mlp_layer_types names {len(types)} of {layers} layers", "name every layer")
    return Architecture(dimensions, _shared(config, layers, path))


def _shared(config: dict[str, Any], layers: int, path: Path) -> frozenset[int]:
    if config["model_type"] == "deepseek_v32":
        return frozenset()
    return frozenset(shared_layers(config, layers, str(path)))
