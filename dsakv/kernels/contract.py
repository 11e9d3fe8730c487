"""What a set of kernels offers: ``reference`` is the specification and runs anywhere, ``tile`` is for CUDA."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

FP8_BLOCK = 128
"""Numbers of an activation's last dimension that share a scale; a weight's scales are for squares of this side."""


class Quantized(NamedTuple):
    """Numbers in float8 e4m3 with their scales in float32."""

    values: Tensor
    scale: Tensor


class Kernels(Protocol):
    """Functions on tensors of one device; their meaning, shapes and rounding stand in ``dsakv.kernels.reference``."""

    def act_quant(self, x: Tensor, *, power_of_two_scale: bool, block: int = FP8_BLOCK) -> Quantized: ...

    def fp8_gemm(self, x: Quantized, weight: Quantized) -> Tensor: ...

    def index_scores(self, q: Tensor, weights: Tensor, keys: Tensor, key_scale: Tensor | None, out: Tensor) -> None: ...

    def top_k(self, scores: Tensor, k: int) -> Tensor: ...

    def sparse_attention(self, q: Tensor, rows: Tensor, counts: Tensor, scale: float, value_dim: int) -> Tensor: ...

    def hadamard(self, x: Tensor) -> Tensor: ...
