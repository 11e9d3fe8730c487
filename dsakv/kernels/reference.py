"""The kernels of sparse attention in plain PyTorch: the specification that every other one must match.

Working memory is bounded by ``tile_elements`` whatever the context's length; callers bound the score matrix by
``score_rows``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dsakv.kernels.contract import FP8_BLOCK, Quantized

FP8_MAX = 448.0  # largest finite float8_e4m3fn


def tile_elements(device: torch.device) -> int:
    """Elements of an intermediate: what a core's cache holds on CPU, enough to fill the device elsewhere."""
    return 1 << (20 if device.type == "cpu" else 26)


def score_rows(n_keys: int, device: torch.device) -> int:
    """Queries whose scores for ``n_keys`` keys are held at a time: at most 64 MB on CPU and 1 GB elsewhere, or one row.

    A power of two, so that GEMMs divide a chunk's usual 512 queries, and round, as they would without tiles.
    """
    budget = 1 << (24 if device.type == "cpu" else 28)
    return 1 << max(0, (budget // n_keys).bit_length() - 1)


@functools.cache
def _float8_numbers() -> Tensor:
    """The number that each byte stands for, ``[256]`` float32."""
    with torch.inference_mode(False):
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def widen(x: Tensor) -> Tensor:
    """``x`` in float32, of whatever float type."""
    if x.dtype == torch.float8_e4m3fn and x.device.type == "cpu":  # five times as fast as PyTorch's own conversion
        return _float8_numbers().index_select(0, x.view(torch.uint8).flatten().int()).view(x.shape)
    return x.float()


def index_scores(q: Tensor, weights: Tensor, keys: Tensor, key_scale: Tensor | None, out: Tensor) -> None:
    """Score every key for every query: ``out[t, s] = key_scale[s] * sum_h weights[t, h] * relu(q[t, h] . keys[s])``.

    The lightning indexer's score (DeepSeek-V3.2-Exp report, equation 1), always accumulated in float32, since
    rounded scores tie at the top-k boundary. ``q`` ``[T, H, D]``, ``weights`` ``[T, H]`` float32, ``keys``
    ``[S, D]``, ``key_scale`` ``[S]`` float32 or None for 1, ``out`` ``[T, S]`` float32. Queries and keys may be
    float8; scales are positive, so those of the queries belong into the weights.
    """
    n_queries, n_heads, dim = q.shape
    flat = widen(q).reshape(n_queries * n_heads, dim)
    gate = weights.unsqueeze(1)  # [T, 1, H]
    step = max(64, tile_elements(q.device) // (n_queries * n_heads))
    for start in range(0, len(keys), step):
        tile = widen(keys[start : start + step])  # [s, D]
        part = out[:, start : start + step]
        if n_queries == 1:  # keys first: the tall operand stays in place, and no head needs a pass of its own
            torch.mv((tile @ flat.T).relu_(), weights[0], out=part[0])
        else:
            dots = (flat @ tile.T).relu_().view(n_queries, n_heads, len(tile))  # [T, H, s]
            part.copy_(torch.bmm(gate, dots).squeeze(1))
        if key_scale is not None:
            part.mul_(key_scale[start : start + step])


def top_k(scores: Tensor, k: int) -> Tensor:
    """Positions of the ``k`` highest scores of each row, ascending; of equal scores the lower positions win.

    ``scores`` ``[T, S]`` float32 with ``-inf`` where a key may not be seen, ``k <= S``. Returns ``[T, k]`` int64.
    A row with fewer than ``k`` visible keys has them first, then invisible ones.
    """
    n_rows, n_keys = scores.shape
    if k == n_keys:
        return torch.arange(n_keys, device=scores.device).expand(n_rows, n_keys)
    # One more than wanted: its lowest is the best that stays out, and equal to the next only in a tie.
    values, index = scores.topk(k + 1, dim=-1, sorted=False)  # [T, k + 1]
    lowest, column = values.topk(2, dim=-1, largest=False, sorted=True)  # [T, 2]
    index.scatter_(1, column[:, :1], n_keys)
    positions = index.sort(dim=-1).values[:, :k]
    tied = (lowest[:, 0] == lowest[:, 1]) & (lowest[:, 0] > -math.inf)
    if tied.any():
        for rows in tied.nonzero().squeeze(1).split(max(1, tile_elements(scores.device) // n_keys)):
            positions[rows] = _top_k_tied(scores[rows], lowest[rows, :1], k)
    return positions


def _top_k_tied(scores: Tensor, boundary: Tensor, k: int) -> Tensor:
    """Rows whose k-th and next score both equal ``boundary`` ``[t, 1]``: fill up with its lowest positions."""
    above = (scores > boundary) | scores.isnan()  # [t, S]; topk too puts NaN first
    equal = scores == boundary
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= room))
    positions: Tensor = chosen.nonzero()[:, 1].view(len(scores), k)
    return positions


def sparse_attention(q: Tensor, rows: Tensor, counts: Tensor, scale: float, value_dim: int) -> Tensor:
    """Multi-query attention of each query over its own gathered rows.

    ``q`` ``[t, H, R]``, ``rows`` ``[t, K, R]`` whose first ``value_dim`` columns are the values too (the latent of
    MLA with absorbed projections), ``counts`` ``[t]`` valid rows of each query. Returns ``[t, H, value_dim]``.
    """
    logits = torch.bmm(q, rows.transpose(1, 2)).float() * scale  # [t, H, K]
    columns = torch.arange(rows.shape[1], device=rows.device)
    logits.masked_fill_((columns >= counts.unsqueeze(1)).unsqueeze(1), -math.inf)
    return torch.bmm(logits.softmax(-1).to(rows.dtype), rows[..., :value_dim])


def grouped_attention(q: Tensor, keys: Tensor, values: Tensor, counts: Tensor, scale: float) -> Tensor:
    """Grouped-query attention of each query over its own gathered keys and values.

    ``q`` ``[t, H, d]``, ``keys`` and ``values`` ``[t, K, G, d]``, each of whose ``G`` heads serves ``H / G`` heads of
    the query in turn, ``counts`` ``[t]`` valid rows of each query. Returns ``[t, H, d]``.
    """
    groups = keys.shape[2]
    hidden = (torch.arange(keys.shape[1], device=q.device) >= counts.unsqueeze(1)).unsqueeze(1)  # [t, 1, K]
    mixed = []
    for g, heads in enumerate(q.chunk(groups, dim=1)):  # views: one batch over queries and groups would be a copy
        logits = torch.bmm(heads, keys[:, :, g].transpose(1, 2)).float() * scale  # [t, H / G, K]
        share = logits.masked_fill_(hidden, -math.inf).softmax(-1).to(values.dtype)
        mixed.append(torch.bmm(share, values[:, :, g]))
    return torch.cat(mixed, dim=1)


def attention_shares(q: Tensor, keys: Tensor, scale: float, hide: Callable[[Tensor], object], out: Tensor) -> None:
    """The share of its attention that each query gives each key, summed over heads, to ``out`` ``[t, S]`` float32.

    ``q`` ``[t, H, d]``, ``keys`` ``[S, G, d]`` as for :func:`grouped_attention`; ``hide`` puts ``-inf`` into logits
    ``[t, S]`` where a query may not look.
    """
    groups = keys.shape[1]
    out.zero_()
    for h in range(q.shape[1]):  # one head's logits at a time are as large as the result
        logits = (q[:, h].float() @ keys[:, h * groups // q.shape[1]].float().T) * scale  # rounded, many would tie
        hide(logits)
        out += logits.softmax(-1)


def hadamard(x: Tensor) -> Tensor:
    """Multiply the last dimension, a power of two ``n``, by the Hadamard matrix over ``sqrt(n)`` (orthogonal)."""
    n = x.shape[-1]
    if n & (n - 1):
        raise ValueError(f"Hadamard rotation needs a power of two, not {n}")
    y = x.reshape(-1, n)
    half = 1
    while half < n:
        pairs = y.view(-1, n // (2 * half), 2, half)
        y = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2).view(-1, n)
        half *= 2
    return y.mul(n**-0.5).view(x.shape)


def act_quant(x: Tensor, *, power_of_two_scale: bool, block: int = FP8_BLOCK) -> Quantized:
    """Quantize ``x`` ``[..., n]`` to float8 e4m3 with one scale for each ``block`` of the last dimension.

    ``scale = max(amax, 1e-4) / 448``, rounded up to a power of two for the format ``ue8m0``, as DeepSeek-V3.2's
    activation quantization does. Raises ValueError where ``n`` is no multiple of ``block``.
    """
    if x.shape[-1] % block:
        raise ValueError(f"last dimension {x.shape[-1]} is no multiple of the block {block}")
    blocks = x.float().reshape(*x.shape[:-1], -1, block)
    # CUDA multiplies by the reciprocal of a number, which rounds twice; it divides by a tensor.
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-4) / blocks.new_full((), FP8_MAX)
    if power_of_two_scale:
        mantissa, exponent = torch.frexp(scale)  # exact, where the logarithm would round
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    values = (blocks / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(x.shape)
    return Quantized(values, scale.squeeze(-1))


def dequantize(x: Quantized) -> Tensor:
    """The float32 numbers ``[..., n]`` that ``act_quant`` made ``x`` of, as far as it kept them."""
    blocks = widen(x.values).view(*x.scale.shape, -1)
    return (blocks * x.scale.unsqueeze(-1)).view(x.values.shape)


def dequantize_into(out: Tensor, values: Tensor, scale: Tensor, start: tuple[int, ...]) -> None:
    """Write ``value * scale``, computed in float32, to ``out`` ``[n, k]`` of any floating dtype.

    ``values`` ``[n, k]`` float8 e4m3 is the part from row and column ``start`` on of a weight whose squares of 128
    have the scales ``scale`` (float32), so that it may begin within a square. One row of squares at a time: that is
    all the room it takes.
    """
    n, k = values.shape
    squares = torch.arange(start[1], start[1] + k, device=scale.device) // FP8_BLOCK
    first = start[0] // FP8_BLOCK
    wide = scale[first : (start[0] + n - 1) // FP8_BLOCK + 1].index_select(1, squares)  # [rows of squares, k]
    for i, factors in enumerate(wide):
        begin = max((first + i) * FP8_BLOCK - start[0], 0)
        rows = slice(begin, min((first + i + 1) * FP8_BLOCK - start[0], n))
        out[rows] = widen(values[rows]).mul_(factors)


def fp8_gemm(x: Quantized, weight: Quantized) -> Tensor:
    """``x @ weight.T`` in float32 ``[T, n]`` of ``x`` ``[T, k]`` and a block-scaled weight ``[n, k]``.

    Accumulated in float32: products of float8 numbers are exact there, and scales multiply whole blocks of 128.
    """
    wide = dequantize(x)
    n = len(weight.values)
    step = max(FP8_BLOCK, tile_elements(wide.device) // wide.shape[1] // FP8_BLOCK * FP8_BLOCK)
    parts = []
    for start in range(0, n, step):  # a whole weight in float32 would be four times itself
        values = weight.values[start : start + step]
        part = torch.empty(values.shape, device=wide.device)
        dequantize_into(part, values, weight.scale, (start, 0))
        parts.append(wide @ part.T)
    return torch.cat(parts, dim=1)
