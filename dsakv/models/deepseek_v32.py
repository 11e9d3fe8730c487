"""DeepSeek-V3.2: multi-head latent attention over the tokens that a lightning indexer selects.

The KV cache holds, for each token and layer, the compressed latent and the rotated key part that all heads share
(``kv_lora_rank + qk_rope_head_dim`` numbers), and the indexer's key. The up-projections of keys and values are
absorbed into the query and the output, so attention works on gathered cache rows as they are.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from dsakv.kernels import reference
from dsakv.models.contracts import Fp8Kv, LayerCache, LayerOutput, Rope, Selection
from dsakv.models.dsa_shape import DsaShape
from dsakv.models.indexer import Indexer, IndexerShape
from dsakv.models.layers import Embedding, GatedMLP, RMSNorm, RotaryEmbedding, rotate_pairs
from dsakv.models.moe import MoE, RoutingShape
from dsakv.models.options import ModelOptions
from dsakv.models.projections import linear, projection

LATENT_NORM_EPS = 1e-6
"""Of the norms within attention. Configs have no key for it: ``rms_norm_eps`` is that of the norms around it."""


def indexer_shape(shape: DsaShape) -> IndexerShape:
    """That of every layer's indexer."""
    return IndexerShape(
        dim=shape.dim,
        query_dim=shape.q_lora_rank,
        n_heads=shape.index_n_heads,
        head_dim=shape.index_head_dim,
        rope_dim=shape.qk_rope_head_dim,
        top_k=shape.index_topk,
        interleaved=shape.indexer_rope == "interleaved",
    )


class Attention(nn.Module):
    """MLA over the selection of the layer's own indexer or, where it has none, of the layer before.

    A rank computes an equal range of the heads.
    """

    def __init__(self, layer_id: int, shape: DsaShape, options: ModelOptions) -> None:
        super().__init__()
        self.shape, self.kernels, dtype = shape, options.kernels, options.dtype
        self.n_heads = shape.n_heads // options.world.size
        qk_dim = shape.qk_nope_head_dim + shape.qk_rope_head_dim
        self.scale = qk_dim**-0.5 * (shape.yarn.softmax_scale if shape.yarn else 1.0)
        self.wq_a = projection(shape.dim, shape.q_lora_rank, options)
        self.q_norm = RMSNorm(shape.q_lora_rank, LATENT_NORM_EPS, dtype)
        self.wq_b = projection(shape.q_lora_rank, self.n_heads * qk_dim, options)
        self.wkv_a = projection(shape.dim, shape.kv_lora_rank + shape.qk_rope_head_dim, options)
        self.kv_norm = RMSNorm(shape.kv_lora_rank, LATENT_NORM_EPS, dtype)
        # Absorbed into queries and outputs, which are not rounded: it is kept wide in fp8 models too.
        self.wkv_b = linear(shape.kv_lora_rank, self.n_heads * (shape.qk_nope_head_dim + shape.v_head_dim), dtype)
        self.wo = projection(self.n_heads * shape.v_head_dim, shape.dim, options)
        self.indexer = None if layer_id in shape.shared_layers else Indexer(indexer_shape(shape), options)

    def forward(
        self, x: Tensor, rope: Rope, positions: Tensor, kv: LayerCache, previous: Selection | None
    ) -> tuple[Tensor, Selection]:
        """This rank's part of the output ``[T, dim]``, with the selection."""
        shape, kernels = self.shape, self.kernels
        q_latent = self.q_norm(self.wq_a(x))  # [T, q_lora]
        latent, key_rope = self.wkv_a(x).split([shape.kv_lora_rank, shape.qk_rope_head_dim], dim=-1)
        row = torch.cat((self.kv_norm(latent), rotate_pairs(key_rope, rope.attention)), dim=-1)  # [T, R]
        if self.indexer is None:
            assert previous is not None, "the first layer has an indexer"
            kv.append(row, None)
            selection = previous
        else:
            kv.append(row, self.indexer.key(x, rope.indexer))
            selection = self.indexer(x, q_latent, rope.indexer, positions, kv)
        kv.fetch(selection)

        q = self.wq_b(q_latent).view(len(x), self.n_heads, -1)  # [T, H, nope + rope]
        q_nope, q_rope = q.split([shape.qk_nope_head_dim, shape.qk_rope_head_dim], dim=-1)
        up = self.wkv_b.weight.view(self.n_heads, -1, shape.kv_lora_rank)  # [H, nope + v, kv_lora]
        key_up, value_up = up.split([shape.qk_nope_head_dim, shape.v_head_dim], dim=1)
        absorbed = torch.bmm(q_nope.transpose(0, 1), key_up).transpose(0, 1)  # [T, H, kv_lora]
        q = torch.cat((absorbed, rotate_pairs(q_rope, rope.attention)), dim=-1)  # [T, H, R]

        mixed = []
        step = max(1, reference.tile_elements(x.device) // (selection.positions.shape[1] * q.shape[-1]))
        for start in range(0, len(x), step):
            rows = slice(start, min(start + step, len(x)))
            gathered, counts = kv.gather(rows), selection.counts[rows]  # [t, K, R]
            mixed.append(kernels.sparse_attention(q[rows], gathered, counts, self.scale, shape.kv_lora_rank))
        latent_out = torch.cat(mixed)  # [T, H, kv_lora]
        out = torch.bmm(latent_out.transpose(0, 1), value_up.transpose(1, 2)).transpose(0, 1)  # [T, H, v]
        return self.wo(out.flatten(1)), selection


class DecoderLayer(nn.Module):
    """Attention and feed-forward with pre-normalisation and residuals."""

    def __init__(self, layer_id: int, shape: DsaShape, options: ModelOptions) -> None:
        super().__init__()
        self.world = options.world
        self.attn_norm = RMSNorm(shape.dim, shape.norm_eps, options.dtype)
        self.attn = Attention(layer_id, shape, options)
        self.ffn_norm = RMSNorm(shape.dim, shape.norm_eps, options.dtype)
        self.ffn: GatedMLP | MoE
        if layer_id < shape.n_dense_layers:
            self.ffn = GatedMLP(shape.dim, shape.inter_dim // options.world.size, options)
        else:
            routing = RoutingShape(
                n_experts=shape.n_routed_experts,
                n_activated=shape.n_activated_experts,
                n_groups=shape.n_expert_groups,
                n_limited_groups=shape.n_limited_groups,
                route_scale=shape.route_scale,
                normalize=shape.norm_topk_prob,
            )
            self.ffn = MoE(shape.dim, shape.moe_inter_dim, shape.n_shared_experts, routing, options)

    def forward(
        self, hidden: Tensor, rope: Rope, positions: Tensor, kv: LayerCache, previous: Selection | None = None
    ) -> LayerOutput:
        """Both halves, one after the other."""
        hidden, selection = self.attend(hidden, rope, positions, kv, previous)
        return LayerOutput(self.feed([hidden])[0], selection)

    def attend(
        self, hidden: Tensor, rope: Rope, positions: Tensor, kv: LayerCache, previous: Selection | None = None
    ) -> LayerOutput:
        attended, selection = self.attn(self.attn_norm(hidden), rope, positions, kv, previous)
        return LayerOutput(hidden + self._whole(attended, hidden.dtype), selection)

    def feed(self, chunks: list[Tensor]) -> list[Tensor]:
        normed = [self.ffn_norm(hidden) for hidden in chunks]
        parts = self.ffn(normed) if isinstance(self.ffn, MoE) else [self.ffn(x) for x in normed]
        return [hidden + self._whole(part, hidden.dtype) for hidden, part in zip(chunks, parts, strict=True)]

    def _whole(self, part: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum of all ranks' parts, added up in float32."""
        return (self.world.all_reduce(part.float()) if self.world.size > 1 else part).to(dtype)


class DeepseekV32(nn.Module):
    """The decoder; see ``models.contracts.Model``. Parameter names are those of DeepSeek's own checkpoints."""

    def __init__(self, shape: DsaShape, options: ModelOptions) -> None:
        super().__init__()
        options = replace(options, ue8m0=shape.scale_fmt == "ue8m0", index_fp8=options.index_fp8 or options.fp8)
        self.shape, self.world, self.dtype, self.device = shape, options.world, options.dtype, options.device
        self.embed = Embedding(shape.vocab_size, shape.dim, options)
        self.layers = nn.ModuleList(DecoderLayer(i, shape, options) for i in range(shape.n_layers))
        self.norm = RMSNorm(shape.dim, shape.norm_eps, options.dtype)
        self.head = linear(shape.dim, shape.vocab_size // options.world.size, options.dtype)
        self.turn = RotaryEmbedding(shape.qk_rope_head_dim, shape.rope_theta, shape.yarn, options.device)
        self.top_k = shape.index_topk
        self.max_seq_len = shape.max_seq_len
        self.vocab_size = shape.vocab_size
        self.kv_row_dim = shape.kv_lora_rank + shape.qk_rope_head_dim
        self.index_key_dim = shape.index_head_dim
        self.kv_fp8: Fp8Kv | None = None
        if options.index_fp8:
            self.kv_fp8 = Fp8Kv(options.kernels, options.ue8m0, latent=shape.kv_lora_rank if options.fp8 else 0)
        self.index_layer_ids = shape.index_layer_ids

    def rope(self, positions: Tensor) -> Rope:
        turn = self.turn(positions)
        return Rope(turn, turn)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.world.all_gather(self.head(self.norm(hidden)).float())
