"""A model's shape from the keys of a Hugging Face ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct

from dsakv.errors import InputError
from dsakv.models.dsa_shape import DsaShape
from dsakv.models.rope_scaling import Yarn, mscale

_Keys = TypeVar("_Keys", bound=Struct)

_KEYS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "route_scale": "routed_scaling_factor",
    "norm_topk_prob": "norm_topk_prob",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "index_n_heads": "index_n_heads",
    "index_head_dim": "index_head_dim",
    "index_topk": "index_topk",
    "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings",
}

_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
}
"""Keys that a config may hold, with the only value that the architectures know."""


class _Rope(Struct, frozen=True, kw_only=True):
    """``rope_parameters``, or ``rope_scaling`` of older configs."""

    rope_type: str | None = None
    type: str | None = None
    """The older name of ``rope_type``."""
    rope_theta: float | None = None
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None


class _Quantization(Struct, frozen=True):
    scale_fmt: str | None = None


class _Further(Struct, frozen=True, kw_only=True):
    """What a Hugging Face config may hold beside ``_KEYS``."""

    mlp_layer_types: list[Literal["dense", "sparse"]] | None = None
    quantization_config: _Quantization | None = None
    rope_parameters: _Rope | None = None
    rope_scaling: _Rope | None = None
    rope_theta: float = 10000.0


def read_hf_shape(config: dict[str, Any], source: str, kind: str, fixed: Mapping[str, object]) -> DsaShape:
    """The shape of a model of type ``kind``; ``fixed`` are keys that have one value in it and need not be there.

    Raises InputError, with ``source`` for the name of the file, for missing keys, wrong types and features that the
    architecture does not have. The dimensions are not looked at: see ``dsa_shape.check``.
    """
    for key, value in {**_FIXED, **fixed}.items():
        if config.get(key, value) != value:
            raise InputError(f"{source}: {key} is {config[key]!r}", f"a {kind} model has {value!r}")
    further = convert_keys(config, _Further, source)
    types = further.mlp_layer_types
    optional = {"first_k_dense_replace": 0} if types is not None else {}  # where both are there, the list counts
    config = optional | config
    missing = [key for key in _KEYS.values() if key not in config]
    if missing:
        raise InputError(f"{source}: {missing[0]!r} is missing", f"is this the config.json of a {kind} model?")
    fields = {ours: config[theirs] for ours, theirs in _KEYS.items()}
    # As in transformers, the older key counts where both are there.
    rope = (further.rope_scaling if config.get("rope_scaling") else further.rope_parameters) or _Rope()
    fields |= {
        "scale_fmt": further.quantization_config.scale_fmt if further.quantization_config else None,
        "rope_theta": further.rope_theta if rope.rope_theta is None else rope.rope_theta,
        "yarn": None,
    }
    try:
        shape = msgspec.convert(fields, DsaShape)
    except msgspec.ValidationError as error:
        raise InputError(f"{source}: {error} (DeepSeek's name of the key)", "correct the value in the file") from error
    dense = min(shape.n_dense_layers, shape.n_layers) if types is None else _dense_layers(types, shape.n_layers, source)
    yarn = _yarn(rope, shape.max_seq_len, source, kind)
    return msgspec.structs.replace(shape, n_dense_layers=dense, yarn=yarn)


def convert_keys(config: dict[str, Any], kind: type[_Keys], source: str) -> _Keys:
    """The keys of ``config`` that the struct ``kind`` knows. Raises InputError for values of another type."""
    try:
        return msgspec.convert(config, kind)
    except msgspec.ValidationError as error:
        raise InputError(f"{source}: {error}", "correct the value in the file") from error


def _dense_layers(types: list[Literal["dense", "sparse"]], n_layers: int, source: str) -> int:
    """How many layers are dense; of a list with more entries than layers the first count."""
    if len(types) < n_layers:
        raise InputError(f"{source}: mlp_layer_types names {len(types)} of {n_layers} layers", "name every layer")
    dense = types[:n_layers].count("dense")
    if "sparse" in types[:dense]:
        raise InputError(f"{source}: mlp_layer_types mixes dense and sparse layers", "dense layers must come first")
    return dense


def _yarn(rope: _Rope, max_seq_len: int, source: str, kind: str) -> Yarn | None:
    rope_type = rope.rope_type or rope.type or "default"
    if rope_type == "default":
        return None
    if rope_type != "yarn":
        raise InputError(f"{source}: rope type {rope_type!r}", f"a {kind} model has 'default' or 'yarn'")
    original = rope.original_max_position_embeddings
    if original is None or original < 1:
        raise InputError(
            f"{source}: YaRN without original_max_position_embeddings", "add the length the model was pretrained at"
        )
    factor = rope.factor or max_seq_len / original
    rope_scale = rope.attention_factor
    if rope_scale is None:
        rope_scale = mscale(factor, 1.0)
        if rope.mscale and rope.mscale_all_dim:
            rope_scale = mscale(factor, rope.mscale) / mscale(factor, rope.mscale_all_dim)
    return Yarn(
        factor,
        original,
        rope.beta_fast or 32.0,
        rope.beta_slow or 1.0,
        rope_scale=rope_scale,
        softmax_scale=mscale(factor, rope.mscale_all_dim) ** 2 if rope.mscale_all_dim else 1.0,
    )
