"""Mixture of experts with group-limited sigmoid routing (DeepSeek-V3 report, section 2.1.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsakv.models.layers import GatedMLP


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
    """Routed experts, and shared experts as one wide MLP that every token passes."""

    def __init__(self, dim: int, inter_dim: int, n_shared: int, shape: RoutingShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = Gate(dim, shape, dtype)
        self.experts = nn.ModuleList(GatedMLP(dim, inter_dim, dtype) for _ in range(shape.n_experts))
        self.shared_experts = GatedMLP(dim, inter_dim * n_shared, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, dim]`` to ``[T, dim]``."""
        weights, experts = self.gate(x)  # [T, k]
        n_activated = experts.shape[1]
        order = experts.flatten().argsort(stable=True)  # pairs (token, expert), sorted by expert
        tokens = order.div(n_activated, rounding_mode="floor")
        inputs = x.index_select(0, tokens)  # [T * k, dim]
        outputs = []
        start = 0
        for expert, count in enumerate(torch.bincount(experts.flatten(), minlength=len(self.experts)).tolist()):
            if count:
                outputs.append(self.experts[expert](inputs[start : start + count]))
                start += count
        sorted_outputs = torch.cat(outputs).float()  # [T * k, dim]
        routed = torch.empty_like(sorted_outputs).index_copy_(0, order, sorted_outputs).view(*weights.shape, -1)
        # A sum in fixed order: adding by index would let CUDA choose it, and runs would differ.
        total = (routed * weights.unsqueeze(-1)).sum(1)
        out: Tensor = total.to(x.dtype) + self.shared_experts(x)
        return out
