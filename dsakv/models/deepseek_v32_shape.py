"""The shape of a DeepSeek-V3.2 model, from DeepSeek's own config JSON or a Hugging Face ``config.json``."""

from __future__ import annotations

import difflib
from typing import Any, Literal

import msgspec
from msgspec import Struct

from dsakv.errors import InputError
from dsakv.models.dsa_shape import DsaShape, check
from dsakv.models.hf_shape import read_hf_shape
from dsakv.models.rope_scaling import Yarn, mscale


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


def parse_shape(config: dict[str, Any], source: str) -> DsaShape:
    """Read either form of config; ``source`` names the file in errors.

    Raises InputError for unknown keys of DeepSeek's form, missing keys, wrong types, and features that the
    DeepSeek-V3.2 architecture does not have.
    """
    if "hidden_size" in config:
        shape = read_hf_shape(config, source, kind="deepseek_v32", fixed={})
    else:
        shape = _from_deepseek(config, source)
    check(shape, source)
    return shape


def _from_deepseek(config: dict[str, Any], source: str) -> DsaShape:
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
    fields = {name: getattr(raw, name) for name in DsaShape.__struct_fields__ if hasattr(raw, name)}
    return DsaShape(**fields | {"norm_topk_prob": True, "norm_eps": 1e-6, "yarn": yarn, "max_seq_len": max_seq_len})
