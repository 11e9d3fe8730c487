"""Small checkpoints with block-scaled fp8 weights, in the layout that the hub has them in."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsakv.models.contracts import Model
from dsakv.models.tiny import CONFIG, write_checkpoint

BLOCK = 128
QUANTIZED = (
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    *("indexer.wq_b", "indexer.wk"),
    *("gate_proj", "up_proj", "down_proj"),
)
FP8_SHAPE: dict[str, Any] = {
    # Inputs are multiples of 128 on 1, 2 and 4 ranks; kv_a_proj_with_mqa ends within a block, as the real one does.
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 128,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "index_n_heads": 16,
    "index_head_dim": 128,
    "index_topk": 16,
    "max_position_embeddings": 512,
    "rope_scaling": CONFIG["rope_scaling"] | {"factor": 8.0, "original_max_position_embeddings": 64},
}


def quantize(weight: Tensor, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """``[n, k]`` as float8 and scales ``[ceil(n / 128), ceil(k / 128)]``, each the greatest of its square over 448.

    With scales that are powers of two, bfloat16 holds the dequantised numbers too.
    """
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scale = torch.empty(-(-weight.shape[0] // BLOCK), -(-weight.shape[1] // BLOCK))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            square = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scale[i, j] = weight[square].abs().max() / 448
            if power_of_two:
                scale[i, j] = 2.0 ** math.ceil(math.log2(scale[i, j]))
            values[square] = (weight[square] / scale[i, j]).to(torch.float8_e4m3fn)
    return values, scale


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """The float32 weight that ``quantize`` made these of, as far as they keep it."""
    out = values.float()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            out[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK] *= scale[i, j]
    return out


def write_fp8_checkpoint(
    directory: Path, config: dict[str, Any] = CONFIG | FP8_SHAPE, seed: int = 0, scale_fmt: str | None = "ue8m0"
) -> None:
    """Write a random checkpoint of this shape: projections in float8 with ``weight_scale_inv``, the rest in bfloat16.

    As in released ones, the gate's bias is float32 and ``config.json`` has a ``quantization_config``, in which
    ``scale_fmt`` None leaves that key out.
    """
    directory.mkdir(parents=True, exist_ok=True)
    quantization = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128] * 2,
    }
    quantization |= {"scale_fmt": scale_fmt} if scale_fmt else {}
    write_checkpoint(directory, config | {"quantization_config": quantization}, seed)
    tensors = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if name.removesuffix(".weight").endswith(QUANTIZED):
            kept_wide = name.endswith("kv_b_proj.weight")
            tensors[name], tensors[f"{name}_scale_inv"] = quantize(tensor, power_of_two=kept_wide)
        else:
            tensors[name] = tensor if name.endswith("bias") else tensor.bfloat16()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def write_dequantized(source: Path, directory: Path) -> None:
    """Write the checkpoint ``source`` again with its fp8 weights as the float32 numbers that they stand for."""
    directory.mkdir(parents=True, exist_ok=True)
    stored = load_file(source / "model.safetensors")
    tensors = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        scale = stored.get(f"{name}_scale_inv")
        tensors[name] = tensor if scale is None else dequantize(tensor, scale)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    for path in source.glob("*token*"):
        (directory / path.name).write_bytes(path.read_bytes())


def convert(model: Model, dtype: torch.dtype) -> Model:
    """An fp8 model changed to compute in ``dtype`` whatever it does not round to float8: with less noise to compare."""
    assert isinstance(model, nn.Module)
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.to(dtype)
    model.dtype = dtype
    return model
