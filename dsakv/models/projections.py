"""Projections without bias: plain, or with float8 weights (DeepSeek-V3 report, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsakv.kernels.contract import FP8_BLOCK, Quantized
from dsakv.models.options import ModelOptions


def linear(in_features: int, out_features: int, dtype: torch.dtype) -> nn.Linear:
    """A projection whose weight is kept in ``dtype`` whatever the model's precision."""
    return _Linear(in_features, out_features, bias=False, device="meta", dtype=dtype)


class _Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Nothing: drawing random numbers on ``meta`` is most of what a model of 45,000 projections takes to build."""


class Fp8Linear(nn.Module):
    """``x @ weight.T`` with the weight in float8 and ``x`` rounded to it, block by block, on the way in.

    As checkpoints hold them: ``weight`` ``[n, k]`` e4m3, ``scale`` ``[ceil(n / 128), ceil(k / 128)]`` float32.
    """

    def __init__(self, in_features: int, out_features: int, options: ModelOptions) -> None:
        super().__init__()
        self.kernels, self.ue8m0 = options.kernels, options.ue8m0
        weight = torch.empty(out_features, in_features, device="meta", dtype=torch.float8_e4m3fn)
        blocks = (-(-out_features // FP8_BLOCK), -(-in_features // FP8_BLOCK))
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(torch.empty(blocks, device="meta", dtype=torch.float32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, k]`` to ``[T, n]`` in the dtype of ``x``; accumulated in float32."""
        rounded = self.kernels.act_quant(x, power_of_two_scale=self.ue8m0)
        return self.kernels.fp8_gemm(rounded, Quantized(self.weight, self.scale)).to(x.dtype)


def projection(in_features: int, out_features: int, options: ModelOptions) -> nn.Linear | Fp8Linear:
    """One of the projections that an fp8 model holds in float8."""
    if options.fp8:
        return Fp8Linear(in_features, out_features, options)
    return linear(in_features, out_features, options.dtype)
