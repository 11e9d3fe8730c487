"""Parameter names of Llama models: short ones as for DeepSeek's, and Hugging Face's. No torch."""

from __future__ import annotations

_TOP = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn.wq": "self_attn.q_proj",
    "attn.wk": "self_attn.k_proj",
    "attn.wv": "self_attn.v_proj",
    "attn.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.w1": "mlp.gate_proj",
    "ffn.w2": "mlp.down_proj",
    "ffn.w3": "mlp.up_proj",
}


def hf_name(name: str) -> str:
    """Our name in Hugging Face's: ``layers.0.attn.wq.weight`` to ``model.layers.0.self_attn.q_proj.weight``.

    ``name`` must be one that a model has. Those of indexers stay: they have files of their own.
    """
    if ".indexer." in name:
        return name
    stem, _, leaf = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{leaf}"
    _, layer, rest = stem.split(".", 2)
    return f"model.layers.{layer}.{_LAYER[rest]}.{leaf}"


def unused(names: set[str], *, tied: bool) -> set[str]:
    """Stored tensors that have no part in the model: RoPE tables, and a head that the embedding replaces."""
    return {name for name in names if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")}
