"""Mixture of experts with group-limited sigmoid routing (DeepSeek-V3 report, section 2.1.2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol

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


class Routing(NamedTuple):
    """The experts of the ``T`` tokens of a chunk, as pairs (token, expert) in the order of the experts."""

    tokens: Tensor  # [T * n_activated]
    weights: Tensor  # [T * n_activated] float32
    spans: dict[int, slice]
    """The pairs of each expert that has any."""


class Experts(Protocol):
    """Routed experts of a layer, wherever their weights are."""

    def __call__(self, chosen: list[int]) -> Iterator[GatedMLP]:
        """Those ``chosen``, in this order, each ready to compute until the next one is asked for.

        They begin to come as soon as this is called: what is computed before the first is asked for hides the time.
        """
        ...


class MoE(nn.Module):
    """Routed experts, and shared experts as one wide MLP that every token passes.

    A rank holds an equal, contiguous range of the routed experts, whole, and its part of the shared ones.
    """

    def __init__(self, dim: int, inter_dim: int, n_shared: int, shape: RoutingShape, options: ModelOptions) -> None:
        super().__init__()
        world = options.world
        n_local = shape.n_experts // world.size
        self.local = range(world.rank * n_local, (world.rank + 1) * n_local)
        self.gate = Gate(dim, shape, options.dtype)
        self.experts = nn.ModuleDict({str(expert): GatedMLP(dim, inter_dim, options) for expert in self.local})
        self.shared_experts = GatedMLP(dim, inter_dim * n_shared // world.size, options)
        self.bring: Experts = lambda chosen: (self.expert(i) for i in chosen)

    def expert(self, number: int) -> GatedMLP:
        """One of this rank's routed experts."""
        module = self.experts[str(number)]
        assert isinstance(module, GatedMLP)
        return module

    def forward(self, chunks: list[Tensor]) -> list[Tensor]:
        """This rank's part of the output of each chunk: ``[t, dim]`` to ``[t, dim]`` float32."""
        routings = [self._route(x) for x in chunks]
        chosen = sorted(set().union(*(routing.spans for routing in routings)))
        experts = self.bring(chosen)
        shared = [self.shared_experts(x) for x in chunks]
        totals = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in chunks]
        for number, expert in zip(chosen, experts, strict=True):
            for x, total, routing in zip(chunks, totals, routings, strict=True):
                if span := routing.spans.get(number):
                    tokens = routing.tokens[span]
                    out = expert(x.index_select(0, tokens)).float()
                    # A token has an expert once at most: the sum is in the order of the experts, on CUDA too.
                    total.index_add_(0, tokens, out * routing.weights[span].unsqueeze(1))
        return [total + own for total, own in zip(totals, shared, strict=True)]

    def _route(self, x: Tensor) -> Routing:
        weights, experts = self.gate(x)  # [T, k]
        n_activated = experts.shape[1]
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=self.local.stop).tolist()
        ends = list(accumulate(counts))
        spans = {i: slice(ends[i] - counts[i], ends[i]) for i in self.local if counts[i]}
        return Routing(order.div(n_activated, rounding_mode="floor"), weights.flatten()[order], spans)
