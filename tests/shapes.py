"""Shapes of the models that tests make."""

from __future__ import annotations

from typing import Any

from dsakv.models.tiny import CONFIG

SMALL_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    # Many index heads: with few, scores of exactly zero tie at the boundary.
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 16,
    "max_position_embeddings": 512,
    "rope_scaling": CONFIG["rope_scaling"] | {"factor": 8.0, "original_max_position_embeddings": 64},
}
