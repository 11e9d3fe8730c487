"""Tiny Llama checkpoints with random weights, saved by transformers, and indexers for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsakv.models.indexer import IndexerShape
from dsakv.tokenizer import write_byte_tokenizer
from dsakv.weights.indexer_file import IndexerFile, tensor_shapes, write_indexers

N_LAYERS, DIM, TOP_K = 3, 48, 16
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 20000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"num_key_value_heads": 2, "rope_parameters": PLAIN, "tie_word_embeddings": True},
    "llama3": {"num_key_value_heads": 3, "rope_parameters": LLAMA3, "tie_word_embeddings": False, "head_dim": 12},
    "one group": {"num_key_value_heads": 1, "rope_parameters": PLAIN, "tie_word_embeddings": False},
    "no groups": {"num_key_value_heads": 6, "rope_parameters": LLAMA3, "tie_word_embeddings": True},
}
SHAPE = IndexerShape(dim=DIM, query_dim=DIM, n_heads=16, head_dim=32, rope_dim=16, top_k=TOP_K)


def save_llama(directory: Path, name: str) -> None:
    """A checkpoint whose attention is neither flat nor that of one token alone."""
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=DIM,
        intermediate_size=96,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=6,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        bos_token_id=256,
        eos_token_id=257,
        **MODELS[name],
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else noise * 2 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(directory)
    write_byte_tokenizer(directory)


def save_indexers(path: Path, shape: IndexerShape = SHAPE, n_layers: int = N_LAYERS, seed: int = 0) -> None:
    """Indexers of normal weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(size, generator=generator) for name, size in tensor_shapes(shape, n_layers).items()}
    write_indexers(path, tensors, IndexerFile(shape, 10000.0, "a tiny Llama"))
