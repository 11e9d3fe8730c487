"""A layer of an fp8 model in float32, token against token: no cache, no blocks, no absorbed projections.

It multiplies rounded activations by the weights that a checkpoint's float8 numbers stand for, and rounds index queries,
index keys and latents where the reference rounds them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from dsakv.models.dsa_shape import DsaShape
from tests.models.fp8_checkpoints import dequantize

Rope = tuple[Tensor, Tensor]


def rounded(x: Tensor, *, ue8m0: bool, block: int = 128) -> Tensor:
    """What float8 keeps of ``x`` ``[..., n]``, a scale for each ``block`` numbers."""
    parts = []
    for part in x.split(block, dim=-1):
        scale = part.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448
        if ue8m0:
            scale = torch.exp2(torch.ceil(torch.log2(scale.double()))).float()
        parts.append((part / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale)
    return torch.cat(parts, -1)


def hadamard(n: int) -> Tensor:
    """The orthogonal matrix ``[n, n]`` with entries ``(-1)^popcount(i & j) / sqrt(n)``."""
    signs = [[1.0 - 2.0 * (bin(i & j).count("1") % 2) for j in range(n)] for i in range(n)]
    return torch.tensor(signs) / math.sqrt(n)


def turn(x: Tensor, rope: Rope, *, halves: bool) -> Tensor:
    """RoPE as multiplication of complex numbers; ``x`` ``[T, heads, dim]``."""
    wide = x.unflatten(-1, (2, -1)).transpose(-1, -2) if halves else x.unflatten(-1, (-1, 2))
    turned = torch.view_as_real(torch.view_as_complex(wide.contiguous()) * torch.complex(*rope).unsqueeze(1))
    return (turned.transpose(-1, -2) if halves else turned).flatten(-2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


class Kept(NamedTuple):
    """What a cache keeps of each token in a layer."""

    row: Tensor  # [T, kv_lora_rank + qk_rope_head_dim]
    keys: Tensor | None  # [T, D]; None in a layer without an indexer


class Oracle:
    """The model of a checkpoint in one file. ``rounding`` False leaves activations, keys and latents as they are."""

    def __init__(self, directory: Path, shape: DsaShape, *, rounding: bool = True) -> None:
        stored = load_file(directory / "model.safetensors")
        self.kept: Kept | None = None
        self.shape, self.rounding, self.ue8m0 = shape, rounding, shape.scale_fmt == "ue8m0"
        self.weights = {
            name: dequantize(tensor, stored[f"{name}_scale_inv"]) if f"{name}_scale_inv" in stored else tensor.float()
            for name, tensor in stored.items()
        }

    def round(self, x: Tensor, block: int = 128) -> Tensor:
        return rounded(x, ue8m0=self.ue8m0, block=block) if self.rounding else x

    def multiply(self, x: Tensor, name: str) -> Tensor:
        return self.round(x) @ self.weights[f"{name}.weight"].T

    def layer(
        self, layer_id: int, hidden: Tensor, rope: Rope, previous: Tensor | None, kept: Kept | None = None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states ``[T, dim]`` behind the layer, and which keys each query read, ``[T, T]`` bool.

        With ``kept`` the layer reads that instead of rows and keys of its own, which are then in ``own``.
        """
        self.kept, self.own = kept, Kept(hidden, None)
        name, shape = f"model.layers.{layer_id}", self.shape
        x = rms_norm(hidden, self.weights[f"{name}.input_layernorm.weight"], shape.norm_eps)
        attended, chosen = self.attention(f"{name}.self_attn", x, rope, previous)
        hidden = hidden + attended
        x = rms_norm(hidden, self.weights[f"{name}.post_attention_layernorm.weight"], shape.norm_eps)
        if layer_id < shape.n_dense_layers:
            return hidden + self.mlp(f"{name}.mlp", x), chosen
        return hidden + self.experts(f"{name}.mlp", x), chosen

    def attention(self, name: str, x: Tensor, rope: Rope, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        shape, w = self.shape, self.weights
        q_latent = rms_norm(self.multiply(x, f"{name}.q_a_proj"), w[f"{name}.q_a_layernorm.weight"], 1e-6)
        down = self.multiply(x, f"{name}.kv_a_proj_with_mqa")
        latent = rms_norm(down[:, : shape.kv_lora_rank], w[f"{name}.kv_a_layernorm.weight"], 1e-6)
        key_rope = turn(down[:, None, shape.kv_lora_rank :], rope, halves=False).squeeze(1)
        self.own = Kept(torch.cat((self.round(latent), key_rope), -1), None)
        row = self.kept.row if self.kept else self.own.row
        latent, key_rope = row.split([shape.kv_lora_rank, shape.qk_rope_head_dim], -1)
        chosen = self.select(f"{name}.indexer", x, q_latent, rope) if previous is None else previous

        q = self.multiply(q_latent, f"{name}.q_b_proj").unflatten(-1, (shape.n_heads, -1))  # [T, H, nope + rope]
        up = (latent @ w[f"{name}.kv_b_proj.weight"].T).unflatten(-1, (shape.n_heads, -1))  # [T, H, nope + v]
        key, value = up.split([shape.qk_nope_head_dim, shape.v_head_dim], -1)
        key = torch.cat((key, key_rope.unsqueeze(1).expand(-1, shape.n_heads, -1)), -1)
        q_nope, q_rope = q.split([shape.qk_nope_head_dim, shape.qk_rope_head_dim], -1)
        q = torch.cat((q_nope, turn(q_rope, rope, halves=False)), -1)
        scale = q.shape[-1] ** -0.5 * (shape.yarn.softmax_scale if shape.yarn else 1.0)
        logits = torch.einsum("thd,shd->hts", q, key) * scale
        weights = logits.masked_fill(~chosen, -math.inf).softmax(-1)
        return self.multiply(torch.einsum("hts,shd->thd", weights, value).flatten(1), f"{name}.o_proj"), chosen

    def select(self, name: str, x: Tensor, q_latent: Tensor, rope: Rope) -> Tensor:
        """The ``index_topk`` best keys of each query among those up to its own, ``[T, T]`` bool."""
        shape, w, dim = self.shape, self.weights, self.shape.index_head_dim
        q = self.multiply(q_latent, f"{name}.wq_b").unflatten(-1, (shape.index_n_heads, dim))
        key = self.multiply(x, f"{name}.wk")
        key = F.layer_norm(key, (dim,), w[f"{name}.k_norm.weight"], w[f"{name}.k_norm.bias"], 1e-6).unsqueeze(1)
        matrix, halves, parts = hadamard(dim), shape.indexer_rope == "halves", []
        for part in (q, key):
            turned = turn(part[..., : shape.qk_rope_head_dim], rope, halves=halves)
            parts.append(self.round(torch.cat((turned, part[..., shape.qk_rope_head_dim :]), -1) @ matrix, dim))
        self.own = Kept(self.own.row, parts[1][:, 0])
        keys = self.own.keys if self.kept is None else self.kept.keys
        assert keys is not None
        heads = (x @ w[f"{name}.weights_proj.weight"].T) / math.sqrt(shape.index_n_heads * dim)
        scores = torch.einsum("th,ths->ts", heads, torch.einsum("thd,sd->ths", parts[0], keys).relu())
        seen = torch.ones_like(scores, dtype=torch.bool).tril()
        best = scores.masked_fill(~seen, -math.inf).topk(min(shape.index_topk, len(x))).indices
        return torch.zeros_like(seen).scatter_(1, best, True) & seen

    def mlp(self, name: str, x: Tensor) -> Tensor:
        inner = F.silu(self.multiply(x, f"{name}.gate_proj")) * self.multiply(x, f"{name}.up_proj")
        return self.multiply(inner, f"{name}.down_proj")

    def experts(self, name: str, x: Tensor) -> Tensor:
        shape = self.shape
        affinity = (x @ self.weights[f"{name}.gate.weight"].T).sigmoid()  # [T, E]
        choice = affinity + self.weights[f"{name}.gate.e_score_correction_bias"]
        groups = choice.unflatten(-1, (shape.n_expert_groups, -1))  # [T, G, E / G]
        kept = groups.topk(min(2, groups.shape[-1])).values.sum(-1).topk(shape.n_limited_groups).indices
        allowed = torch.zeros(groups.shape[:2]).scatter_(1, kept, 1.0).bool().unsqueeze(-1).expand_as(groups).flatten(1)
        picked = choice.masked_fill(~allowed, -math.inf).topk(shape.n_activated_experts).indices
        weights = torch.zeros_like(affinity).scatter_(1, picked, affinity.gather(1, picked))
        weights = weights / weights.sum(-1, keepdim=True) if shape.norm_topk_prob else weights
        out = self.mlp(f"{name}.shared_experts", x)
        for expert in range(shape.n_routed_experts):
            share = weights[:, expert : expert + 1] * shape.route_scale
            out = out + share * self.mlp(f"{name}.experts.{expert}", x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        x = rms_norm(hidden, self.weights["model.norm.weight"], self.shape.norm_eps)
        return x @ self.weights["lm_head.weight"].T
