"""Building blocks that model families share. Parameters are declared on ``meta`` and filled by ``dsakv.weights``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsakv.models.contracts import Turn
from dsakv.models.options import ModelOptions
from dsakv.models.projections import projection
from dsakv.models.rope_scaling import Llama3Scaling, Yarn


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension."""

    def __init__(self, dim: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, device="meta", dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Plain operations: torch's own rms_norm takes several times as long for the few rows of a decode step.
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class RotaryEmbedding:
    """Cosine and sine of rotary position embedding over ``dim`` dimensions, for longer contexts where so scaled."""

    def __init__(self, dim: int, theta: float, scaling: Yarn | Llama3Scaling | None, device: torch.device) -> None:
        frequency = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))  # [dim / 2]
        self.scale = 1.0
        if isinstance(scaling, Yarn):
            frequency = _yarn_frequencies(frequency, dim, theta, scaling)
            self.scale = scaling.rope_scale
        elif scaling is not None:
            frequency = _llama3_frequencies(frequency, scaling)
        self.frequency = frequency.to(device)

    def __call__(self, positions: Tensor) -> Turn:
        """``positions`` ``[T]`` to cosine and sine ``[T, dim / 2]`` float32."""
        angles = positions.float().unsqueeze(1) * self.frequency
        return angles.cos() * self.scale, angles.sin() * self.scale


def _yarn_frequencies(frequency: Tensor, dim: int, theta: float, yarn: Yarn) -> Tensor:
    """Keep the fast dimensions, interpolate the slow ones by ``factor``, blend linearly between (section 3.2)."""

    def dimension_of(rotations: float) -> float:
        return dim * math.log(yarn.original_max_seq_len / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension_of(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension_of(yarn.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0, 1)
    return frequency / yarn.factor * interpolated + frequency * (1 - interpolated)


def _llama3_frequencies(frequency: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Keep what turns often within the original context, slow down what turns rarely, blend linearly between."""
    turns = frequency * scaling.original_max_seq_len / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return frequency * kept + frequency / scaling.factor * (1 - kept)


def rotate_pairs(x: Tensor, rope: Turn) -> Tensor:
    """Rotate adjacent dimensions ``(0, 1), (2, 3), ...`` (interleaved layout). ``x`` ``[T, ..., dim]``."""
    cos, sin = _per_head(x, rope)
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


def rotate_halves(x: Tensor, rope: Turn) -> Tensor:
    """Rotate dimension ``i`` with ``i + dim / 2`` (half-split layout). ``x`` ``[T, ..., dim]``."""
    cos, sin = _per_head(x, rope)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _per_head(x: Tensor, rope: Turn) -> Turn:
    """Cosine and sine ``[T, dim / 2]`` with the head dimension that ``x`` may have."""
    cos, sin = rope
    return (cos.unsqueeze(1), sin.unsqueeze(1)) if x.dim() == 3 else (cos, sin)


class Embedding(nn.Module):
    """Token embedding; each rank holds an equal range of the vocabulary."""

    def __init__(self, vocab_size: int, dim: int, options: ModelOptions) -> None:
        super().__init__()
        self.world = options.world
        self.n_local = vocab_size // self.world.size
        self.weight = nn.Parameter(torch.empty(self.n_local, dim, device="meta", dtype=options.dtype))

    def forward(self, token_ids: Tensor) -> Tensor:
        """``[T]`` to ``[T, dim]``."""
        if self.world.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.world.rank * self.n_local
        elsewhere = (local < 0) | (local >= self.n_local)
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.world.all_reduce(rows.masked_fill_(elsewhere.unsqueeze(1), 0))


class GatedMLP(nn.Module):
    """SwiGLU feed-forward: ``w2(silu(w1 x) * w3 x)`` of so many inner dimensions as this rank has."""

    def __init__(self, dim: int, inter_dim: int, options: ModelOptions) -> None:
        super().__init__()
        self.w1 = projection(dim, inter_dim, options)
        self.w2 = projection(inter_dim, dim, options)
        self.w3 = projection(dim, inter_dim, options)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out
