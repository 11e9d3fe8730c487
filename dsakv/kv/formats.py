"""How the cache keeps a KV row: as it is, or with its latent in float8, packed as serving engines do."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dsakv.kernels import reference
from dsakv.kernels.contract import FP8_BLOCK, Quantized
from dsakv.models.contracts import Fp8Kv


class RowFormat(Protocol):
    """Rows ``[..., R]`` in a model's dtype to ``width`` numbers of ``dtype`` each, and back."""

    width: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int: ...

    def encode(self, rows: Tensor) -> Tensor:
        """``[T, R]`` to ``[T, width]``."""
        ...

    def decode(self, stored: Tensor) -> Tensor:
        """``[..., width]`` to ``[..., R]``: what ``encode`` kept of the rows."""
        ...


class PlainRows:
    """Rows as they are."""

    def __init__(self, dim: int, dtype: torch.dtype) -> None:
        self.width, self.dtype = dim, dtype

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def encode(self, rows: Tensor) -> Tensor:
        return rows

    def decode(self, stored: Tensor) -> Tensor:
        return stored


class PackedRows:
    """The latent in float8, a float32 scale for each 128 of its numbers, and the rest (turned by RoPE) as it is.

    656 bytes for a latent of 512 and 64 others in bfloat16. A latent of fewer than 128 numbers has one scale. Raises
    ValueError where a part does not fill words of 4 bytes: a gather copies those several times as fast as bytes.
    """

    dtype = torch.int32

    def __init__(self, dim: int, dtype: torch.dtype, fp8: Fp8Kv) -> None:
        self.fp8, self.rest_dtype = fp8, dtype
        self.block = min(FP8_BLOCK, fp8.latent)
        rest_bytes = (dim - fp8.latent) * dtype.itemsize
        if fp8.latent % 4 or fp8.latent % self.block or rest_bytes % 4:
            raise ValueError(f"rows of {fp8.latent} float8 numbers and {rest_bytes} other bytes cannot be packed")
        self.latent_words = fp8.latent // 4
        self.head_words = self.latent_words + fp8.latent // self.block
        self.width = self.head_words + rest_bytes // 4

    @property
    def row_bytes(self) -> int:
        return self.width * 4

    def encode(self, rows: Tensor) -> Tensor:
        latent, rest = rows[:, : self.fp8.latent], rows[:, self.fp8.latent :]
        values, scale = self.fp8.quantize(latent, self.block)
        parts = (values, scale, rest)
        return torch.cat([part.contiguous().view(torch.int32) for part in parts], dim=-1)

    def decode(self, stored: Tensor) -> Tensor:
        values = stored[..., : self.latent_words].view(torch.float8_e4m3fn)
        scale = stored[..., self.latent_words : self.head_words].view(torch.float32)
        rest = stored[..., self.head_words :].view(self.rest_dtype)
        return torch.cat((reference.dequantize(Quantized(values, scale)).to(rest.dtype), rest), dim=-1)


def row_format(dim: int, dtype: torch.dtype, fp8: Fp8Kv | None) -> RowFormat:
    """The format for rows of ``dim`` numbers of a model that computes in ``dtype`` and says ``fp8`` of its cache."""
    return PackedRows(dim, dtype, fp8) if fp8 and fp8.latent else PlainRows(dim, dtype)
