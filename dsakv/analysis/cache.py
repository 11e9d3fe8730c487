"""Hits of an LRU cache, one for each stream, that starts empty and that nothing enters but by being read."""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dsakv.analysis.history import NEVER, Accesses
from dsakv.analysis.records import BlockRecords


class LruCache:
    """``cache_sim`` for each of ``capacities``, in blocks.

    ``step``: a step needs its whole set at once, so hits count against the cache as it stood when the step began;
    then the set becomes most recent in ascending block id, and the oldest are evicted down to capacity.
    ``sequential``: one access after the other in ascending block id, which thrashes below the size of a step's set.
    """

    def __init__(self, capacities: tuple[int, ...], mode: Literal["step", "sequential"]) -> None:
        self._hits = dict.fromkeys(capacities, 0)
        self._mode = mode
        self._accesses = 0

    def add(self, batch: BlockRecords, accesses: Accesses) -> None:
        depth = accesses.rank if self._mode == "step" else _sequential_depth(batch, accesses)
        self._accesses += len(depth)
        for capacity in self._hits:
            self._hits[capacity] += int(np.count_nonzero(depth < min(capacity, NEVER)))

    def merge(self, later: LruCache) -> None:
        self._accesses += later._accesses
        for capacity, hits in later._hits.items():
            self._hits[capacity] += hits

    def result(self) -> dict[str, Any]:
        return {
            str(capacity): {
                "capacity_blocks": capacity,
                "hits": hits,
                "misses": self._accesses - hits,
                "hit_rate": hits / self._accesses if self._accesses else None,
            }
            for capacity, hits in self._hits.items()
        }


def _sequential_depth(batch: BlockRecords, accesses: Accesses) -> NDArray[np.int64]:
    """Stack distance of each access when the blocks of a record come one by one, [T].

    On top of a block then lie those above it when the record began, and those from below it that came before it.
    """
    depth: list[int] = []
    bounds = batch.offsets.tolist()
    ranks = accesses.rank.tolist()
    for begin, end in pairwise(bounds):
        before: list[int] = []
        for rank in ranks[begin:end]:
            place = bisect_right(before, rank)
            depth.append(rank if rank == NEVER else rank + len(before) - place)
            before.insert(place, rank)
    return np.array(depth, dtype=np.int64)
