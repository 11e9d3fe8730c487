"""The model ``tiny-random``: a small DeepSeek-V3.2 with random weights, made on the user's machine on first use.

It is an ordinary checkpoint directory. Its selections are those of random weights: good for trying the whole path
and for measuring the program, meaningless as locality figures.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dsakv.models.deepseek_v32 import DeepseekV32
from dsakv.models.deepseek_v32_names import hf_name
from dsakv.models.deepseek_v32_shape import parse_shape
from dsakv.models.options import ModelOptions
from dsakv.tokenizer import write_byte_tokenizer

NAME = "tiny-random"
RECIPE = 1
"""Goes up whenever the weights made here change, so that an older copy in the cache is not used."""

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "vocab_size": 260,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "index_n_heads": 8,
    "index_head_dim": 128,
    "index_topk": 512,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 65536,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "bos_token_id": 256,
    "eos_token_id": 257,
    "dsakv_random_weights": True,
}


def ensure_tiny_model(home: Path) -> Path:
    """The model's directory under the cache folder ``home``, made there on first use.

    Two processes may make it at the same time: each writes a folder of its own, and the first rename counts.
    """
    target = home / "models" / f"{NAME}-{RECIPE}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=target.parent))
    try:
        write_checkpoint(staging)
        staging.chmod(0o755)
        staging.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was first, and its copy is the same
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def write_checkpoint(directory: Path, config: dict[str, Any] = CONFIG, seed: int = 0) -> None:
    """Write a checkpoint of random weights in the Hugging Face layout, the same bits for the same seed.

    Projections are normal with variance ``1 / fan_in``, so that activations, scores and logits neither vanish nor
    grow with depth; norms scatter around 1 and the gate's bias around 0, so that no term can be left out unseen.
    """
    model = DeepseekV32(parse_shape(config, "embedded config"), ModelOptions())
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            value = 1 + 0.1 * noise
        elif name.endswith("bias"):
            value = 0.1 * noise
        elif name == "embed.weight":
            value = noise
        else:
            value = noise / math.sqrt(parameter.shape[-1])
        tensors[hf_name(name)] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_byte_tokenizer(directory)
