"""What a hot tier would miss: compiled caches of each layer, driven by what decode asked for.

They keep to the rules of :mod:`dsakv.policies.placement` for a hot tier whose layers have it each to themselves and
which starts cold: the same misses, many layer-steps at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dsakv.analysis.kv_steps import KvSteps
from dsakv.analysis.links import Ints
from dsakv.policies import POLICIES, Steps


@dataclass(frozen=True, slots=True)
class Stretch:
    """Layer-steps ``[begin, end)`` of a batch between which nothing is dropped, and the blocks that are afterwards."""

    begin: int
    end: int
    some: Ints
    """[r] those of them, from ``begin`` on, that ask for anything."""
    steps: Steps
    """Of these; a cache's row is its layer."""
    dropped: tuple[Ints, ...]


def stretches(batch: KvSteps) -> list[Stretch]:
    """``batch`` cut where blocks are dropped; any number of caches may then take it."""
    ends: dict[int, list[Ints]] = {}
    for r, ids in batch.ended:
        ends.setdefault(r, []).append(ids)
    ends.setdefault(len(batch.layer), [])
    cut, begin = [], 0
    for end in sorted(ends):
        offsets = batch.offsets[begin : end + 1] - batch.offsets[begin]
        some = np.flatnonzero(np.diff(offsets))
        ids = batch.ids[batch.offsets[begin] : batch.offsets[end]]
        steps = Steps.of(batch.layer[begin:end][some], np.append(offsets[some], offsets[-1]), ids)
        cut.append(Stretch(begin, end, some, steps, tuple(ends[end])))
        begin = end
    return cut


def written_blocks(batch: KvSteps) -> Ints:
    """[R] blocks that each layer-step filled on the device."""
    sums = np.zeros(len(batch.ids) + 1, dtype=np.int64)
    np.cumsum(batch.written, out=sums[1:])
    return np.diff(sums[batch.offsets])


class HotTier:
    """Hot blocks of every layer under one policy."""

    def __init__(self, policy: str, blocks: int) -> None:
        """``blocks`` of each layer."""
        self.policy, self.blocks = policy, blocks
        self._caches = POLICIES[policy]().caches(blocks)
        self._layers: set[int] = set()

    def misses(self, batch: KvSteps, parts: Sequence[Stretch], written: Ints) -> Ints:
        """[R] blocks that each layer-step of the next batch has to fetch.

        ``parts`` and ``written`` are those of the batch. What was just written is on the device without being hot, so
        that it is no hit of a cache and still not fetched.
        """
        self._layers.update(np.unique(batch.layer).tolist())
        missed = np.diff(batch.offsets) - written
        for part in parts:
            if len(part.some):
                missed[part.begin + part.some] -= self._caches.step(part.steps)
            for ids in part.dropped:
                for layer in self._layers:
                    self._caches.drop(layer, ids)
        return missed
