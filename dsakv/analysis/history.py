"""What a stream did with each block before: the facts from which reuse, working set and LRU follow.

LRU needs no cache to be simulated (Mattson et al., "Evaluation techniques for storage hierarchies", 1970): the blocks
of a stream in order of their last access are the contents of an LRU cache of every capacity at once, so a block's rank
in that order says which capacities hold it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsakv.analysis.records import BlockRecords

NEVER = np.iinfo(np.int64).max
"""Rank of a block that its stream has not touched before: beyond every capacity."""


@dataclass(frozen=True, slots=True)
class Accesses:
    """The past of each of the ``T`` blocks that ``R`` records touch, as it was when the record began."""

    rank: NDArray[np.int64]
    """[T] blocks of the stream accessed more recently than this one; NEVER for a new one. Within a record the higher
    block counts as the more recent."""
    last_index: NDArray[np.int64]
    """[T] number of the record in the stream that touched the block last; -1 for a new one."""
    last_step: NDArray[np.int64]
    """[T] ``step_idx`` of that record; meaningless for a new block."""
    touches: NDArray[np.int64]
    """[T] records of the stream that touched the block before."""
    last_size: NDArray[np.int64]
    """[R] blocks of the stream's record before this one; 0 for its first."""
    window_sizes: NDArray[np.int64]
    """[W, R] distinct blocks in the last so many records of the stream, this one included, for each window."""


class _Stream:
    """Blocks that one stream has touched, [n] ascending, with the last access to each."""

    __slots__ = ("blocks", "last_index", "last_size", "last_slot", "last_step", "slots", "touches")

    def __init__(self) -> None:
        self.blocks = np.empty(0, dtype=np.int64)
        self.last_slot = np.empty(0, dtype=np.int64)  # accesses of the stream are numbered; -1 before the first
        self.last_index = np.empty(0, dtype=np.int64)
        self.last_step = np.empty(0, dtype=np.int64)
        self.touches = np.empty(0, dtype=np.int64)
        self.slots = 0
        self.last_size = 0

    def find(self, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where ``blocks`` are, after making room for the new ones."""
        at = np.searchsorted(self.blocks, blocks)
        new = np.ones(len(blocks), dtype=bool)
        inside = at < len(self.blocks)
        new[inside] = self.blocks[at[inside]] != blocks[inside]
        if new.any():
            where = at[new]
            self.blocks = np.insert(self.blocks, where, blocks[new])
            self.last_slot = np.insert(self.last_slot, where, -1)
            self.last_index = np.insert(self.last_index, where, -1)
            self.last_step = np.insert(self.last_step, where, 0)
            self.touches = np.insert(self.touches, where, 0)
            at += np.cumsum(new) - new  # new blocks before this one moved it up
        return at


class AccessHistory:
    """The history of every stream for one block size. Memory grows with the distinct blocks of each stream.

    ``windows`` are in records, for ``Accesses.window_sizes``.
    """

    def __init__(self, windows: tuple[int, ...]) -> None:
        self._windows = windows
        self._streams: dict[int, _Stream] = {}

    def follow(self, batch: BlockRecords) -> Accesses:
        """Look up the past of each access in ``batch``, then enter it. Batches come in the order of the trace."""
        count = len(batch.blocks)
        accesses = Accesses(
            rank=np.empty(count, dtype=np.int64),
            last_index=np.empty(count, dtype=np.int64),
            last_step=np.empty(count, dtype=np.int64),
            touches=np.empty(count, dtype=np.int64),
            last_size=np.empty(len(batch), dtype=np.int64),
            window_sizes=np.empty((len(self._windows), len(batch)), dtype=np.int64),
        )
        bounds = batch.offsets.tolist()
        records = batch.records
        for r, (number, index, step) in enumerate(
            zip(records.stream.tolist(), records.index.tolist(), records.step.tolist(), strict=True)
        ):
            part = slice(bounds[r], bounds[r + 1])
            size = bounds[r + 1] - bounds[r]
            stream = self._streams.setdefault(number, _Stream())
            at = stream.find(batch.blocks[part])

            slot = stream.last_slot[at]
            rank = len(stream.blocks) - np.searchsorted(np.sort(stream.last_slot), slot, side="right")
            rank[slot < 0] = NEVER
            accesses.rank[part] = rank
            accesses.last_index[part] = stream.last_index[at]
            accesses.last_step[part] = stream.last_step[at]
            accesses.touches[part] = stream.touches[at]
            accesses.last_size[r] = stream.last_size

            stream.last_slot[at] = np.arange(stream.slots, stream.slots + size)
            stream.last_index[at] = index
            stream.last_step[at] = step
            stream.touches[at] += 1
            stream.slots += size
            stream.last_size = size
            for w, window in enumerate(self._windows):
                accesses.window_sizes[w, r] = np.count_nonzero(stream.last_index > index - window)
        return accesses
