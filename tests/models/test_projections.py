"""Float8 projections: each output within the error that rounding its inputs can make."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dsakv.kernels.contract import Quantized
from dsakv.kernels.reference import act_quant, fp8_gemm
from dsakv.models.options import ModelOptions
from dsakv.models.projections import Fp8Linear, projection
from tests.models.fp8_checkpoints import dequantize, quantize


def half_steps(x: Tensor, *, ue8m0: bool) -> Tensor:
    """How far rounding may move each number of ``x`` ``[T, k]``: half a step of e4m3 where it stands, times the scale.

    With 3 bits of mantissa and exponents from -6 on, numbers in ``[2^e, 2^(e + 1))`` are ``2^(e - 3)`` apart.
    """
    blocks = x.double().view(len(x), -1, 128)
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448
    if ue8m0:
        scale = torch.exp2(torch.ceil(torch.log2(scale) - 1e-9))
    exponent = torch.floor(torch.log2((blocks.abs() / scale).clamp(min=2.0**-6)) + 1e-9)
    return (torch.exp2(exponent - 4) * scale).view(x.shape)


def make(n: int, k: int, generator: torch.Generator, *, ue8m0: bool) -> tuple[Fp8Linear, Tensor]:
    """A filled projection and its weight as ordinary numbers."""
    module = projection(k, n, ModelOptions(fp8=True, ue8m0=ue8m0))
    assert isinstance(module, Fp8Linear)
    values, scale = quantize(torch.randn(n, k, generator=generator) / k**0.5)
    assert (module.weight.shape, module.scale.shape) == (values.shape, scale.shape)
    module.weight, module.scale = (nn.Parameter(part, requires_grad=False) for part in (values, scale))
    return module, dequantize(values, scale).double()


@settings(max_examples=40)
@given(
    n=st.sampled_from([1, 64, 128, 130, 320]),
    blocks=st.integers(1, 4),
    tokens=st.integers(1, 5),
    size=st.sampled_from([1e-6, 1e-3, 1.0, 1e3]),
    ue8m0=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_the_error_is_that_of_rounded_inputs(
    n: int, blocks: int, tokens: int, size: float, ue8m0: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    module, weight = make(n, 128 * blocks, generator, ue8m0=ue8m0)
    x = torch.randn(tokens, 128 * blocks, generator=generator) * size
    x[:, ::7] *= 1e-3  # some that only subnormal numbers hold
    error = (module(x).double() - x.double() @ weight.T).abs()
    same = fp8_gemm(act_quant(x, power_of_two_scale=ue8m0), Quantized(module.weight, module.scale))
    assert torch.equal(module(x), same)
    bound = half_steps(x, ue8m0=ue8m0) @ weight.T.abs()
    assert (error <= bound * (1 + 1e-6) + 1e-5 * (x.double().abs() @ weight.T.abs())).all()
    if size >= 1 and n >= 64:  # and it is there: the bound is no excuse for rounding nothing
        assert error.mean() > bound.mean() / 200


def test_numbers_that_float8_holds_pass_unrounded() -> None:
    generator = torch.Generator().manual_seed(0)
    module, weight = make(200, 256, generator, ue8m0=True)
    x = torch.randint(-8, 9, (3, 256), generator=generator).float()
    x[:, ::128] = 448.0  # of scale 1
    torch.testing.assert_close(module(x).double(), x.double() @ weight.T, rtol=1e-5, atol=1e-4)


def test_the_result_has_the_dtype_of_the_input() -> None:
    generator = torch.Generator().manual_seed(0)
    module, _ = make(130, 256, generator, ue8m0=True)
    x = torch.randn(4, 256, generator=generator).bfloat16()
    assert module(x).dtype == torch.bfloat16
    assert torch.equal(module(x), module(x.float()).bfloat16())


def test_what_is_not_rounded_is_plain() -> None:
    assert isinstance(projection(4, 3, ModelOptions(index_fp8=True)), nn.Linear)
