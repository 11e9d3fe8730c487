"""What a model returns for each layer, and what it asks of the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Selection(NamedTuple):
    """What the indexer chose for the ``T`` queries of a step.

    Positions are ascending. A query with fewer than ``K`` keys to see has only ``counts`` valid columns;
    those behind hold positions that attention must ignore.
    """

    positions: Tensor  # [T, K] int64
    scores: Tensor  # [T, K] float32, in the order of positions
    counts: Tensor  # [T] int64, at least 1


class Mark(Protocol):
    """A point in time on the device that ran the work."""

    def us_until(self, later: Mark) -> float:
        """Microseconds between two marks; may wait for the device."""
        ...


class Fetch(NamedTuple):
    """One batched read of selected rows: which queries it served, when it began and ended."""

    rows: slice
    begin: Mark
    end: Mark


class Segment(NamedTuple):
    """The queries of one sequence within a step."""

    rows: slice
    seq_len: int
    """Tokens in the cache of this sequence once the step's own are appended."""


class LayerCache(Protocol):
    """The KV of one layer, bound to the sequences of one step."""

    @property
    def segments(self) -> list[Segment]: ...

    def append(self, kv: Tensor, index_key: Tensor | None) -> None:
        """Store the step's tokens: ``kv`` ``[T, R]`` and ``index_key`` ``[T, D]``, None in a layer without indexer."""
        ...

    def index_keys(self, segment: int) -> Tensor:
        """All index keys of a segment's sequence, ``[seq_len, D]``, the step's own included."""
        ...

    def gather(self, positions: Tensor, rows: slice) -> tuple[Tensor, Fetch]:
        """Read the KV rows at ``positions`` ``[t, K]`` for the queries ``rows`` of the step: ``[t, K, R]``."""
        ...


class LayerOutput(NamedTuple):
    """A layer's hidden states with the selection that it read and what fetching that cost."""

    hidden: Tensor  # [T, dim]
    selection: Selection
    fetches: list[Fetch]


class Layer(Protocol):
    def __call__(
        self,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        positions: Tensor,
        kv: LayerCache,
        previous: Selection | None = None,
    ) -> LayerOutput:
        """Run one layer over ``T`` tokens.

        ``hidden`` ``[T, dim]``; ``rope`` cosine and sine ``[T, rope / 2]``; ``positions`` ``[T]`` int64;
        ``previous`` is the selection that the layer before read, which one without an indexer reads again.
        """
        ...


class Model(Protocol):
    """A decoder whose loop over layers belongs to the caller."""

    layers: Sequence[Layer]
    index_layer_ids: list[int]
    """For each layer, the layer whose indexer makes its selection."""
    top_k: int
    max_seq_len: int
    vocab_size: int
    kv_row_dim: int
    index_key_dim: int
    dtype: torch.dtype
    device: torch.device

    def embed(self, token_ids: Tensor) -> Tensor:
        """``[T]`` to ``[T, dim]``."""
        ...

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[T, rope / 2]`` of ``positions`` ``[T]``."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[n, vocab]`` in float32 of hidden states ``[n, dim]``."""
        ...
