"""Locality in time: how much two records in a row share, and after how many steps a block is read again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from dsakv.analysis.distribution import Distribution
from dsakv.analysis.history import Accesses
from dsakv.analysis.records import BlockRecords

_LONGEST = (1 << 62) - 1


class TemporalLocality:
    """``temporal_locality``. Reuse distance is the difference of ``step_idx``, at most ``reuse_cap_steps``."""

    def __init__(self, reuse_cap_steps: int) -> None:
        self._cap = reuse_cap_steps
        self._jaccard = Distribution()
        self._distances: Counter[int] = Counter()
        self._first_touches = 0
        self._second_touches = 0

    def add(self, batch: BlockRecords, accesses: Accesses) -> None:
        first = batch.offsets[:-1]
        followed = batch.records.index > 0  # [R]
        in_both = accesses.last_index == batch.records.index[batch.row] - 1
        both = np.add.reduceat(in_both, first, dtype=np.int64)[followed]
        either = np.diff(batch.offsets)[followed] + accesses.last_size[followed] - both
        self._jaccard.add(both / either)

        reused = accesses.touches > 0  # [T]
        distance = batch.records.step[batch.row[reused]] - accesses.last_step[reused]
        distances, counts = np.unique(np.minimum(distance, min(self._cap, _LONGEST)), return_counts=True)
        self._distances.update(dict(zip(distances.tolist(), counts.tolist(), strict=True)))
        self._first_touches += int(np.count_nonzero(~reused))
        self._second_touches += int(np.count_nonzero(accesses.touches == 1))

    def merge(self, later: TemporalLocality) -> None:
        self._jaccard.merge(later._jaccard)
        self._distances.update(later._distances)
        self._first_touches += later._first_touches
        self._second_touches += later._second_touches

    def result(self) -> dict[str, Any]:
        samples = sum(self._distances.values())
        histogram = sorted(self._distances.items())
        upto = np.cumsum([count for _, count in histogram]).tolist()
        return {
            "step_jaccard": self._jaccard.result(),
            "reuse_distance_hist_steps": {str(distance): count for distance, count in histogram},
            "reuse_distance_cdf_steps": [
                {"reuse_distance_steps": distance, "cdf": count / samples}
                for (distance, _), count in zip(histogram, upto, strict=True)
            ],
            "first_touch_blocks": self._first_touches,
            "single_touch_blocks": self._first_touches - self._second_touches,
            "reuse_samples": samples,
            "reuse_cap_steps": self._cap,
        }
