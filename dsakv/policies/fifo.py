"""First in, first out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dsakv.compiled import compiled
from dsakv.policies.base import Ints, Outcome, Policy, Records, State, close_up


@dataclass(frozen=True)
class Fifo(Policy):
    """The block that entered first leaves first; being read changes nothing.

    So nothing is pinned either: a hit may leave in the step that read it. Misses enter in ascending id.
    """

    registers: ClassVar[int] = 2  # size; slot of the oldest

    def run(self, state: State, capacity: int, records: Records, outcome: Outcome) -> int:
        return _run(state, capacity, records, outcome)

    def drop(self, state: State, capacity: int, row: int, ids: Ints) -> None:
        state.table[row, ids] = 0
        queue, (size, oldest) = state.queues[row, 0], state.registers[row]
        state.registers[row] = close_up(queue, oldest, size, state.table[row]), 0


@compiled
def _run(state: State, capacity: int, records: Records, outcome: Outcome) -> int:
    gone = 0
    for r in range(len(records.rows)):
        row = records.rows[r]
        held = state.table[row]  # [ids] 1: in the cache
        ring = state.queues[row, 0]  # [capacity]
        size, oldest = state.registers[row, 0], state.registers[row, 1]
        ids = records.ids[records.offsets[r] : records.offsets[r + 1]]

        missed = 0
        for i in range(len(ids)):
            block = ids[i]
            outcome.hit[i] = held[block] != 0
            outcome.misses[missed] = block
            missed += held[block] == 0
        outcome.hits[r] = len(ids) - missed

        gone = 0
        for i in range(missed):
            block = outcome.misses[i]
            if size < capacity:
                ring[size] = block
                size += 1
            else:
                outcome.victims[gone] = ring[oldest]
                gone += 1
                held[ring[oldest]] = 0
                ring[oldest] = block
                oldest = oldest + 1 if oldest + 1 < capacity else 0
            held[block] = 1
        state.registers[row, 0] = size
        state.registers[row, 1] = oldest
    return gone
