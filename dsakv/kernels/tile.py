"""The kernels on CUDA: tilelang programs for the dtypes and shapes that models have, the reference for all others.

What a program covers stands in its function's docstring; beyond that, and on any device that is not an NVIDIA GPU of
compute capability 8.0 (A100) or newer, the function *is* the reference. Programs are compiled when first needed and
kept on disk by tilelang. Raises ModuleNotFoundError at the first covered call where tilelang is not installed.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from dsakv.kernels import reference
from dsakv.kernels.contract import FP8_BLOCK, Quantized

FP8 = torch.float8_e4m3fn
HALF = (torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # bfloat16 on tensor cores, asynchronous copies
NATIVE_FP8 = (8, 9)  # float8 on tensor cores
HOPPER = 9  # major capability of the GPUs whose warps multiply in groups of four
ALIGNMENT = 16  # bytes of the widest load
SHARED_BYTES = {(8, 0): 163 << 10, (8, 7): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10, (10, 3): 227 << 10}
LEAST_SHARED_BYTES = 99 << 10  # of a block on all others since 8.0
WORKSPACE = 4096  # bytes of it for what warps tell each other

top_k = reference.top_k


def act_quant(x: Tensor, *, power_of_two_scale: bool, block: int = FP8_BLOCK) -> Quantized:
    """As the reference, bit for bit, for numbers that are finite.

    Covers bfloat16, float16 and float32 in blocks of 32, 64, 128 or 256.
    """
    if not (runs_here(x) and covers_act_quant(x, block)):
        return reference.act_quant(x, power_of_two_scale=power_of_two_scale, block=block)
    values = torch.empty(x.shape, dtype=FP8, device=x.device)
    scale = x.new_empty((*x.shape[:-1], x.shape[-1] // block), dtype=torch.float32)
    sizes = (_name(x.dtype), block, power_of_two_scale)
    _launch("act_quant", sizes, _packed(x).view(-1, block), values.view(-1, block), scale.view(-1))
    return Quantized(values, scale)


def covers_act_quant(x: Tensor, block: int) -> bool:
    """Whether ``act_quant`` has a program for ``x``."""
    whole = x.numel() > 0 and x.shape[-1] % block == 0
    return whole and block in (32, 64, 128, 256) and x.dtype in (*HALF, torch.float32)


def fp8_gemm(x: Quantized, weight: Quantized) -> Tensor:
    """As the reference; blocks of 128 are multiplied as float8 where the GPU can, and added up in float32.

    Covers ``x`` of two dimensions in blocks of 128, and weights of any height. Tensor cores for float8 keep about 13
    bits of a sum within a block; older GPUs multiply as float16, which is exact.
    """
    if not (runs_here(x.values) and covers_fp8_gemm(x, weight)):
        return reference.fp8_gemm(x, weight)
    tokens, k = x.values.shape
    n = len(weight.values)
    out = x.scale.new_empty(tokens, n)
    blocks = (16, 32) if tokens <= 16 else (64, 64) if tokens <= 64 else (128, 128)
    sizes = (n, k, *blocks, capability(x.values.device) >= NATIVE_FP8)
    _launch("fp8_gemm", sizes, *map(_packed, (x.values, x.scale, weight.values, weight.scale)), out)
    return out


def covers_fp8_gemm(x: Quantized, weight: Quantized) -> bool:
    """Whether ``fp8_gemm`` has a program for these operands."""
    if x.values.dim() != 2 or x.values.numel() == 0 or weight.values.numel() == 0:
        return False
    (tokens, k), n = x.values.shape, len(weight.values)
    scales = x.scale.shape == (tokens, k // FP8_BLOCK) and weight.scale.shape == (-(-n // FP8_BLOCK), k // FP8_BLOCK)
    dtypes = [t.dtype for t in (*x, *weight)] == [FP8, torch.float32] * 2
    return k % FP8_BLOCK == 0 and scales and dtypes


def index_scores(q: Tensor, weights: Tensor, keys: Tensor, key_scale: Tensor | None, out: Tensor) -> None:
    """As the reference, accumulated in float32; rows of ``out`` may lie apart.

    Covers queries and keys of one dtype, float8, bfloat16 or float16, and of a dimension that is a multiple of 32 up
    to 256, with any number of heads.
    """
    if not (runs_here(q) and covers_index_scores(q, weights, keys, key_scale, out)):
        reference.index_scores(q, weights, keys, key_scale, out)
        return
    wide = q.half() if q.dtype == FP8 else q  # exact; the program does it to the keys
    sizes = (*q.shape[1:], _name(wide.dtype), _name(keys.dtype), key_scale is not None)
    scale = weights.new_empty(1) if key_scale is None else key_scale
    _launch("index_scores", sizes, *map(_packed, (wide, weights, keys, scale)), out)


def covers_index_scores(q: Tensor, weights: Tensor, keys: Tensor, key_scale: Tensor | None, out: Tensor) -> bool:
    """Whether ``index_scores`` has a program for these operands."""
    scales = torch.float32 if key_scale is None else key_scale.dtype
    return (
        q.dtype == keys.dtype
        and q.dtype in (FP8, *HALF)
        and weights.dtype == scales == out.dtype == torch.float32
        and q.shape[-1] % 32 == 0
        and q.shape[-1] <= 256
        and out.numel() > 0
        and (out.stride(1) == 1 or out.shape[1] == 1)
    )


def sparse_attention(q: Tensor, rows: Tensor, counts: Tensor, scale: float, value_dim: int) -> Tensor:
    """As the reference, but logits stay in float32 where that rounds them to the dtype of the rows.

    Covers bfloat16 and float16 with ``R`` a multiple of 32 and ``value_dim`` a multiple of 64 up to 512, as far as a
    block of heads and one of rows fit the shared memory, with any number of heads and of rows.
    """
    blocks = None
    if runs_here(q) and covers_sparse_attention(q, rows, value_dim):
        blocks = attention_blocks(q.shape[1], q.shape[2], capability(q.device))
    if blocks is None:
        return reference.sparse_attention(q, rows, counts, scale, value_dim)
    (tokens, heads, dim), (head_block, block, _) = q.shape, blocks
    programs = tokens * -(-heads // head_block)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    parts = attention_parts(programs, rows.shape[1] // block, processors)
    out = q.new_empty(parts, tokens, heads, value_dim, dtype=torch.float32)
    log_weight = q.new_empty(parts, tokens, heads, dtype=torch.float32)
    sizes = (heads, dim, value_dim, scale, *blocks, _name(q.dtype))
    _launch("sparse_attention", sizes, *map(_packed, (q, rows, counts.int())), out, log_weight)
    return merged(out, log_weight).to(rows.dtype)


def covers_sparse_attention(q: Tensor, rows: Tensor, value_dim: int) -> bool:
    """Whether ``sparse_attention`` has a program for these operands."""
    dims = q.shape[2] % 32 == 0 and value_dim % 64 == 0 and 0 < value_dim <= min(512, q.shape[2])
    return q.dtype == rows.dtype and q.dtype in HALF and q.numel() > 0 and rows.numel() > 0 and dims


def attention_blocks(heads: int, dim: int, capability: tuple[int, int]) -> tuple[int, int, int] | None:
    """Heads and rows of a block and blocks of rows under way that fit a GPU's shared memory; None where none do.

    More heads read a row less often, more blocks under way hide the memory's latency.
    """
    shared = SHARED_BYTES.get(capability, LEAST_SHARED_BYTES) - WORKSPACE
    most = 64 if capability[0] == HOPPER else 32  # at 64 a block's sum fills the registers of two groups of warps
    head_block = min(most, 16 << (-(-heads // 16) - 1).bit_length())
    while head_block >= 16:
        for block, stages in ((64, 2), (32, 2), (32, 1)):
            if 2 * (head_block * dim + stages * block * dim + head_block * block) <= shared:
                return head_block, block, stages
        head_block //= 2
    return None


def attention_parts(programs: int, blocks: int, processors: int) -> int:
    """Parts that each query's ``blocks`` of rows are cut into: few ``programs`` shall keep all ``processors`` busy."""
    return max(1, min(processors // programs, blocks // 2))


def merged(parts: Tensor, log_weight: Tensor) -> Tensor:
    """Softmax averages ``[t, H, V]`` over all rows of those over parts ``[P, t, H, V]``.

    ``log_weight`` ``[P, t, H]`` is the logarithm of each part's sum of exponentials; -inf says that it has no rows.
    """
    if len(parts) == 1:
        return parts[0]
    share = log_weight.softmax(0).unsqueeze(-1)  # [P, t, H, 1]
    return (share * parts.masked_fill(share == 0, 0.0)).sum(0)


def hadamard(x: Tensor) -> Tensor:
    """As the reference, by ``fast_hadamard_transform`` on CUDA where that package is installed.

    Covers dimensions that are powers of two up to 32768.
    """
    n = x.shape[-1]
    transform = _fast_hadamard() if x.is_cuda and n & (n - 1) == 0 and n <= 1 << 15 and x.numel() else None
    return reference.hadamard(x) if transform is None else transform(x, n**-0.5)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device of NVIDIA, of any other device (0, 0)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


def runs_here(x: Tensor) -> bool:
    """Whether programs run on the device of ``x``."""
    return capability(x.device) >= OLDEST


@functools.cache
def _fast_hadamard() -> Callable[[Tensor, float], Tensor] | None:
    try:
        from fast_hadamard_transform import hadamard_transform
    except ModuleNotFoundError:
        return None
    return lambda x, scale: hadamard_transform(x, scale=scale)


@functools.cache
def _kernel(name: str, sizes: tuple[object, ...], _capability: tuple[int, int]) -> Callable[..., None]:
    """The program ``name`` of ``dsakv.kernels.tile_programs``, compiled for the current device."""
    from dsakv.kernels import tile_programs

    logging.getLogger("tilelang").setLevel(logging.WARNING)  # two lines for every program otherwise
    kernel: Callable[..., None] = tile_programs.compiled(getattr(tile_programs, name)(*sizes))
    return kernel


def _launch(name: str, sizes: tuple[object, ...], *tensors: Tensor) -> None:
    device = tensors[0].device
    with torch.cuda.device(device):
        _kernel(name, sizes, capability(device))(*tensors)


def _packed(x: Tensor) -> Tensor:
    """``x`` with the strides and the alignment that programs count on, which views need not have."""
    x = x.contiguous()
    if x.data_ptr() % ALIGNMENT:
        x = x.clone()
    return x.view(-1).view(x.shape)  # a dimension of 1 may have any stride


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
