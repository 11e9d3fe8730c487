"""The kernels for CUDA: tilelang programs where they fit, else the reference.

Each function means what its namesake in ``dsakv.kernels.reference`` does, and says what it needs to run as a program
of its own. A program is compiled when it is first used, once for each size of model.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsakv.kernels import reference
from dsakv.kernels.contract import FP8_BLOCK, Quantized
from dsakv.kernels.reference import top_k

__all__ = ["act_quant", "fp8_gemm", "hadamard", "index_scores", "sparse_attention", "top_k"]

_HALF = (torch.bfloat16, torch.float16)


def act_quant(x: Tensor, *, power_of_two_scale: bool, block: int = FP8_BLOCK) -> Quantized:
    """The same bits as the reference; for blocks of 32, 64 or 128 numbers."""
    n = x.shape[-1]
    if block not in (32, 64, 128) or n % block or x.numel() == 0:
        return reference.act_quant(x, power_of_two_scale=power_of_two_scale, block=block)
    rows = x.reshape(-1, n)
    values = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(len(rows), n // block, dtype=torch.float32, device=x.device)
    _program("act_quant", n, block, power_of_two_scale, _name(x.dtype))(rows.contiguous(), values, scale)
    return Quantized(values.view(x.shape), scale.view(*x.shape[:-1], -1))


def fp8_gemm(x: Quantized, weight: Quantized) -> Tensor:
    """Products in float8, added up in float32; needs tensor cores that know float8 (Ada, Hopper and later)."""
    (n, k), t = weight.values.shape, len(x.values)
    if k % FP8_BLOCK or t == 0 or not knows_float8(x.values.device):
        return reference.fp8_gemm(x, weight)
    out = torch.empty(t, n, dtype=torch.float32, device=x.values.device)
    program = _program("fp8_gemm", n, k, 16 if t <= 16 else 64)
    program(x.values.contiguous(), x.scale.contiguous(), weight.values, weight.scale, out)
    return out


def index_scores(q: Tensor, weights: Tensor, keys: Tensor, key_scale: Tensor | None, out: Tensor) -> None:
    """For queries and keys of one dtype: bfloat16, float16, or float8 where the device knows it.

    float32 goes to the reference: tensor cores would round it. So do sizes that are no multiples of 16 heads and 32
    numbers.
    """
    t, n_heads, dim = q.shape
    fits = q.dtype == keys.dtype and n_heads % 16 == 0 and dim % 32 == 0 and dim <= 256
    half = q.dtype in _HALF or (q.dtype == torch.float8_e4m3fn and knows_float8(q.device))
    if not (fits and half) or t == 0:
        reference.index_scores(q, weights, keys, key_scale, out)
        return
    scaled = key_scale is not None
    unit = torch.empty(len(keys), device=q.device) if key_scale is None else key_scale.contiguous()
    rows = _whole_rows(out)
    target = torch.empty_like(out, memory_format=torch.contiguous_format) if rows is None else rows
    program = _program("index_scores", n_heads, dim, _name(q.dtype), scaled)
    program(q.contiguous(), weights.contiguous(), keys.contiguous(), unit, target)
    if rows is None:
        out.copy_(target)


def sparse_attention(q: Tensor, rows: Tensor, counts: Tensor, scale: float, value_dim: int) -> Tensor:
    """For bfloat16 and float16, with values of at most 512 numbers; they and what is beside them multiples of 16."""
    t, n_heads, dim = q.shape
    rest = dim - value_dim
    if q.dtype not in _HALF or rows.dtype != q.dtype or value_dim % 16 or value_dim > 512 or rest % 16 or rest < 16:
        return reference.sparse_attention(q, rows, counts, scale, value_dim)
    out = torch.empty(t, n_heads, value_dim, dtype=q.dtype, device=q.device)
    heads = 16 if n_heads <= 16 else 32 if n_heads <= 32 else 64
    program = _program("sparse_attention", n_heads, heads, value_dim, rest, scale, _name(q.dtype))
    program(q.contiguous(), rows.contiguous(), counts.contiguous(), out)
    return out


def hadamard(x: Tensor) -> Tensor:
    """Through fast-hadamard-transform where it is installed."""
    fast = _fast_hadamard()
    return reference.hadamard(x) if fast is None else fast(x, scale=x.shape[-1] ** -0.5)


@functools.cache
def _program(name: str, *sizes: Any) -> Callable[..., None]:
    """A program of ``tile_programs``, compiled for the current device."""
    import tilelang

    from dsakv.kernels import tile_programs

    logging.getLogger("tilelang").setLevel(logging.WARNING)
    compiled: Callable[..., None] = tilelang.compile(getattr(tile_programs, name)(*sizes))
    return compiled


@functools.cache
def _fast_hadamard() -> Callable[..., Tensor] | None:
    try:
        from fast_hadamard_transform import hadamard_transform
    except ModuleNotFoundError:
        return None
    transform: Callable[..., Tensor] = hadamard_transform
    return transform


def knows_float8(device: torch.device) -> bool:
    """Whether the tensor cores of a CUDA device multiply float8: from Ada and Hopper on."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _whole_rows(out: Tensor) -> Tensor | None:
    """``out`` ``[T, S]`` as wide as its rows stand apart; None where the last row has no such room behind it."""
    t, n_keys = out.shape
    width = out.stride(0) if t > 1 else n_keys
    room = out.untyped_storage().nbytes() // out.element_size() - out.storage_offset()
    if out.stride(1) != 1 or width < n_keys or t * width > room:
        return None
    return out.as_strided((t, width), (width, 1))
