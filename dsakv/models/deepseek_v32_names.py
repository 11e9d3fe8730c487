"""Parameter names of DeepSeek-V3.2 and GLM-5: DeepSeek's own, Hugging Face's, and how ranks divide them. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

BLOCK = 128
"""Side of the square of an fp8 weight that shares one scale."""

_TOP = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn.wq_a": "self_attn.q_a_proj",
    "attn.q_norm": "self_attn.q_a_layernorm",
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv_a": "self_attn.kv_a_proj_with_mqa",
    "attn.kv_norm": "self_attn.kv_a_layernorm",
    "attn.wkv_b": "self_attn.kv_b_proj",
    "attn.wo": "self_attn.o_proj",
}
_MLP = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_LAYER_BACK = {theirs: ours for ours, theirs in _LAYER.items()}
_MLP_BACK = {theirs: ours for ours, theirs in _MLP.items()}
_LEAVES = {"weight": "weight", "bias": "bias", "scale": "weight_scale_inv"}
_LEAVES_BACK = {theirs: ours for ours, theirs in _LEAVES.items()}

_SHARDED = {"embed": 0, "head": 0, "wkv_b": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}
_INDEXER = ("wq_b", "wk", "k_norm", "weights_proj")


class Split(NamedTuple):
    """How ranks divide a tensor. Neither: every rank holds it whole."""

    dim: int | None = None
    """Dimension cut into equal parts, one a rank."""
    expert: int | None = None
    """Routed expert that it belongs to; a rank holds a contiguous range of experts, whole."""


def hf_name(name: str) -> str:
    """DeepSeek's name in Hugging Face's: ``layers.0.attn.wq_a.weight`` to ``model.layers.0.self_attn.q_a_proj.weight``.

    ``name`` must be one that a model has.
    """
    stem, _, leaf = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{_LEAVES[leaf]}"
    _, layer, rest = stem.split(".", 2)
    theirs = "e_score_correction_bias" if (rest, leaf) == ("ffn.gate", "bias") else _LEAVES[leaf]
    if rest in _LAYER:
        rest = _LAYER[rest]
    elif rest.startswith("attn.indexer."):
        rest = rest.replace("attn.", "self_attn.", 1)
    else:
        *path, last = rest.replace("ffn", "mlp", 1).split(".")
        rest = ".".join([*path, _MLP.get(last, last)])
    return f"model.layers.{layer}.{rest}.{theirs}"


def own_name(name: str) -> str | None:
    """Hugging Face's name in DeepSeek's, the inverse of :func:`hf_name`; None where the architecture has no such."""
    stem, _, leaf = name.rpartition(".")
    for ours, theirs in _TOP.items():
        if stem == theirs:
            return f"{ours}.{leaf}" if leaf == "weight" else None
    parts = stem.split(".", 3)
    if parts[:2] != ["model", "layers"] or len(parts) != 4 or not parts[2].isdecimal():
        return None
    layer, rest = parts[2], parts[3]
    if rest == "mlp.gate" and leaf in ("weight", "e_score_correction_bias"):
        own: str | None = "ffn.gate"
        leaf = "weight" if leaf == "weight" else "bias"
    else:
        own = _LAYER_BACK.get(rest) or _indexer_part(rest) or _mlp_part(rest)
        if own is None or leaf not in _LEAVES_BACK:
            return None
        leaf = _LEAVES_BACK[leaf]
        if leaf == "bias" and not own.endswith("k_norm"):
            return None
    found = f"layers.{layer}.{own}.{leaf}"
    return found if hf_name(found) == name else None


def split_of(name: str) -> Split:
    """How ranks divide the tensor with DeepSeek's name ``name``; a scale is divided as its weight is."""
    stem = name.rpartition(".")[0]
    if ".ffn.experts." in stem:
        return Split(expert=int(stem.split(".")[4]))
    last = stem.rpartition(".")[2]
    if last == "wq_b":
        return Split(None if ".indexer." in stem else 0)
    return Split(_SHARDED.get(last))


def unused(names: Collection[str], n_layers: int, shared_layers: Iterable[int]) -> set[str]:
    """Hugging Face's names of stored tensors that have no part in decoding.

    Those are layers of multi-token prediction, RoPE tables, and indexers of layers that share a selection: sharing can
    be switched on in the config of a model that was trained without it.
    """
    prefixes = [f"model.layers.{layer_id}.self_attn.indexer." for layer_id in shared_layers]
    extra = n_layers
    while f"model.layers.{extra}.eh_proj.weight" in names:  # else it is a decoder layer that the config has forgotten
        prefixes.append(f"model.layers.{extra}.")
        extra += 1
    left_out = tuple(prefixes)
    return {name for name in names if name.startswith(left_out) or name.endswith("rotary_emb.inv_freq")}


def _indexer_part(rest: str) -> str | None:
    prefix, _, part = rest.rpartition(".")
    return f"attn.indexer.{part}" if prefix == "self_attn.indexer" and part in _INDEXER else None


def _mlp_part(rest: str) -> str | None:
    """``mlp.up_proj``, ``mlp.experts.3.up_proj``, ``mlp.shared_experts.up_proj``."""
    first, _, after = rest.partition(".")
    *middle, last = after.split(".")
    if first != "mlp" or last not in _MLP_BACK:
        return None
    match middle:
        case [] | ["shared_experts"]:
            pass
        case ["experts", number] if number.isdecimal():
            pass
        case _:
            return None
    return ".".join(["ffn", *middle, _MLP_BACK[last]])
