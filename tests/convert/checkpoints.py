"""Checkpoints to convert, and what each rank should get of them, by a slicing that knows nothing of the converter."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsakv.convert.architecture import tensors
from dsakv.header import Stored, format_header
from dsakv.models.deepseek_v32_names import hf_name
from dsakv.models.shapes import dsa_shape_of, read_config
from dsakv.models.tiny import CONFIG, write_checkpoint

Tensors = dict[str, Tensor]

SHAPE: dict[str, Any] = {
    # Every dimension that ranks divide gives four ranks whole blocks of 128; others are cut within a block.
    "hidden_size": 192,
    "intermediate_size": 1024,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 4,
    "q_lora_rank": 160,
    "kv_lora_rank": 72,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 128,
    "v_head_dim": 128,
    "index_n_heads": 2,
}
N_LAYERS = SHAPE["num_hidden_layers"]
KINDS = ("bf16", "fp8", "f16", "f32", "glm")
QUANTIZED = ("_proj", "_proj_with_mqa", "indexer.wq_b", "indexer.wk")
"""Ends of the modules whose weights are fp8 in released checkpoints; ``weights_proj`` is not."""

TABLE: dict[str, tuple[str, int | None]] = {
    "embed_tokens": ("embed", 0),
    "lm_head": ("head", 0),
    "norm": ("norm", None),
    "input_layernorm": ("attn_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "q_a_proj": ("wq_a", None),
    "q_a_layernorm": ("q_norm", None),
    "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None),
    "kv_a_layernorm": ("kv_norm", None),
    "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1),
    "gate": ("gate", None),
    "gate_proj": ("w1", 0),
    "up_proj": ("w3", 0),
    "down_proj": ("w2", 1),
    "wq_b": ("wq_b", None),
    "wk": ("wk", None),
    "k_norm": ("k_norm", None),
    "weights_proj": ("weights_proj", None),
}
"""By the last part of a module's name: what DeepSeek calls it, and along which dimension ranks cut it."""


def make(directory: Path, kind: str = "bf16", *, shards: int = 3, extras: bool = True) -> Tensors:
    """Write a checkpoint of one of ``KINDS`` in several shards with an index; its tensors.

    With ``extras`` it holds what released ones do beside the decoder: a multi-token-prediction layer, RoPE tables,
    files that are no weights.
    """
    directory.mkdir()
    config = CONFIG | SHAPE
    write_checkpoint(directory, config, seed=5)
    tensors: Tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    if kind == "glm":
        shared = [name for name in tensors if name.startswith("model.layers.1.self_attn.indexer.")]
        for name in shared:
            del tensors[name]
        types = ["full", "shared", "full"]
        config = config | {"model_type": "glm_moe_dsa", "indexer_types": types, "n_group": 1, "topk_group": 1}
        (directory / "config.json").write_text(json.dumps(config))
    tensors = CHANGES.get(kind, rounded)(tensors)
    if extras:
        layer = {n.replace(".2.", f".{N_LAYERS}.", 1): t.clone() for n, t in tensors.items() if ".layers.2." in n}
        tensors |= layer | {f"model.layers.{N_LAYERS}.eh_proj.weight": torch.zeros(4, 8)}
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(8.0)
        companions(directory)
    save(directory, tensors, shards)
    return tensors


def rounded(tensors: Tensors) -> Tensors:
    """bf16 but for the gate's bias, as released checkpoints are."""
    return {n: t if n.endswith("e_score_correction_bias") else t.to(torch.bfloat16) for n, t in tensors.items()}


def halved(tensors: Tensors) -> Tensors:
    return {name: tensor.to(torch.float16) for name, tensor in tensors.items()}


def quantized(tensors: Tensors) -> Tensors:
    """fp8 projections with scales that are all different, the rest bf16."""
    made: Tensors = {}
    for name, tensor in rounded(tensors).items():
        if name.removesuffix(".weight").endswith(QUANTIZED) and "weights_proj" not in name:
            made[name] = tensor.float().to(torch.float8_e4m3fn)
            blocks = [-(-size // 128) for size in tensor.shape]
            made[f"{name}_scale_inv"] = torch.rand(blocks, dtype=torch.float32)
        else:
            made[name] = tensor
    return made


CHANGES: dict[str, Callable[[Tensors], Tensors]] = {"f32": dict, "f16": halved, "fp8": quantized}


def save(directory: Path, tensors: Tensors, shards: int = 3) -> None:
    """Write ``tensors`` into ``shards`` files and list them in an index; what was there before goes."""
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensor.contiguous() for i, (name, tensor) in enumerate(tensors.items()) if i % shards == number}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def hollow(directory: Path, **dimensions: int) -> int:
    """Write a bf16 checkpoint of one dense layer whose weights are holes in files; the bytes of its tensors.

    ``dimensions`` are keys of its config; all that are not given are as small as can be.
    """
    directory.mkdir()
    ones = dict.fromkeys((*SHAPE, "n_routed_experts", "index_head_dim", "first_k_dense_replace"), 1)
    least = {"qk_rope_head_dim": 2, "index_head_dim": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}
    config = CONFIG | ones | least | dimensions | {"num_hidden_layers": 1}
    (directory / "config.json").write_text(json.dumps(config))
    total = 0
    for number, (name, shape) in enumerate(tensors(dsa_shape_of(read_config(directory / "config.json"), "config"))):
        path, size = directory / f"{number}.safetensors", 2 * math.prod(shape)
        path.write_bytes(format_header([Stored(hf_name(name), "BF16", shape, 0, size)]))
        os.truncate(path, path.stat().st_size + size)
        total += size
    return total


def companions(directory: Path) -> None:
    """Files that released checkpoints have, and some that must not be copied."""
    for name, content in {
        "generation_config.json": "{}",
        "additional_chat_templates/tool_use.jinja": "{{ tools }}",
        "encoding/encoding_dsv32.py": "raise SystemExit('never run')",
        "LICENSE": "MIT",
        "pytorch_model.bin": "weights of another kind",
        ".gitattributes": "*.safetensors filter=lfs",
    }.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)


COPIED = {
    "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
    "additional_chat_templates/tool_use.jinja", "encoding/encoding_dsv32.py", "LICENSE",
}  # fmt: skip


def expected(tensors: Tensors, rank: int, ranks: int) -> Tensors:
    """What the file of a rank should hold."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        *path, module, leaf = name.removeprefix("model.").split(".")
        if path[:2] == ["layers", str(N_LAYERS)] or leaf == "inv_freq":
            continue
        own, dim = TABLE[module]
        leaf = {"weight_scale_inv": "scale", "e_score_correction_bias": "bias"}.get(leaf, leaf)
        path = [{"self_attn": "attn", "mlp": "ffn"}.get(part, part) for part in path]
        if "experts" in path:
            per_rank = CONFIG["n_routed_experts"] // ranks
            if int(path[-1]) // per_rank != rank:
                continue
        elif dim is not None:
            tensor = tensor.chunk(ranks, dim)[rank]
        found[".".join([*path, own, leaf])] = tensor.contiguous()
    return found


def assert_same_bits(path: Path, wanted: Tensors) -> None:
    found = load_file(path)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name
