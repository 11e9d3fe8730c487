"""Mixture of experts with group-limited sigmoid routing (DeepSeek-V3 report, section 2.1.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsakv.models.layers import GatedMLP
from dsakv.models.options import ModelOptions


@dataclass(frozen=True)
class RoutingShape:
    n_experts: int
    n_activated: int
    n_groups: int
    n_limited_groups: int
    """Groups that a token may choose its experts from."""
    route_scale: float
    normalize: bool
    """Whether a token's expert weights are made to sum to ``route_scale``."""


class Gate(nn.Module):
    """Chooses the experts of each token. Affinities are sigmoids; the bias steers the choice, not the weights."""

    def __init__(self, dim: int, shape: RoutingShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.empty(shape.n_experts, dim, device="meta", dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape.n_experts, device="meta", dtype=torch.float32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` ``[T, dim]`` to expert weights ``[T, n_activated]`` float32 and expert ids of the same shape."""
        shape = self.shape
        affinity = F.linear(x.float(), self.weight.float()).sigmoid()  # [T, E]
        choice = affinity + self.bias
        if shape.n_groups > 1:
            grouped = choice.view(len(x), shape.n_groups, -1)  # [T, G, E / G]
            group_score = grouped.topk(2, dim=-1).values.sum(-1)  # [T, G]
            kept = group_score.topk(shape.n_limited_groups, dim=-1).indices
            dropped = torch.ones_like(group_score, dtype=torch.bool).scatter_(1, kept, False)
            choice = grouped.masked_fill(dropped.unsqueeze(-1), -math.inf).flatten(1)
        experts = choice.topk(shape.n_activated, dim=-1).indices
        weights = affinity.gather(1, experts)
        if shape.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * shape.route_scale, experts


class MoE(nn.Module):
    """Routed experts, and shared experts as one wide MLP that every token passes.

    A rank holds an equal, contiguous range of the routed experts, whole, and its part of the shared ones.
    """

    def __init__(self, dim: int, inter_dim: int, n_shared: int, shape: RoutingShape, options: ModelOptions) -> None:
        super().__init__()
        world = options.world
        n_local = shape.n_experts // world.size
        self.first, self.n_experts = world.rank * n_local, shape.n_experts
        self.gate = Gate(dim, shape, options.dtype)
        local = range(self.first, self.first + n_local)
        self.experts = nn.ModuleDict({str(expert): GatedMLP(dim, inter_dim, options) for expert in local})
        self.shared_experts = GatedMLP(dim, inter_dim * n_shared // world.size, options)

    def forward(self, x: Tensor) -> Tensor:
        """This rank's part of the output: ``[T, dim]`` to ``[T, dim]`` float32."""
        weights, experts = self.gate(x)  # [T, k]
        n_activated = experts.shape[1]
        flat = experts.flatten()
        order = flat.argsort(stable=True)  # pairs (token, expert), sorted by expert
        counts = torch.bincount(flat, minlength=self.n_experts).tolist()
        begin = sum(counts[: self.first])
        order = order[begin : begin + sum(counts[self.first : self.first + len(self.experts)])]  # of this rank's
        inputs = x.index_select(0, order.div(n_activated, rounding_mode="floor"))  # [pairs, dim]
        routed = torch.zeros(len(flat), x.shape[1], dtype=torch.float32, device=x.device)
        start = 0
        outputs = []
        for expert, module in self.experts.items():
            if count := counts[int(expert)]:
                outputs.append(module(inputs[start : start + count]))
                start += count
        if outputs:
            routed.index_copy_(0, order, torch.cat(outputs).float())
        # A sum in fixed order: adding by index would let CUDA choose it, and runs would differ.
        total = (routed.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1)
        out: Tensor = total + self.shared_experts(x)
        return out
