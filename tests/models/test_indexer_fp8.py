"""The indexer in fp8: its rotation changes nothing, and its scores are those of rounded queries and keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from dsakv.kernels import reference
from dsakv.kernels.contract import FP8_BLOCK, Kernels, Quantized
from dsakv.models.contracts import Fp8Kv, IndexKeys, Segment, Selection
from dsakv.models.deepseek_v32 import indexer_shape
from dsakv.models.deepseek_v32_shape import parse_shape
from dsakv.models.indexer import Indexer
from dsakv.models.layers import RotaryEmbedding
from dsakv.models.options import ModelOptions
from dsakv.models.tiny import CONFIG
from tests.models.fp8_checkpoints import FP8_SHAPE

SHAPE = parse_shape(CONFIG | FP8_SHAPE, "test")
TOKENS = 120


class Exact:
    """The reference kernels, but that quantization keeps every bit."""

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)

    def act_quant(self, x: Tensor, *, power_of_two_scale: bool, block: int = FP8_BLOCK) -> Quantized:
        return Quantized(x.float(), torch.ones(*x.shape[:-1], x.shape[-1] // block))


class Keys:
    """A cache of one sequence's index keys, quantised as ``fp8`` says."""

    def __init__(self, fp8: Fp8Kv | None) -> None:
        self.fp8, self.kept = fp8, IndexKeys(torch.empty(0), None)
        self.segments = [Segment(slice(0, TOKENS), TOKENS)]

    def append(self, kv: Tensor, index_key: Tensor | None) -> None:
        assert index_key is not None
        if self.fp8:
            values, scale = self.fp8.quantize(index_key, index_key.shape[-1])
            self.kept = IndexKeys(values, scale.squeeze(-1))
        else:
            self.kept = IndexKeys(index_key, None)

    def index_keys(self, segment: int) -> IndexKeys:
        return self.kept

    def sequence(self, segment: int) -> Tensor:
        raise NotImplementedError

    def fetch(self, selection: Selection | None) -> None:
        raise NotImplementedError

    def gather(self, rows: slice) -> Tensor:
        raise NotImplementedError


def select(indexer: Indexer, kernels: Kernels) -> Selection:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, SHAPE.dim, generator=generator)
    q_latent = torch.randn(TOKENS, SHAPE.q_lora_rank, generator=generator)
    positions = torch.arange(TOKENS)
    rope = RotaryEmbedding(SHAPE.qk_rope_head_dim, SHAPE.rope_theta, SHAPE.yarn, torch.device("cpu"))(positions)
    cache = Keys(Fp8Kv(kernels, indexer.ue8m0) if indexer.fp8 else None)
    cache.append(x, indexer.key(x, rope))
    selection: Selection = indexer(x, q_latent, rope, positions, cache)
    return selection


def make(options: ModelOptions) -> Indexer:
    """An indexer of normal weights, always the same ones."""
    indexer, generator = Indexer(indexer_shape(SHAPE), options), torch.Generator().manual_seed(0)
    for name, parameter in list(indexer.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
        setattr(indexer.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    return indexer


def scores_of(indexer: Indexer, kernels: Kernels) -> Tensor:
    """All scores ``[T, T]``, ``-inf`` where a query may not see."""
    kept = indexer.shape
    indexer.shape = replace(kept, top_k=TOKENS)
    scores = select(indexer, kernels).scores
    indexer.shape = kept
    return scores


def test_the_rotation_changes_nothing_without_rounding() -> None:
    exact = cast(Kernels, Exact())
    plain, rotated = make(ModelOptions()), make(ModelOptions(kernels=exact, index_fp8=True))
    x = torch.randn(3, SHAPE.dim, generator=torch.Generator().manual_seed(2))
    rope = (torch.ones(3, 32), torch.zeros(3, 32))
    assert not torch.allclose(plain.key(x, rope), rotated.key(x, rope), atol=0.1)  # it does rotate
    scores = scores_of(plain, reference)
    torch.testing.assert_close(scores_of(rotated, exact), scores, atol=1e-5, rtol=1e-5)
    one, other = select(plain, reference), select(rotated, exact)
    best = scores.sort(dim=-1, descending=True).values
    clear = 0
    for row in range(SHAPE.index_topk, TOKENS):  # queries that leave something out
        if best[row, SHAPE.index_topk - 1] - best[row, SHAPE.index_topk] > 1e-5:
            assert torch.equal(one.positions[row], other.positions[row])
            clear += 1
    assert clear > 90


@pytest.mark.parametrize("ue8m0", [True, False])
def test_scores_are_those_of_rounded_queries_and_keys(ue8m0: bool) -> None:
    fp8, rounding = make(ModelOptions(index_fp8=True, ue8m0=ue8m0)), RoundingInPlace()
    in_place = make(ModelOptions(kernels=cast(Kernels, rounding), index_fp8=True, ue8m0=ue8m0))
    scores, expected = scores_of(fp8, reference), scores_of(in_place, cast(Kernels, rounding))
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    unrounded = scores_of(make(ModelOptions()), reference)
    assert (scores - unrounded).tril().abs().nan_to_num().max() > 1e-3
    best = expected.sort(dim=-1, descending=True).values
    gaps = best[:, SHAPE.index_topk - 1] - best[:, SHAPE.index_topk]
    clear = (gaps > 1e-5) & (torch.arange(TOKENS) >= SHAPE.index_topk)
    assert clear.sum() > 90
    assert torch.equal(
        select(fp8, reference).positions[clear], select(in_place, cast(Kernels, rounding)).positions[clear]
    )


class RoundingInPlace(Exact):
    """Quantization that hands out float32 numbers of scale 1, rounded as float8 would."""

    def act_quant(self, x: Tensor, *, power_of_two_scale: bool, block: int = FP8_BLOCK) -> Quantized:
        rounded = reference.act_quant(x, power_of_two_scale=power_of_two_scale, block=block)
        return super().act_quant(reference.dequantize(rounded), power_of_two_scale=False, block=block)
