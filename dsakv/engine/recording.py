"""What the layers of a step selected for the queries worth recording, brought to the host in one copy."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsakv.engine.sequence import Sequence
from dsakv.kv.paged import LayerView
from dsakv.kv.step import Read
from dsakv.models.contracts import Model, Segment, Selection
from dsakv.request import TIERS, StepRecords


class Recorder:
    """Collects one step: ``add`` keeps of each layer what is recorded and nothing else, ``records`` copies it.

    ``tail`` None records every query of the step, else those among the last ``tail`` of each prompt.
    """

    def __init__(self, batch: list[Sequence], segments: list[Segment], tail: int | None) -> None:
        queries: list[tuple[int, int, int, int, int]] = []  # offset, row, request, step, sequence length
        for sequence, segment in zip(batch, segments, strict=True):
            first = segment.seq_len - (segment.rows.stop - segment.rows.start)  # position of the segment's first query
            begin = first if tail is None else max(first, sequence.prompt_tokens - tail)
            first_step = max(0, begin - sequence.prompt_tokens)
            for position in range(begin, segment.seq_len):
                # The query at position n of an n-token prompt is decode step 0: it computes the first generated token.
                step = position - sequence.prompt_tokens
                row, request_id = segment.rows.start + position - first, sequence.request.request_id
                queries.append((max(0, step - first_step), row, request_id, step, position + 1))
        # In the order in which decoding would come to them: one step of all sequences after the other.
        queries.sort(key=lambda query: query[0])
        self._queries = np.array(queries, dtype=np.int64).reshape(-1, 5)
        self._rows = self._queries[:, 1].tolist()
        self._positions: list[Tensor] = []  # [B, K] each
        self._scores: list[Tensor] = []
        self._found: list[Tensor] = []  # [B, K] each, where not everything is on the device
        self._reads: list[list[Read]] = []

    @property
    def decode_steps(self) -> int:
        """Steps that decoding would have taken for what is read here at once; at least the one that it is."""
        return 1 + int(self._queries[:, 0].max(initial=0))

    def add(self, selection: Selection | None, view: LayerView) -> None:
        """Take in the next layer."""
        if not self._rows:
            return
        assert selection is not None, "a model whose layers are dense has nothing to record"
        rows = torch.tensor(self._rows, device=selection.positions.device)
        self._positions.append(selection.positions[rows].int())
        self._scores.append(selection.scores[rows])
        if (found := view.found(rows)) is not None:
            self._found.append(found)
        self._reads.append(view.reads)

    def records(self, model: Model, row_bytes: int) -> StepRecords | None:
        """The records of all layers; None where the step holds no query to record."""
        if not self._rows:
            return None
        positions, scores = torch.stack(self._positions), torch.stack(self._scores)  # [L, B, K]
        host = torch.stack((positions, scores.view(torch.int32))).cpu().numpy()  # [2, L, B, K]
        found = torch.stack(self._found).cpu().numpy() if self._found else None  # [L, B, K]
        fetch_us, fetch_batch = self._costs(found)
        offset, _, request_id, step_idx, lengths = self._queries.T
        return StepRecords(
            request_id=request_id,
            step_idx=step_idx,
            step_offset=offset,
            seq_len=lengths,
            counts=np.minimum(lengths, model.top_k),
            positions=host[0],
            scores=host[1].view(np.float32),
            index_layer_id=np.array(model.index_layer_ids, dtype=np.int32),
            found=found,
            fetch_us=fetch_us,
            fetch_batch=fetch_batch,
            row_bytes=row_bytes,
        )

    def _costs(self, found: NDArray[np.uint8] | None) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """What the batch of each tier took that read for a query, and for how many it read: ``[3, L, B]`` each."""
        us = np.full((len(TIERS), len(self._reads), len(self._rows)), np.nan)
        batch = np.zeros(us.shape, dtype=np.int64)
        rows = np.array(self._rows)
        for layer, reads in enumerate(self._reads):
            for read in reads:
                served = (rows >= read.rows.start) & (rows < read.rows.stop)
                if found is not None:
                    served &= (found[layer] == read.tier).any(axis=1)
                if served.any():
                    us[read.tier, layer, served] = read.begin.us_until(read.end)
                    batch[read.tier, layer, served] = served.sum()
        return us, batch
