"""What a model returns for each layer, and what it asks of the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dsakv.kernels.contract import Kernels, Quantized


class Selection(NamedTuple):
    """What the indexer chose for the ``T`` queries of a step.

    Positions are ascending. A query with fewer than ``K`` keys to see has only ``counts`` valid columns;
    those behind hold positions that attention must ignore.
    """

    positions: Tensor  # [T, K] int64
    scores: Tensor  # [T, K] float32, in the order of positions
    counts: Tensor  # [T] int64, at least 1


Turn = tuple[Tensor, Tensor]
"""Cosine and sine ``[T, rope / 2]`` of a step's positions."""


class Rope(NamedTuple):
    """What turns a step's queries and keys by their positions; an indexer may have other frequencies."""

    attention: Turn
    indexer: Turn


class Segment(NamedTuple):
    """The queries of one sequence within a step."""

    rows: slice
    seq_len: int
    """Tokens in the cache of this sequence once the step's own are appended."""


class Fp8Kv(NamedTuple):
    """What the KV cache keeps in float8 for a model: index keys, and the leading ``latent`` numbers of a row."""

    kernels: Kernels
    ue8m0: bool
    """Whether scales are powers of two."""
    latent: int = 0
    """Numbers of the latent; 0 where rows are kept as they are."""

    def quantize(self, x: Tensor, block: int) -> Quantized:
        """``x`` ``[..., n]`` with one scale for each ``block`` numbers."""
        return self.kernels.act_quant(x, power_of_two_scale=self.ue8m0, block=block)


class IndexKeys(NamedTuple):
    """Index keys of a sequence as the cache keeps them."""

    values: Tensor  # [S, D]
    scale: Tensor | None  # [S] float32; None for 1


class LayerCache(Protocol):
    """The KV of one layer, bound to the sequences of one step. What it keeps in float8 it rounds on the way in."""

    @property
    def segments(self) -> list[Segment]: ...

    def append(self, kv: Tensor, index_key: Tensor | None) -> None:
        """Store the step's tokens: ``kv`` ``[T, R]`` and ``index_key`` ``[T, D]``, None in a layer without indexer."""
        ...

    def index_keys(self, segment: int) -> IndexKeys:
        """All ``seq_len`` index keys of a segment's sequence, the step's own included."""
        ...

    def fetch(self, selection: Selection | None) -> None:
        """Begin to bring what the step's queries read to the device: a selection, or with None everything.

        Called once a step, as soon as it is known: what is computed before the first ``gather`` hides the time.
        """
        ...

    def gather(self, rows: slice) -> Tensor:
        """The KV rows that were fetched for the queries ``rows``: ``[t, K, R]`` in the model's dtype."""
        ...

    def sequence(self, segment: int) -> Tensor:
        """All ``seq_len`` KV rows of a segment's sequence, ``[S, R]`` in the model's dtype."""
        ...


class LayerOutput(NamedTuple):
    """Hidden states with the selection that attention read."""

    hidden: Tensor  # [T, dim]
    selection: Selection | None
    """None where it read everything."""


class Layer(Protocol):
    """A decoder layer in two halves, each with its norm and residual."""

    def attend(
        self,
        hidden: Tensor,
        rope: Rope,
        positions: Tensor,
        kv: LayerCache,
        previous: Selection | None = None,
    ) -> LayerOutput:
        """Attention over ``T`` tokens.

        ``hidden`` ``[T, dim]``; ``rope`` as ``Model.rope`` gives it; ``positions`` ``[T]`` int64;
        ``previous`` is the selection that the layer before read, which one without an indexer reads again.
        """
        ...

    def __call__(
        self, hidden: Tensor, rope: Rope, positions: Tensor, kv: LayerCache, previous: Selection | None = None
    ) -> LayerOutput:
        """Both halves, one after the other."""
        ...

    def feed(self, chunks: list[Tensor]) -> list[Tensor]:
        """The feed-forward half over chunks ``[t, dim]`` each, to the same bits as one by one: its weights, which may
        have to be fetched, serve all of them.
        """
        ...


class Model(Protocol):
    """A decoder whose loop over layers belongs to the caller."""

    layers: Sequence[Layer]
    index_layer_ids: list[int]
    """For each layer, the layer whose indexer makes its selection."""
    top_k: int
    """Tokens that a query reads at most; 0 where layers are dense."""
    max_seq_len: int
    vocab_size: int
    kv_row_dim: int
    index_key_dim: int
    kv_fp8: Fp8Kv | None
    """What the cache is to keep in float8; None for nothing."""
    dtype: torch.dtype
    device: torch.device

    def embed(self, token_ids: Tensor) -> Tensor:
        """``[T]`` to ``[T, dim]``."""
        ...

    def rope(self, positions: Tensor) -> Rope:
        """What layers need of ``positions`` ``[T]``."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[n, vocab]`` in float32 of hidden states ``[n, dim]``."""
        ...
