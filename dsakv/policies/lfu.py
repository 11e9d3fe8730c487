"""Least frequently used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dsakv.compiled import compiled
from dsakv.policies.base import Ints, Outcome, Policy, Records, State


@dataclass(frozen=True)
class Lfu(Policy):
    """The block that was read in the fewest steps since it entered leaves first; of equals the least recently used,
    within one step the lower id.

    Counts are lost with the block (in-cache LFU). A miss counts 1. Without the pins of the step model the misses of
    a step, with their count of 1, would be the first to leave, and a cache in which all else counts 2 would never
    change again. A step takes time in proportion to the capacity and the set.
    """

    cell: ClassVar[type[np.uint8 | np.int32]] = np.int32

    def run(self, state: State, capacity: int, records: Records, outcome: Outcome) -> int:
        return _run(state, capacity, records, outcome)

    def drop(self, state: State, capacity: int, row: int, ids: Ints) -> None:
        state.table[row, ids] = 0  # a step takes no others from the stack than those that the table knows


@compiled
def _coldest(counts: NDArray[np.int32], leave: int) -> tuple[int, int]:
    """Of ``counts`` [n] the lowest ``leave`` (1 to n) are those below ``limit`` and ``ties`` of those equal to it."""
    low = high = counts[0]
    for count in counts:
        low = min(low, count)
        high = max(high, count)
    while low < high:
        middle = low + (high - low) // 2
        upto = 0
        for count in counts:
            upto += count <= middle
        if upto >= leave:
            high = middle
        else:
            low = middle + 1
    below = 0
    for count in counts:
        below += count < low
    return low, leave - below


@compiled
def _run(state: State, capacity: int, records: Records, outcome: Outcome) -> int:
    counts = np.empty(max(state.queues.shape[2], len(outcome.victims)), dtype=np.int32)  # scratch
    gone = 0
    for r in range(len(records.rows)):
        row = records.rows[r]
        count = state.table[row]  # [ids] 0: not in the cache, negative: in the set
        stack = state.queues[row, 0]  # [capacity] the least recently used first
        size = state.registers[row, 0]
        ids = records.ids[records.offsets[r] : records.offsets[r + 1]]

        hits = 0
        for i in range(len(ids)):
            before = count[ids[i]]
            outcome.hit[i] = before != 0
            hits += before != 0
            count[ids[i]] = -1 - before
        outcome.hits[r] = hits

        rest = 0
        for j in range(size):
            block = stack[j]
            stack[rest] = block
            rest += count[block] > 0
        gone = max(0, rest + len(ids) - capacity)

        old = min(gone, rest)
        size = rest
        if old:
            for j in range(rest):
                counts[j] = count[stack[j]]
            limit, ties = _coldest(counts[:rest], old)
            size = left = 0
            for j in range(rest):
                block = stack[j]
                if counts[j] < limit or (counts[j] == limit and ties > 0):
                    ties -= counts[j] == limit
                    outcome.victims[left] = block
                    left += 1
                    count[block] = 0
                else:
                    stack[size] = block
                    size += 1

        limit, ties = 0, 0
        if gone > old:
            for i in range(len(ids)):
                counts[i] = -count[ids[i]]
            limit, ties = _coldest(counts[: len(ids)], gone - old)
        for i in range(len(ids)):
            block = ids[i]
            reads = -count[block]
            if reads < limit or (reads == limit and ties > 0):
                ties -= reads == limit
                outcome.victims[old] = block
                old += 1
                count[block] = 0
            else:
                stack[size] = block
                size += 1
                count[block] = reads
        state.registers[row, 0] = size
    return gone
