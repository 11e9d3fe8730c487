"""Block-scaled float8 weights back into wider numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from dsakv.kernels.contract import FP8_BLOCK
from dsakv.kernels.reference import widen


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
