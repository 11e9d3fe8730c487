"""Least recently used."""

from __future__ import annotations

from dataclasses import dataclass

from dsakv.compiled import compiled
from dsakv.policies.base import Ints, Outcome, Policy, Records, State


@dataclass(frozen=True)
class Lru(Policy):
    """The set becomes most recent, in ascending id, and the oldest leave.

    A step takes time in proportion to the capacity and the set: it parts the stack into what it read and the rest.
    """

    def run(self, state: State, capacity: int, records: Records, outcome: Outcome) -> int:
        return _run(state, capacity, records, outcome)

    def drop(self, state: State, capacity: int, row: int, ids: Ints) -> None:
        state.table[row, ids] = 0  # a step takes no others from the stack than those that the table knows


@compiled
def _run(state: State, capacity: int, records: Records, outcome: Outcome) -> int:
    gone = 0
    for r in range(len(records.rows)):
        row = records.rows[r]
        held = state.table[row]  # [ids] 1: in the cache, 2: in the set
        stack = state.queues[row, 0]  # [capacity] the oldest first
        size = state.registers[row, 0]
        ids = records.ids[records.offsets[r] : records.offsets[r + 1]]

        hits = 0
        for i in range(len(ids)):
            block = ids[i]
            found = held[block] != 0
            outcome.hit[i] = found
            hits += found
            held[block] = 2
        outcome.hits[r] = hits

        rest = 0
        for j in range(size):
            block = stack[j]
            stack[rest] = block
            rest += held[block] == 1
        gone = max(0, rest + len(ids) - capacity)
        old = min(gone, rest)
        for j in range(old):
            outcome.victims[j] = stack[j]
            held[stack[j]] = 0
        if old:
            for j in range(old, rest):
                stack[j - old] = stack[j]
        size = rest - old

        for i in range(gone - old):
            outcome.victims[old + i] = ids[i]
            held[ids[i]] = 0
        for i in range(gone - old, len(ids)):
            stack[size] = ids[i]
            size += 1
            held[ids[i]] = 1
        state.registers[row, 0] = size
    return gone
