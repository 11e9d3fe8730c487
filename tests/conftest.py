"""Small checkpoints that several rooms' tests run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsakv.models.tiny import CONFIG, write_checkpoint

# The models of these tests are too small to share between threads.
torch.set_num_threads(1)

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


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``deepseek_v32`` checkpoint of a few thousand parameters: top-k 16, YaRN from 64 to 512 tokens."""
    directory = tmp_path_factory.mktemp("small")
    write_checkpoint(directory, CONFIG | SMALL_SHAPE, seed=3)
    return directory


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Prompts shorter and longer than top-k and than YaRN's original length."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in (5, 40, 100, 17, 16, 130)]
