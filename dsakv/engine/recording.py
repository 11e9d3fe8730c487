"""What the layers of a step selected, brought to the host in one copy."""

from __future__ import annotations

import numpy as np
import torch

from dsakv.engine.sequence import Sequence
from dsakv.models.contracts import LayerOutput, Model, Segment
from dsakv.request import StepRecords


def collect(
    outputs: list[LayerOutput],
    batch: list[Sequence],
    segments: list[Segment],
    model: Model,
    row_bytes: int,
    tail: int | None,
) -> StepRecords | None:
    """Records of a step's queries: all of them with ``tail`` None, else the last ``tail`` of each prompt.

    Returns None where the step holds no query to record. Runs after the sequences were advanced.
    """
    rows: list[int] = []
    request_id, step_idx, seq_len = [], [], []
    for sequence, segment in zip(batch, segments, strict=True):
        first = segment.seq_len - (segment.rows.stop - segment.rows.start)  # position of the segment's first query
        begin = first if tail is None else max(first, sequence.prompt_tokens - tail)
        for position in range(begin, segment.seq_len):
            rows.append(segment.rows.start + position - first)
            request_id.append(sequence.request.request_id)
            # The query at position n of an n-token prompt is decode step 0: it computes the first generated token.
            step_idx.append(position - sequence.prompt_tokens)
            seq_len.append(position + 1)
    if not rows:
        return None
    select = torch.tensor(rows, device=outputs[0].hidden.device)
    positions = torch.stack([output.selection.positions[select].int() for output in outputs])  # [L, B, K]
    scores = torch.stack([output.selection.scores[select] for output in outputs])
    host = torch.stack((positions, scores.view(torch.int32))).cpu().numpy()  # [2, L, B, K]
    gather_us = np.empty((len(outputs), len(rows)))
    gather_batch = np.empty((len(outputs), len(rows)), dtype=np.int64)
    for i, output in enumerate(outputs):
        for fetch in output.fetches:
            inside = [b for b, row in enumerate(rows) if fetch.rows.start <= row < fetch.rows.stop]
            if inside:
                gather_us[i, inside] = fetch.begin.us_until(fetch.end)
                gather_batch[i, inside] = fetch.rows.stop - fetch.rows.start
    lengths = np.array(seq_len, dtype=np.int64)
    return StepRecords(
        request_id=np.array(request_id, dtype=np.int64),
        step_idx=np.array(step_idx, dtype=np.int64),
        seq_len=lengths,
        counts=np.minimum(lengths, model.top_k),
        positions=host[0],
        scores=host[1].view(np.float32),
        index_layer_id=np.array(model.index_layer_ids, dtype=np.int32),
        gather_us=gather_us,
        gather_batch=gather_batch,
        row_bytes=row_bytes,
    )
