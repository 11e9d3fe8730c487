"""Random checkpoints that transformers itself saves, without a tokenizer, by what is special about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
)

YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
GLM = PLAIN | ONE_GROUP | {"num_hidden_layers": 6, "rms_norm_eps": 1e-5}

DEEPSEEK_MODELS: dict[str, dict[str, Any]] = {
    "yarn": {},
    "plain rope": PLAIN,
    "one group": ONE_GROUP | {"rms_norm_eps": 0.1},  # wide enough to tell the norms that follow it from the others
}
GLM_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "glm": (GLM | {"num_hidden_layers": 3, "rms_norm_eps": 0.1}, "FFF"),
    "glm types": (
        GLM | {"indexer_types": ["full", "full", "shared", "shared", "full", "shared"], "first_k_dense_replace": 2},
        "FFSSFS",
    ),
    "glm pattern": (GLM | {"index_topk_pattern": "FSSFFS"}, "FSSFFS"),
    "glm frequency": (GLM | {"index_topk_freq": 2, "index_skip_topk_offset": 3}, "FFFSFS"),
    "glm groups": (GLM | {"n_group": 4, "topk_group": 2, "index_topk_freq": 3}, "FFSSFS"),
}
"""GLM-5 configs, and which layers have an indexer (F) and which share (S)."""


def save(directory: Path, name: str) -> None:
    """Make the model ``name`` of the tables above and save it as a checkpoint."""
    deepseek = name in DEEPSEEK_MODELS
    keys: dict[str, Any] = {
        "vocab_size": 260,
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 20,
        "qk_rope_head_dim": 16,
        "v_head_dim": 24,
        "index_n_heads": 16,
        "index_head_dim": 32,
        "index_topk": 16,
        "max_position_embeddings": 512,
        "rope_parameters": dict(YARN),
        "initializer_range": 0.2,
    }
    keys |= DEEPSEEK_MODELS[name] if deepseek else GLM_MODELS[name][0]
    torch.manual_seed(11)
    model: DeepseekV32ForCausalLM | GlmMoeDsaForCausalLM
    model = (
        DeepseekV32ForCausalLM(DeepseekV32Config(**keys)) if deepseek else GlmMoeDsaForCausalLM(GlmMoeDsaConfig(**keys))
    )
    with torch.no_grad():
        for layer in model.model.layers[keys["first_k_dense_replace"] :]:
            layer.mlp.gate.e_score_correction_bias.normal_(0, 0.2)
    model.save_pretrained(directory)
    if not deepseek and "indexer_types" not in keys:  # transformers saves the list, whichever way it was told
        path = directory / "config.json"
        saved = json.loads(path.read_text())
        del saved["indexer_types"]
        path.write_text(json.dumps(saved | {key: value for key, value in keys.items() if key.startswith("index_")}))
