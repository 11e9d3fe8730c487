"""What the layers of a step selected for the queries worth recording, brought to the host in one copy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsakv.engine.sequence import Sequence
from dsakv.models.contracts import Fetch, LayerOutput, Model, Segment
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
        self._fetches: list[list[Fetch]] = []

    @property
    def decode_steps(self) -> int:
        """Steps that decoding would have taken for what is read here at once; at least the one that it is."""
        return 1 + int(self._queries[:, 0].max(initial=0))

    def add(self, output: LayerOutput) -> None:
        """Take in the next layer."""
        if not self._rows:
            return
        assert output.selection is not None, "a model whose layers are dense has nothing to record"
        rows = torch.tensor(self._rows, device=output.hidden.device)
        self._positions.append(output.selection.positions[rows].int())
        self._scores.append(output.selection.scores[rows])
        self._fetches.append(output.fetches)

    def records(self, model: Model, row_bytes: int) -> StepRecords | None:
        """The records of all layers; None where the step holds no query to record."""
        if not self._rows:
            return None
        positions, scores = torch.stack(self._positions), torch.stack(self._scores)  # [L, B, K]
        host = torch.stack((positions, scores.view(torch.int32))).cpu().numpy()  # [2, L, B, K]
        fetch_us = np.full((len(TIERS), len(self._fetches), len(self._rows)), np.nan)
        fetch_batch = np.zeros(fetch_us.shape, dtype=np.int64)
        for i, fetches in enumerate(self._fetches):
            for fetch in fetches:
                inside = [b for b, row in enumerate(self._rows) if fetch.rows.start <= row < fetch.rows.stop]
                if inside:
                    fetch_us[0, i, inside] = fetch.begin.us_until(fetch.end)
                    fetch_batch[0, i, inside] = fetch.rows.stop - fetch.rows.start
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
            found=None,
            fetch_us=fetch_us,
            fetch_batch=fetch_batch,
            row_bytes=row_bytes,
        )
