"""One pass over the layers, for the tokens of one step or of several."""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch

from dsakv.engine.recording import Recorder
from dsakv.engine.scheduler import Work
from dsakv.engine.sequence import Sequence
from dsakv.engine.weights import Weights
from dsakv.kv.paged import PagedCache
from dsakv.models.contracts import Model, Selection


class Chunk:
    """The tokens of a step on their way through the layers."""

    def __init__(self, works: list[Work], cache: PagedCache, model: Model, *, decode: bool) -> None:
        self.works = works
        batch = [work.sequence for work in works]
        self.token_ids = [
            token for sequence, span in works for token in sequence.token_ids[span.start : span.start + span.length]
        ]
        self.bound = cache.bind([work.span for work in works], decode=decode)
        self.rope = model.rope(self.bound.positions)
        self.hidden = torch.empty(0)  # [T, dim]
        self.selection: Selection | None = None
        self.ready = [  # those that have computed all they were given, and the row of their last token
            (sequence, segment.rows.stop - 1)
            for sequence, segment in zip(batch, self.bound.segments, strict=True)
            if segment.seq_len >= sequence.to_prefill
        ]
        self.recorder: Recorder | None = None

    @property
    def asking(self) -> list[tuple[Sequence, int]]:
        """Those of ``ready`` whose next token is not known."""
        return [(sequence, row) for sequence, row in self.ready if not sequence.forced]


def forward(model: Model, weights: Weights, chunks: Many[Chunk]) -> None:
    """Bring the chunks through all layers, each layer's weights being asked for once."""
    with weights.embedding(head=any(chunk.asking for chunk in chunks)):
        for chunk in chunks:
            chunk.hidden = model.embed(torch.tensor(chunk.token_ids, device=model.device))  # [T, dim]
    for i, layer in enumerate(model.layers):
        with weights.attention(i):
            for chunk in chunks:
                view = chunk.bound.layer(i)
                chunk.hidden, chunk.selection = layer.attend(
                    chunk.hidden, chunk.rope, chunk.bound.positions, view, chunk.selection
                )
                if chunk.recorder:
                    chunk.recorder.add(chunk.selection, view)
        with weights.feed_forward(i):
            for chunk, hidden in zip(chunks, layer.feed([chunk.hidden for chunk in chunks]), strict=True):
                chunk.hidden = hidden
