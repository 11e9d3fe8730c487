"""Routing and the mixture of experts against plain loops over tokens, groups and experts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dsakv.models.layers import GatedMLP
from dsakv.models.moe import Gate, MoE, RoutingShape
from dsakv.models.options import ModelOptions

DIM = 12
CPU = torch.device("cpu")


def fill(module: nn.Module, seed: int) -> torch.Generator:
    """Give a module on ``meta`` normal weights; biases too, so that none can be left out unseen."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in list(module.named_parameters()):
        owner_name, _, leaf = name.rpartition(".")
        value = torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1])
        setattr(module.get_submodule(owner_name), leaf, nn.Parameter(value, requires_grad=False))
    return generator


def route(affinity: list[float], bias: list[float], shape: RoutingShape) -> dict[int, float]:
    """The experts of one token and their weights, as section 2.1.2 of the DeepSeek-V3 report says it."""
    choice = [a + b for a, b in zip(affinity, bias, strict=True)]
    size = shape.n_experts // shape.n_groups
    groups = [range(g * size, (g + 1) * size) for g in range(shape.n_groups)]
    if shape.n_groups > 1:  # a group is as good as its two best experts
        groups.sort(key=lambda group: sum(sorted((choice[e] for e in group), reverse=True)[:2]), reverse=True)
        groups = groups[: shape.n_limited_groups]
    allowed = [e for group in groups for e in group]
    chosen = sorted(allowed, key=lambda e: choice[e], reverse=True)[: shape.n_activated]
    total = sum(affinity[e] for e in chosen) if shape.normalize else 1.0
    return {e: affinity[e] / total * shape.route_scale for e in chosen}


@st.composite
def routings(draw: st.DrawFn) -> RoutingShape:
    groups = draw(st.sampled_from([1, 2, 4]))
    size = draw(st.integers(2, 4))
    limited = draw(st.integers(1, groups))
    return RoutingShape(
        n_experts=groups * size,
        n_activated=draw(st.integers(1, limited * size)),
        n_groups=groups,
        n_limited_groups=limited,
        route_scale=draw(st.sampled_from([1.0, 2.5])),
        normalize=draw(st.booleans()),
    )


def experts_of(gate: Gate, x: Tensor) -> list[dict[int, float]]:
    affinity = [[1 / (1 + math.exp(-v)) for v in row] for row in (x.double() @ gate.weight.double().T).tolist()]
    return [route(row, gate.bias.double().tolist(), gate.shape) for row in affinity]


@settings(max_examples=60, deadline=None)
@given(shape=routings(), tokens=st.integers(1, 5), seed=st.integers(0, 2**20))
def test_gate(shape: RoutingShape, tokens: int, seed: int) -> None:
    gate = Gate(DIM, shape, torch.float32)
    x = torch.randn(tokens, DIM, generator=fill(gate, seed))
    weights, experts = gate(x)
    assert weights.shape == experts.shape == (tokens, shape.n_activated)
    assert weights.dtype == torch.float32
    for own, ids, expected in zip(weights.tolist(), experts.tolist(), experts_of(gate, x), strict=True):
        got = dict(zip(ids, own, strict=True))
        assert got.keys() == expected.keys()
        assert got == pytest.approx(expected, rel=1e-5)
        if shape.normalize:
            assert sum(own) == pytest.approx(shape.route_scale, rel=1e-5)


def test_the_bias_steers_the_choice_and_not_the_weights() -> None:
    shape = RoutingShape(4, 2, 1, 1, route_scale=1.0, normalize=False)
    gate = Gate(DIM, shape, torch.float32)
    generator = fill(gate, 0)
    gate.bias.copy_(torch.tensor([0.0, 10.0, 0.0, 10.0]))
    x = torch.randn(3, DIM, generator=generator)
    weights, experts = gate(x)
    assert experts.sort(-1).values.tolist() == [[1, 3]] * 3
    assert (weights < 1).all()


@settings(max_examples=25, deadline=None)
@given(shape=routings(), tokens=st.integers(1, 6), shared=st.integers(1, 2), seed=st.integers(0, 2**20))
def test_mixture_of_experts(shape: RoutingShape, tokens: int, shared: int, seed: int) -> None:
    """Token by token and expert by expert; also where some experts, or all but one, get no token."""
    moe = MoE(DIM, 8, shared, shape, ModelOptions())
    x = torch.randn(tokens, DIM, generator=fill(moe, seed))
    assert moe.shared_experts.w1.weight.shape == (8 * shared, DIM)
    expected = []
    for row, routed in zip(x, experts_of(moe.gate, x), strict=True):
        total = swiglu(moe.shared_experts, row)
        for expert, weight in routed.items():
            total = total + weight * swiglu(moe.experts[str(expert)], row)
        expected.append(total)
    torch.testing.assert_close(moe([x])[0], torch.stack(expected).float(), atol=1e-5, rtol=1e-4)


def swiglu(mlp: nn.Module, row: Tensor) -> Tensor:
    assert isinstance(mlp, GatedMLP)
    w1, w2, w3 = (m.weight.double() for m in (mlp.w1, mlp.w2, mlp.w3))
    gate = w1 @ row.double()
    return w2 @ (gate / (1 + (-gate).exp()) * (w3 @ row.double()))
