"""The shape of a Llama model (Llama 2 and 3, SmolLM2) from a Hugging Face ``config.json``. No torch."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from msgspec import Struct

from dsakv.errors import InputError
from dsakv.models.dsa_shape import LARGEST, MOST_LAYERS
from dsakv.models.hf_shape import convert_keys
from dsakv.models.rope_scaling import Llama3Scaling

WIDEST_HEAD = 1 << 16
_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


class LlamaShape(Struct, frozen=True, kw_only=True):
    """Dimensions and constants; ``n_heads // n_kv_heads`` query heads read one head of keys and values."""

    vocab_size: int
    dim: int
    inter_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    scaling: Llama3Scaling | None
    tied: bool
    """Whether the embedding is the output's matrix too."""
    max_seq_len: int


class _Rope(Struct, frozen=True, kw_only=True):
    """``rope_parameters``, or ``rope_scaling`` of older configs."""

    rope_type: str | None = None
    type: str | None = None
    """The older name of ``rope_type``."""
    rope_theta: float | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


class _Config(Struct, frozen=True, kw_only=True):
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    tie_word_embeddings: bool = False


def parse_shape(config: dict[str, Any], source: str) -> LlamaShape:
    """Read a config; ``source`` names the file in errors.

    Raises InputError for missing keys, wrong types, impossible dimensions, and features that are not supported.
    """
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise InputError(f"{source}: {key} is {config[key]!r}", f"Llama models with {value!r} are supported")
    raw = convert_keys(config, _Config, source)
    rope = (raw.rope_scaling if config.get("rope_scaling") else raw.rope_parameters) or _Rope()
    shape = LlamaShape(
        vocab_size=raw.vocab_size,
        dim=raw.hidden_size,
        inter_dim=raw.intermediate_size,
        n_layers=raw.num_hidden_layers,
        n_heads=raw.num_attention_heads,
        n_kv_heads=raw.num_attention_heads if raw.num_key_value_heads is None else raw.num_key_value_heads,
        head_dim=raw.head_dim or raw.hidden_size // max(raw.num_attention_heads, 1),
        norm_eps=raw.rms_norm_eps,
        rope_theta=raw.rope_theta if rope.rope_theta is None else rope.rope_theta,
        scaling=_scaling(rope, source),
        tied=raw.tie_word_embeddings,
        max_seq_len=raw.max_position_embeddings,
    )
    _check(shape, source)
    return shape


def _scaling(rope: _Rope, source: str) -> Llama3Scaling | None:
    rope_type = rope.rope_type or rope.type or "default"
    if rope_type == "default":
        return None
    if rope_type != "llama3":
        raise InputError(f"{source}: rope type {rope_type!r}", "Llama models with 'default' or 'llama3' are supported")
    try:
        scaling = msgspec.convert(
            {
                "factor": rope.factor,
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                "original_max_seq_len": rope.original_max_position_embeddings,
            },
            Llama3Scaling,
        )
    except msgspec.ValidationError as error:
        raise InputError(
            f"{source}: llama3 rope scaling: {error}",
            "it needs factor, low_freq_factor, high_freq_factor and original_max_position_embeddings",
        ) from error
    sane = scaling.factor > 0 and 0 < scaling.low_freq_factor < scaling.high_freq_factor < math.inf
    if not sane or scaling.factor == math.inf or scaling.original_max_seq_len < 1:
        raise InputError(
            f"{source}: llama3 rope scaling makes no sense",
            "all its numbers must be more than 0, and low_freq_factor less than high_freq_factor",
        )
    return scaling


def _check(shape: LlamaShape, source: str) -> None:
    for name in shape.__struct_fields__:
        value = getattr(shape, name)
        most = MOST_LAYERS if name == "n_layers" else LARGEST
        if type(value) is int and not 1 <= value <= most:
            raise InputError(f"{source}: {name} is {value}", f"it must be at least 1, at most {most}")
    for name in ("norm_eps", "rope_theta"):
        if not 0 < getattr(shape, name) < math.inf:
            raise InputError(f"{source}: {name} is {getattr(shape, name)}", "it must be more than 0")
    if shape.n_heads % shape.n_kv_heads:
        raise InputError(
            f"{source}: {shape.n_heads} heads do not divide among {shape.n_kv_heads} of keys and values",
            "correct the dimensions in the file",
        )
    if shape.head_dim > WIDEST_HEAD or shape.n_heads * shape.head_dim > LARGEST:
        raise InputError(
            f"{source}: {shape.n_heads} heads of {shape.head_dim} are too many", "correct the dimensions in the file"
        )
    if shape.head_dim % 2:
        raise InputError(f"{source}: head_dim {shape.head_dim} is odd", "correct the dimensions in the file")
