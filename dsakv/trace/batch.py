"""Records as columns: the one form in which readers, the live tracer and the analyzers exchange a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]
Floats = NDArray[np.floating]


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
    found: NDArray[np.uint8] | None = None
    """[offsets[-1]]: tier that held each position's block, as an index into ``TIERS``; None: all on the device."""
    fetch_us: Floats | None = None
    """[3, R] by tier: time of the one batch that read for this record; NaN where none did."""
    fetch_batch: Ints | None = None
    """[3, R] by tier: queries that this batch read for; 0 where none did."""
    row_bytes: Ints | None = None
    """[R]: bytes of the KV row of a token in a layer."""

    def __len__(self) -> int:
        return len(self.request_id)

    def take(self, which: NDArray[np.bool_] | NDArray[np.int64]) -> TraceBatch:
        """Some records in the order of their numbers ``which``, or those where it is True, with the columns that
        readers fill.
        """
        if which.dtype == np.bool_:
            if which.all():
                return self
            which = np.flatnonzero(which)
        begins, counts = self.offsets[:-1][which], np.diff(self.offsets)[which]
        offsets = _sums(counts)
        places = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], counts)
        return TraceBatch(
            request_id=self.request_id[which],
            layer_id=self.layer_id[which],
            step_idx=self.step_idx[which],
            seq_len=self.seq_len[which],
            offsets=offsets,
            positions=self.positions[places],
            engine_step=None if self.engine_step is None else self.engine_step[which],
        )

    @classmethod
    def joined(cls, parts: Sequence[TraceBatch]) -> TraceBatch:
        """The records of ``parts`` one after the other; they have the same columns. As :meth:`take` for the rest."""
        if len(parts) == 1:
            return parts[0]
        engine_steps = [part.engine_step for part in parts if part.engine_step is not None]
        return cls(
            request_id=np.concatenate([part.request_id for part in parts]),
            layer_id=np.concatenate([part.layer_id for part in parts]),
            step_idx=np.concatenate([part.step_idx for part in parts]),
            seq_len=np.concatenate([part.seq_len for part in parts]),
            offsets=_sums(np.concatenate([np.diff(part.offsets) for part in parts])),
            positions=np.concatenate([part.positions for part in parts]),
            engine_step=np.concatenate(engine_steps) if engine_steps else None,
        )


def _sums(counts: Ints) -> NDArray[np.int64]:
    """Offsets of ragged rows with so many values each."""
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets
