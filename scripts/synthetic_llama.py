"""A Llama checkpoint of any size with random weights, as Hugging Face lays one out, made in little memory.

Matrices are cut from one piece of noise at random places: as good as others to be read and multiplied, and made as
fast as a disk writes them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dsakv.header import ITEM_BYTES, Stored, format_header

SHARD_BYTES = 1 << 30
NOISE = 32 << 20
"""Values."""
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dsakv_random_weights": True,
}


def named(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor."""
    d, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (vocabulary, d)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (d,)
        for name, rows in (("q", d), ("k", kv), ("v", kv), ("o", d)):
            yield f"{layer}.self_attn.{name}_proj.weight", (rows, d)
        yield f"{layer}.post_attention_layernorm.weight", (d,)
        yield f"{layer}.mlp.gate_proj.weight", (inner, d)
        yield f"{layer}.mlp.up_proj.weight", (inner, d)
        yield f"{layer}.mlp.down_proj.weight", (d, inner)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (vocabulary, d)


def make(folder: Path, size: int, **changes: Any) -> int:
    """Write a checkpoint of about ``size`` bytes, of two layers at least; how many bytes of weights it has.

    ``changes`` are other values of the shape.
    """
    config = CONFIG | changes
    n_bytes = [_size(config, layers) for layers in (0, 1)]
    config["num_hidden_layers"] = layers = max(2, round((size - n_bytes[0]) / (n_bytes[1] - n_bytes[0])))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(NOISE, generator=generator).mul_(0.02).to(torch.bfloat16)
    ones = torch.ones(config["hidden_size"], dtype=torch.bfloat16)
    groups: list[list[Stored]] = [[]]
    for name, shape in named(config):
        end = groups[-1][-1].start + groups[-1][-1].size if groups[-1] else 0
        length = math.prod(shape) * ITEM_BYTES["BF16"]
        if end and end + length > min(SHARD_BYTES, size / 3):
            groups.append([])
            end = 0
        groups[-1].append(Stored(name, "BF16", shape, end, length))
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file_name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        weight_map |= dict.fromkeys((one.name for one in group), file_name)
        with open(folder / file_name, "wb") as file:
            file.write(format_header(group))
            for one in group:
                values = math.prod(one.shape)
                while values:
                    first = int(torch.randint(NOISE // 2, (1,), generator=generator))
                    part = ones if len(one.shape) == 1 else noise[first : first + min(values, NOISE // 2)]
                    file.write(part.view(torch.int16).numpy().data)
                    values -= len(part)
            file.flush()
            os.fsync(file.fileno())  # what is not on the disk yet stays in the page cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    total = _size(config, layers)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return total


def _size(config: dict[str, Any], layers: int) -> int:
    """Bytes of the weights of so many layers."""
    every = named(config | {"num_hidden_layers": layers})
    return sum(math.prod(shape) * ITEM_BYTES["BF16"] for _, shape in every)
