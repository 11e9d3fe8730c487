"""The shape of a DeepSeek-V3.2 model, from DeepSeek's own config JSON or a Hugging Face ``config.json``."""

from __future__ import annotations

import difflib
import math
from typing import Any, Literal

import msgspec
from msgspec import Struct

from dsakv.errors import InputError
from dsakv.models.layers import Yarn, mscale


class DeepseekV32Shape(Struct, frozen=True, kw_only=True):
    """Dimensions and constants, under DeepSeek's names."""

    vocab_size: int
    dim: int
    inter_dim: int
    moe_inter_dim: int
    n_layers: int
    n_dense_layers: int
    n_heads: int
    n_routed_experts: int
    n_shared_experts: int
    n_activated_experts: int
    n_expert_groups: int
    n_limited_groups: int
    route_scale: float
    norm_topk_prob: bool
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    scale_fmt: str | None
    norm_eps: float
    rope_theta: float
    yarn: Yarn | None
    max_seq_len: int


def _check(shape: DeepseekV32Shape, source: str) -> None:
    """Raise InputError for dimensions that no model can have."""
    for name in shape.__struct_fields__:
        value = getattr(shape, name)
        if type(value) is int and value < (0 if name == "n_dense_layers" else 1):
            raise InputError(f"{source}: {name} is {value}", "it must be at least 1")
    constants = {name: getattr(shape, name) for name in ("route_scale", "norm_eps", "rope_theta")}
    if shape.yarn:
        constants |= {f"YaRN's {name}": value for name, value in vars(shape.yarn).items()}
    for name, value in constants.items():
        if not 0 < value < math.inf:
            raise InputError(f"{source}: {name} is {value}", "it must be more than 0")
    experts, groups = shape.n_routed_experts, shape.n_expert_groups
    rules = [
        (experts % groups == 0, f"{experts} routed experts do not divide into {groups} groups"),
        (groups == 1 or experts // groups >= 2, f"{groups} expert groups of fewer than 2 experts"),
        (shape.n_limited_groups <= groups, f"{shape.n_limited_groups} of {groups} expert groups chosen"),
        (
            shape.n_activated_experts <= experts // groups * shape.n_limited_groups,
            f"{shape.n_activated_experts} experts activated, more than the chosen groups hold",
        ),
        (shape.rope_theta != 1, "rope_theta is 1, which turns nothing"),
        (shape.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim {shape.qk_rope_head_dim} is odd"),
        (
            shape.qk_rope_head_dim <= shape.index_head_dim,
            f"qk_rope_head_dim {shape.qk_rope_head_dim} is wider than index_head_dim {shape.index_head_dim}",
        ),
    ]
    for holds, problem in rules:
        if not holds:
            raise InputError(f"{source}: {problem}", "correct the dimensions in the file")


class _DeepseekJson(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of DeepSeek's config JSON; defaults are those of its demo, save where noted."""

    vocab_size: int
    dim: int
    inter_dim: int
    moe_inter_dim: int
    n_layers: int
    n_dense_layers: int = 1
    n_heads: int
    n_routed_experts: int
    n_shared_experts: int
    n_activated_experts: int
    n_expert_groups: int = 1
    n_limited_groups: int = 1
    score_func: Literal["sigmoid"] = "sigmoid"  # softmax is the demo's default, but no V3 model uses it
    route_scale: float = 1.0
    q_lora_rank: int
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    dtype: Literal["bf16", "fp8"] = "bf16"
    scale_fmt: Literal["ue8m0"] | None = None
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048
    max_batch_size: int = 8
    max_seq_len: int = 0
    original_seq_len: int = 4096
    rope_theta: float = 10000.0
    rope_factor: float = 40.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0


def parse_shape(config: dict[str, Any], source: str) -> DeepseekV32Shape:
    """Read either form of config; ``source`` names the file in errors.

    Raises InputError for unknown keys of DeepSeek's form, missing keys, wrong types, and features that the
    DeepSeek-V3.2 architecture does not have.
    """
    shape = _from_hugging_face(config, source) if "hidden_size" in config else _from_deepseek(config, source)
    _check(shape, source)
    return shape


def _from_deepseek(config: dict[str, Any], source: str) -> DeepseekV32Shape:
    known = _DeepseekJson.__struct_fields__
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise InputError(f"{source}: unknown key {key!r}", hint)
    try:
        raw = msgspec.convert(config, _DeepseekJson)
    except msgspec.ValidationError as error:
        raise InputError(f"{source}: {error}", "see configs/config_671B_v3.2.json for a complete example") from error
    # The demo extends the context where it is asked for more than the original length; by default it is extended.
    max_seq_len = raw.max_seq_len or int(raw.original_seq_len * raw.rope_factor)
    yarn = None
    if max_seq_len > raw.original_seq_len:
        yarn = Yarn(
            raw.rope_factor,
            raw.original_seq_len,
            raw.beta_fast,
            raw.beta_slow,
            softmax_scale=mscale(raw.rope_factor, raw.mscale) ** 2,
        )
    fields = {name: getattr(raw, name) for name in DeepseekV32Shape.__struct_fields__ if hasattr(raw, name)}
    return DeepseekV32Shape(
        **fields | {"norm_topk_prob": True, "norm_eps": 1e-6, "yarn": yarn, "max_seq_len": max_seq_len}
    )


_HF_KEYS = {
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

_HF_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
}
"""Keys that a config may hold, with the only value that the architecture knows."""


class _HfRope(Struct, frozen=True, kw_only=True):
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


class _HfQuantization(Struct, frozen=True):
    scale_fmt: str | None = None


class _HfFurther(Struct, frozen=True, kw_only=True):
    """What a Hugging Face config may hold beside ``_HF_KEYS``."""

    mlp_layer_types: list[str] | None = None
    quantization_config: _HfQuantization | None = None
    rope_parameters: _HfRope | None = None
    rope_scaling: _HfRope | None = None
    rope_theta: float = 10000.0


def _from_hugging_face(config: dict[str, Any], source: str) -> DeepseekV32Shape:
    for key, value in _HF_FIXED.items():
        if config.get(key, value) != value:
            raise InputError(f"{source}: {key} is {config[key]!r}", f"a deepseek_v32 model has {value!r}")
    missing = [key for key in _HF_KEYS.values() if key not in config]
    if missing:
        raise InputError(f"{source}: {missing[0]!r} is missing", "is this the config.json of a deepseek_v32 model?")
    try:
        further = msgspec.convert(config, _HfFurther)
    except msgspec.ValidationError as error:
        raise InputError(f"{source}: {error}", "correct the value in the file") from error
    fields = {ours: config[theirs] for ours, theirs in _HF_KEYS.items()}
    # As in transformers, the older key counts where both are there.
    rope = (further.rope_scaling if config.get("rope_scaling") else further.rope_parameters) or _HfRope()
    fields |= {
        "scale_fmt": further.quantization_config.scale_fmt if further.quantization_config else None,
        "rope_theta": further.rope_theta if rope.rope_theta is None else rope.rope_theta,
        "yarn": None,
    }
    try:
        shape = msgspec.convert(fields, DeepseekV32Shape)
    except msgspec.ValidationError as error:
        raise InputError(f"{source}: {error} (DeepSeek's name of the key)", "correct the value in the file") from error
    types = further.mlp_layer_types
    dense = min(shape.n_dense_layers, shape.n_layers)
    if types is not None and types != ["dense"] * dense + ["sparse"] * (len(types) - dense):
        raise InputError(f"{source}: mlp_layer_types mixes dense and sparse layers", "dense layers must come first")
    return msgspec.structs.replace(shape, yarn=_hf_yarn(rope, shape.max_seq_len, source))


def _hf_yarn(rope: _HfRope, max_seq_len: int, source: str) -> Yarn | None:
    kind = rope.rope_type or rope.type or "default"
    if kind == "default":
        return None
    if kind != "yarn":
        raise InputError(f"{source}: rope type {kind!r}", "a deepseek_v32 model has 'default' or 'yarn'")
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
