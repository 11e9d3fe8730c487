"""The reference kernels against their formulas, written out plainly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsakv.kernels import reference as kernels
from dsakv.kernels.contract import Quantized


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 5000), (3, 70), (64, 5000)])
def test_index_scores_follow_the_formula(queries: int, keys: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(queries, 8, 16, generator=generator)
    weights = torch.randn(queries, 8, generator=generator)
    k = torch.randn(keys, 16, generator=generator)
    out = torch.empty(queries, keys)
    kernels.index_scores(q, weights, k, None, out)
    expected = torch.einsum("th,ths->ts", weights.double(), torch.einsum("thd,sd->ths", q, k).relu().double())
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-5)


def test_index_scores_of_bfloat16_keys_are_not_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(4, 8, 32, generator=generator).bfloat16()
    k = torch.randn(300, 32, generator=generator).bfloat16()
    weights = torch.randn(4, 8, generator=generator)
    out, exact = torch.empty(4, 300), torch.empty(4, 300)
    kernels.index_scores(q, weights, k, None, out)
    kernels.index_scores(q.float(), weights, k.float(), None, exact)
    assert torch.equal(out, exact)


scores_rows = st.integers(1, 24).flatmap(
    lambda n: st.tuples(
        st.lists(
            st.lists(st.sampled_from([-math.inf, -1.5, 0.0, 0.25, 1.0, 3.0]), min_size=n, max_size=n),
            min_size=1,
            max_size=4,
        ),
        st.integers(1, n),
    )
)


@given(scores_rows)
def test_top_k_breaks_ties_towards_lower_positions(case: tuple[list[list[float]], int]) -> None:
    rows, k = case
    chosen = kernels.top_k(torch.tensor(rows), k).tolist()
    for row, positions in zip(rows, chosen, strict=True):
        visible = [p for p, score in enumerate(row) if score > -math.inf]
        best = sorted(sorted(visible, key=lambda p: (-row[p], p))[:k])
        picked = [p for p in positions if row[p] > -math.inf]
        assert picked == best
        assert positions == sorted(set(positions))


def test_top_k_puts_what_a_query_may_not_see_last() -> None:
    scores = torch.full((1, 10), -math.inf)
    scores[0, :3] = torch.tensor([1.0, 2.0, 2.0])
    assert kernels.top_k(scores, 5)[0, :3].tolist() == [0, 1, 2]


def test_top_k_survives_scores_that_are_not_numbers() -> None:
    assert kernels.top_k(torch.tensor([[math.nan, 1.0, 1.0, 0.0, 0.0]]), 3).tolist() == [[0, 1, 2]]
    assert kernels.top_k(torch.tensor([[math.nan, 1.0, 0.0, 0.0, 0.0]]), 3).tolist() == [[0, 1, 2]]


def test_sparse_attention_equals_softmax_over_the_valid_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 4, 12, generator=generator)
    rows = torch.randn(3, 6, 12, generator=generator)
    counts = torch.tensor([1, 4, 6])
    out = kernels.sparse_attention(q, rows, counts, 0.3, 8)
    for t, count in enumerate(counts.tolist()):
        valid = rows[t, :count]
        expected = (q[t] @ valid.T * 0.3).softmax(-1) @ valid[:, :8]
        torch.testing.assert_close(out[t], expected)


def test_hadamard_is_the_normalised_sylvester_matrix() -> None:
    matrix = torch.ones(1, 1)
    while len(matrix) < 64:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    x = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kernels.hadamard(x), x @ matrix / 8)


def test_hadamard_needs_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two"):
        kernels.hadamard(torch.ones(2, 12))


E4M3 = sorted({v for v in torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist() if v == v})


@settings(max_examples=50)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4), st.booleans())
def test_act_quant_takes_the_nearest_representable_value(values: list[float], power_of_two: bool) -> None:
    x = torch.tensor(values)
    quantized = kernels.act_quant(x, block=4, power_of_two_scale=power_of_two)
    scale = max(float(x.abs().max()), 1e-4) / 448
    if power_of_two:
        scale = 2.0 ** math.ceil(math.log2(scale))
    assert quantized.scale.tolist() == pytest.approx([scale])
    for value, result in zip(x.tolist(), quantized.values.float().tolist(), strict=True):
        assert result in E4M3
        assert abs(result - value / scale) <= min(abs(value / scale - grid) for grid in E4M3) + 1e-4


def test_widening_keeps_every_float8_number() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for x in (every, every.view(4, 64)[:, 3:9], every[:0]):
        torch.testing.assert_close(kernels.widen(x), x.float(), rtol=0, atol=0, equal_nan=True)
    short = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(kernels.widen(short), short.float())


def test_scales_that_are_powers_of_two_stay() -> None:
    powers = 2.0 ** torch.arange(-12, 12)
    quantized = kernels.act_quant((powers * 448).unsqueeze(1), block=1, power_of_two_scale=True)
    assert torch.equal(quantized.scale.squeeze(1), powers)


def test_dequantize_multiplies_each_block_by_its_scale() -> None:
    x = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(0))
    quantized = kernels.act_quant(x, power_of_two_scale=False)
    assert quantized.scale.shape == (3, 5, 2)
    expected = torch.cat([quantized.values[..., :128].float() * quantized.scale[..., :1],
                          quantized.values[..., 128:].float() * quantized.scale[..., 1:]], -1)  # fmt: skip
    assert torch.equal(kernels.dequantize(quantized), expected)
    torch.testing.assert_close(kernels.dequantize(quantized), x, atol=0.02, rtol=2**-4)


def test_act_quant_refuses_a_partial_block() -> None:
    with pytest.raises(ValueError, match="multiple"):
        kernels.act_quant(torch.ones(3, 100), power_of_two_scale=True)


def block_scaled(n: int, k: int, generator: torch.Generator) -> Quantized:
    values = torch.randn(n, k, generator=generator).mul(100).to(torch.float8_e4m3fn)
    return Quantized(values, torch.rand(-(-n // 128), -(-k // 128), generator=generator) + 0.5)


def test_dequantize_into_scales_squares_also_where_the_last_are_cut() -> None:
    weight = block_scaled(300, 200, torch.Generator().manual_seed(0))
    wide = torch.empty(300, 200)
    kernels.dequantize_into(wide, *weight, (0, 0))
    for i in (0, 127, 128, 299):
        for j in (0, 127, 128, 199):
            assert wide[i, j] == weight.values[i, j].float() * weight.scale[i // 128, j // 128]


@pytest.mark.parametrize(("queries", "n"), [(1, 64), (5, 576), (3, 5000)])
def test_fp8_gemm_follows_the_formula(queries: int, n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = kernels.act_quant(torch.randn(queries, 384, generator=generator), power_of_two_scale=True)
    weight = block_scaled(n, 384, generator)
    out = kernels.fp8_gemm(x, weight)
    expected = torch.zeros(queries, n, dtype=torch.float64)
    for block in range(3):  # each block of the inner dimension with its scales
        inner = slice(block * 128, (block + 1) * 128)
        product = x.values[:, inner].double() @ weight.values[:, inner].double().T
        rows = weight.scale[torch.arange(n) // 128, block].double()
        expected += product * x.scale[:, block : block + 1].double() * rows
    torch.testing.assert_close(out.double(), expected, atol=0.05, rtol=1e-5)


def test_index_scores_of_float8_keys_use_their_scales() -> None:
    generator = torch.Generator().manual_seed(0)
    q = kernels.act_quant(torch.randn(3, 8, 128, generator=generator), power_of_two_scale=True)
    keys = kernels.act_quant(torch.randn(300, 128, generator=generator), power_of_two_scale=True)
    weights = torch.randn(3, 8, generator=generator)
    out, expected = torch.empty(3, 300), torch.empty(3, 300)
    kernels.index_scores(q.values, weights * q.scale.squeeze(-1), keys.values, keys.scale.squeeze(-1), out)
    kernels.index_scores(kernels.dequantize(q), weights, kernels.dequantize(keys), None, expected)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-5)
