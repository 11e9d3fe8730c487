"""The lightning indexer: a small attention of its own that ranks the cached tokens for each query."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsakv.models.contracts import LayerCache, Selection, Turn
from dsakv.models.layers import rotate_halves, rotate_pairs
from dsakv.models.options import ModelOptions
from dsakv.models.projections import linear, projection
from dsakv.models.selection import select_best


@dataclass(frozen=True)
class IndexerShape:
    """Dimensions of an indexer within a model."""

    dim: int
    """Of the hidden states that keys and head weights are made of."""
    query_dim: int
    """Of what queries are made of."""
    n_heads: int
    head_dim: int
    rope_dim: int
    """Leading dimensions of a head that turn with the position."""
    top_k: int
    interleaved: bool = False
    """Whether neighbouring dimensions turn together, instead of those half of ``rope_dim`` apart."""


class Indexer(nn.Module):
    """Scores ``sum_h weights[t, h] * relu(q[t, h] . k[s])`` (DeepSeek-V3.2-Exp report, equation 1)."""

    def __init__(self, shape: IndexerShape, options: ModelOptions) -> None:
        super().__init__()
        self.shape, self.kernels, self.world = shape, options.kernels, options.world
        self.fp8, self.ue8m0 = options.index_fp8, options.ue8m0
        self.rotate = rotate_pairs if shape.interleaved else rotate_halves
        self.wq_b = projection(shape.query_dim, shape.n_heads * shape.head_dim, options)
        self.wk = projection(shape.dim, shape.head_dim, options)
        self.k_norm = nn.LayerNorm(shape.head_dim, eps=1e-6, device="meta", dtype=torch.float32)
        self.weights_proj = linear(shape.dim, shape.n_heads, torch.float32)

    def key(self, x: Tensor, rope: Turn) -> Tensor:
        """Index keys ``[T, D]`` of hidden states ``[T, dim]``, not yet rounded to float8: the cache does that."""
        return self._turn(self.k_norm(self.wk(x).float()), rope).to(x.dtype)

    def query(self, x: Tensor, source: Tensor, rope: Turn) -> tuple[Tensor, Tensor]:
        """Index queries ``[T, H, D]`` made of ``source`` ``[T, query_dim]``, and head weights ``[T, H]`` of ``x``."""
        shape = self.shape
        q = self._turn(self.wq_b(source).view(len(x), shape.n_heads, shape.head_dim), rope)
        return q, self.weights_proj(x.float()) * (shape.n_heads**-0.5 * shape.head_dim**-0.5)

    def forward(self, x: Tensor, source: Tensor, rope: Turn, positions: Tensor, kv: LayerCache) -> Selection:
        """Select for each of the ``T`` queries among the keys up to its own position."""
        q, weights = self.query(x, source, rope)
        if self.fp8:
            q, scale = self.kernels.act_quant(q, power_of_two_scale=self.ue8m0, block=self.shape.head_dim)
            weights = weights * scale.squeeze(-1)

        def score(segment: int, rows: slice, out: Tensor) -> None:
            keys = kv.index_keys(segment)
            self.kernels.index_scores(q[rows], weights[rows], keys.values, keys.scale, out)

        return select_best(score, positions, kv, self.shape.top_k, self.kernels, self.world)

    def _turn(self, x: Tensor, rope: Turn) -> Tensor:
        """Positions into ``x`` ``[T, ..., D]``, and the Hadamard rotation, which spreads what fp8 would round away."""
        rotated, rest = x.split([self.shape.rope_dim, self.shape.head_dim - self.shape.rope_dim], dim=-1)
        x = torch.cat((self.rotate(rotated, rope), rest), dim=-1)
        # It keeps dot products, so that without rounding it would change nothing.
        return self.kernels.hadamard(x.float()).to(x.dtype) if self.fp8 else x
