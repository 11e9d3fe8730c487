"""Records as columns: the one form in which readers, the live tracer and the analyzers exchange a trace."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

TIERS = ("hbm", "local_pool", "remote_pool")

Ints = NDArray[np.integer]
Floats = NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class FetchColumns:
    """What reading the selected rows from one tier cost, a value a record; all arrays are ``[R]``."""

    hit_blocks: Ints
    bytes_read: Ints
    """Payload bytes."""
    read_ops: Ints
    latency_us: Floats
    """Latency of the one batch that read this record's rows; NaN where the tier was not used."""
    batch_size: Ints
    """Records that this batch read for."""


@dataclass(frozen=True, slots=True)
class TraceBatch:
    """``R`` records. Ragged rows are ``values[offsets[r]:offsets[r + 1]]``.

    ``positions`` are ascending and unique within a record and below its ``seq_len``. Records of one
    request stand in (step, layer) order; requests may interleave. A reader fills the columns that it was
    asked for; the optional ones are None otherwise.
    """

    request_id: Ints
    """[R] int64. Readers number string ids in order of appearance."""
    layer_id: Ints
    """[R] int32."""
    step_idx: Ints
    """[R] int64: decode step of the request, from 0; negative for the tail of the prefill."""
    seq_len: Ints
    """[R] int64: tokens in the cache when the query ran, its own included."""
    offsets: Ints
    """[R + 1] int64."""
    positions: Ints
    """[offsets[-1]] int32: selected token positions."""

    index_layer_id: Ints | None = None
    engine_step: Ints | None = None
    step_wall_us: Ints | None = None
    scores: Floats | None = None
    """[offsets[-1]] float32: index scores in the order of ``positions``."""
    fetch: dict[str, FetchColumns] = field(default_factory=dict)
    """By name of the tier; tiers that were not used are absent."""

    def __len__(self) -> int:
        return len(self.request_id)
