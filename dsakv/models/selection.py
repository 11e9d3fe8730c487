"""Ways to select tokens: by scores of whatever origin, and a window that needs none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsakv.distributed import World
from dsakv.kernels import reference
from dsakv.kernels.contract import Kernels
from dsakv.models.contracts import LayerCache, Segment, Selection

Score = Callable[[int, slice, Tensor], None]
"""Fills scores ``[t, S]`` of a segment's queries, given the segment's number and which rows of the step they are."""
SINKS = 4
"""First tokens that a window keeps (Xiao et al., 2023, https://arxiv.org/abs/2309.17453)."""


def select_best(
    score: Score, positions: Tensor, kv: LayerCache, top_k: int, kernels: Kernels, world: World
) -> Selection:
    """The ``top_k`` best-scored tokens of each of the ``T`` queries at ``positions``, among those up to its own."""
    longest = max(segment.seq_len for segment in kv.segments)
    k, step = min(top_k, longest), reference.score_rows(longest, positions.device)
    chosen, chosen_scores = [], []
    for start in range(0, len(positions), step):  # a chunk's scores over a long context would be the largest tensor
        tile = slice(start, min(start + step, len(positions)))
        scores = torch.full((tile.stop - tile.start, longest), -torch.inf, device=positions.device)
        for i, segment in enumerate(kv.segments):
            rows = slice(max(segment.rows.start, tile.start), min(segment.rows.stop, tile.stop))
            if rows.start < rows.stop:
                part = scores[rows.start - tile.start : rows.stop - tile.start, : segment.seq_len]
                score(i, rows, part)
                hide_later(part, segment, rows)
        chosen.append(world.broadcast(kernels.top_k(scores, k)))  # ranks must read the same rows
        chosen_scores.append(scores.gather(1, chosen[-1]))
    return Selection(torch.cat(chosen), torch.cat(chosen_scores), (positions + 1).clamp(max=k))


def hide_later(scores: Tensor, segment: Segment, rows: slice) -> None:
    """Put ``-inf`` where the queries ``rows`` of a segment have later keys: ``scores`` ``[..., t, S]``."""
    length = segment.rows.stop - segment.rows.start
    if length > 1:  # within the step's own tokens a query must not see later keys
        own = scores[..., segment.seq_len - length :]
        later = torch.ones(own.shape[-2:], dtype=torch.bool, device=own.device)
        own.masked_fill_(later.triu_(1 + rows.start - segment.rows.start), -torch.inf)


def select_recent(positions: Tensor, kv: LayerCache, top_k: int) -> Selection:
    """The last ``top_k`` tokens up to each query's own, the first ``SINKS`` of a sequence in place of the oldest.

    A token's score is minus its distance.
    """
    k = min(top_k, max(segment.seq_len for segment in kv.segments))
    columns = torch.arange(k, device=positions.device)
    skipped = (positions + 1 - k).clamp(min=0).unsqueeze(1)  # [T, 1]
    chosen = columns + skipped * (columns >= min(SINKS, k - 1))  # [T, k]
    distance = positions.unsqueeze(1) - chosen
    return Selection(chosen, -distance.float(), (positions + 1).clamp(max=k))
