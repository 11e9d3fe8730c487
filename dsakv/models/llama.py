"""Llama: grouped-query attention over all tokens, or over those that are selected as a DSA model selects them.

The KV cache holds, for each token and layer, the rotated keys of all KV heads and behind them the values
(``2 * n_kv_heads * head_dim`` numbers), and the indexer's key where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsakv.kernels import reference
from dsakv.models.contracts import Fp8Kv, LayerCache, LayerOutput, Rope, Selection, Turn
from dsakv.models.indexer import Indexer, IndexerShape
from dsakv.models.layers import Embedding, GatedMLP, RMSNorm, RotaryEmbedding, rotate_halves
from dsakv.models.llama_shape import LlamaShape
from dsakv.models.options import ModelOptions
from dsakv.models.projections import linear
from dsakv.models.selection import hide_later, select_best, select_recent


@dataclass(frozen=True)
class Learned:
    """Tokens are selected by lightning indexers."""

    shape: IndexerShape
    rope_theta: float
    """Base of their RoPE frequencies."""

    @property
    def top_k(self) -> int:
        return self.shape.top_k


@dataclass(frozen=True)
class Oracle:
    """Tokens with the largest share of the attention itself, summed over heads: it costs more than reading all."""

    top_k: int


@dataclass(frozen=True)
class Recent:
    """A sliding window, and the first tokens."""

    top_k: int


Selecting = Learned | Oracle | Recent
"""How each query's tokens are selected."""


class Attention(nn.Module):
    """Grouped-query attention, over a selection where ``selecting`` says how it is made."""

    def __init__(self, shape: LlamaShape, options: ModelOptions, selecting: Selecting | None) -> None:
        super().__init__()
        self.shape, self.kernels, self.world, self.selecting = shape, options.kernels, options.world, selecting
        self.scale = shape.head_dim**-0.5
        kv_dim = shape.n_kv_heads * shape.head_dim
        self.wq = linear(shape.dim, shape.n_heads * shape.head_dim, options.dtype)
        self.wk = linear(shape.dim, kv_dim, options.dtype)
        self.wv = linear(shape.dim, kv_dim, options.dtype)
        self.wo = linear(shape.n_heads * shape.head_dim, shape.dim, options.dtype)
        self.indexer = Indexer(selecting.shape, options) if isinstance(selecting, Learned) else None

    def qkv(self, x: Tensor, rope: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[T, H, d]``, keys and values ``[T, G, d]``, rotated, of normed hidden states ``[T, dim]``."""
        d = self.shape.head_dim
        q, k = self.wq(x).view(len(x), -1, d), self.wk(x).view(len(x), -1, d)
        return rotate_halves(q, rope), rotate_halves(k, rope), self.wv(x).view(len(x), -1, d)

    def forward(self, x: Tensor, rope: Rope, positions: Tensor, kv: LayerCache) -> tuple[Tensor, Selection | None]:
        """What the heads read ``[T, H * d]``, with the selection."""
        q, k, v = self.qkv(x, rope.attention)
        kv.append(torch.cat((k, v), dim=1).flatten(1), self.indexer.key(x, rope.indexer) if self.indexer else None)
        if self.selecting is None:
            kv.fetch(None)
            return self._read_all(q, kv), None
        selection = self._select(self.selecting, x, q, rope, positions, kv)
        kv.fetch(selection)
        mixed = []
        step = max(1, reference.tile_elements(x.device) // (selection.positions.shape[1] * 2 * k[0].numel()))
        for start in range(0, len(x), step):
            rows = slice(start, min(start + step, len(x)))
            keys, values = self._heads(kv.gather(rows))  # [t, K, G, d]
            mixed.append(reference.grouped_attention(q[rows], keys, values, selection.counts[rows], self.scale))
        return torch.cat(mixed).flatten(1), selection

    def _heads(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[..., G, d]`` of cache rows ``[..., R]``."""
        heads = rows.view(*rows.shape[:-1], 2, self.shape.n_kv_heads, self.shape.head_dim)
        return heads[..., 0, :, :], heads[..., 1, :, :]

    def _read_all(self, q: Tensor, kv: LayerCache) -> Tensor:
        """Attention of each query to all keys up to its own."""
        mixed, share = [], self.shape.n_heads // self.shape.n_kv_heads
        for i, segment in enumerate(kv.segments):
            keys, values = (part.transpose(0, 1) for part in self._heads(kv.sequence(i)))  # [G, S, d]
            own = q[segment.rows]  # [t, H, d]
            if len(own) == 1:  # the heads of a group are queries of one head: nothing is masked, nothing is copied
                out = F.scaled_dot_product_attention(own.unflatten(1, (-1, share))[0], keys, values, scale=self.scale)
                mixed.append(out.flatten(0, 1)[None])  # [1, H, d]
                continue
            # Fused kernels for masks know no groups.
            keys, values = (part.repeat_interleave(share, dim=0)[None] for part in (keys, values))  # [1, H, S, d]
            step = reference.score_rows(segment.seq_len, q.device)
            for start in range(0, len(own), step):
                tile = own[start : start + step].transpose(0, 1)[None]  # [1, H, t, d]
                rows = slice(segment.rows.start + start, segment.rows.start + start + tile.shape[2])
                mask = torch.zeros(tile.shape[2], segment.seq_len, dtype=q.dtype, device=q.device)
                hide_later(mask, segment, rows)
                out = F.scaled_dot_product_attention(tile, keys, values, attn_mask=mask, scale=self.scale)
                mixed.append(out[0].transpose(0, 1))  # [t, H, d]
        return torch.cat(mixed).flatten(1)

    def _select(
        self, selecting: Selecting, x: Tensor, q: Tensor, rope: Rope, positions: Tensor, kv: LayerCache
    ) -> Selection:
        if isinstance(selecting, Recent):
            return select_recent(positions, kv, selecting.top_k)
        if isinstance(selecting, Learned):
            assert self.indexer is not None
            selection: Selection = self.indexer(x, x, rope.indexer, positions, kv)
            return selection

        def score(i: int, rows: slice, out: Tensor) -> None:
            keys, _ = self._heads(kv.sequence(i))  # [S, G, d]
            hide = partial(hide_later, segment=kv.segments[i], rows=rows)
            reference.attention_shares(q[rows], keys, self.scale, hide, out)

        return select_best(score, positions, kv, selecting.top_k, self.kernels, self.world)


class DecoderLayer(nn.Module):
    """Attention and feed-forward with pre-normalisation and residuals."""

    def __init__(self, shape: LlamaShape, options: ModelOptions, selecting: Selecting | None) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(shape.dim, shape.norm_eps, options.dtype)
        self.attn = Attention(shape, options, selecting)
        self.ffn_norm = RMSNorm(shape.dim, shape.norm_eps, options.dtype)
        self.ffn = GatedMLP(shape.dim, shape.inter_dim, options)

    def forward(
        self, hidden: Tensor, rope: Rope, positions: Tensor, kv: LayerCache, previous: Selection | None = None
    ) -> LayerOutput:
        """Both halves, one after the other."""
        hidden, selection = self.attend(hidden, rope, positions, kv, previous)
        return LayerOutput(self.feed([hidden])[0], selection)

    def attend(
        self, hidden: Tensor, rope: Rope, positions: Tensor, kv: LayerCache, previous: Selection | None = None
    ) -> LayerOutput:
        mixed, selection = self.attn(self.attn_norm(hidden), rope, positions, kv)
        return LayerOutput(hidden + self.attn.wo(mixed), selection)

    def feed(self, chunks: list[Tensor]) -> list[Tensor]:
        return [hidden + self.ffn(self.ffn_norm(hidden)) for hidden in chunks]


class Llama(nn.Module):
    """The decoder; see ``models.contracts.Model``. Dense unless ``selecting`` says how to select."""

    def __init__(self, shape: LlamaShape, options: ModelOptions, selecting: Selecting | None = None) -> None:
        super().__init__()
        self.shape, self.dtype, self.device = shape, options.dtype, options.device
        self.embed = Embedding(shape.vocab_size, shape.dim, options)
        self.layers = nn.ModuleList(DecoderLayer(shape, options, selecting) for _ in range(shape.n_layers))
        self.norm = RMSNorm(shape.dim, shape.norm_eps, options.dtype)
        self.head = None if shape.tied else linear(shape.dim, shape.vocab_size, options.dtype)
        self.turn = RotaryEmbedding(shape.head_dim, shape.rope_theta, shape.scaling, options.device)
        self.index_turn: RotaryEmbedding | None = None
        self.index_key_dim = 0
        self.kv_fp8: Fp8Kv | None = None
        if isinstance(selecting, Learned):
            self.index_turn = RotaryEmbedding(selecting.shape.rope_dim, selecting.rope_theta, None, options.device)
            self.index_key_dim = selecting.shape.head_dim
            self.kv_fp8 = Fp8Kv(options.kernels, options.ue8m0) if options.index_fp8 else None
        self.top_k = selecting.top_k if selecting else 0
        self.max_seq_len = shape.max_seq_len
        self.vocab_size = shape.vocab_size
        self.kv_row_dim = 2 * shape.n_kv_heads * shape.head_dim
        self.index_layer_ids = list(range(shape.n_layers))

    def rope(self, positions: Tensor) -> Rope:
        turn = self.turn(positions)
        return Rope(turn, self.index_turn(positions) if self.index_turn else turn)

    def logits(self, hidden: Tensor) -> Tensor:
        matrix = self.embed.weight if self.head is None else self.head.weight
        return F.linear(self.norm(hidden), matrix).float()
