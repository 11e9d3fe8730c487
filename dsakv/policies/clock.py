"""CLOCK, or second chance (Corbató, "A paging experiment with the Multics system", 1968)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dsakv.compiled import compiled
from dsakv.policies.base import Ints, Outcome, Policy, Records, State, close_up

HELD, READ, PINNED = 1, 2, 4


@dataclass(frozen=True)
class Clock(Policy):
    """Blocks stand in a ring; a hit sets the block's bit. To make room a hand goes round: it clears the bits it finds
    and stops at the first block without one, whose place the miss takes.

    A block enters with its bit clear, so it must be read again to earn a second chance. The hand clears the bits of
    pinned blocks too, and passes on. Where a dropped block has left room a miss enters right behind the hand.
    """

    registers: ClassVar[int] = 2  # size; hand

    def run(self, state: State, capacity: int, records: Records, outcome: Outcome) -> int:
        return _run(state, capacity, records, outcome)

    def drop(self, state: State, capacity: int, row: int, ids: Ints) -> None:
        state.table[row, ids] = 0
        queue, (size, hand) = state.queues[row, 0], state.registers[row]
        state.registers[row] = close_up(queue, hand, size, state.table[row]), 0


@compiled
def _run(state: State, capacity: int, records: Records, outcome: Outcome) -> int:
    gone = 0
    for r in range(len(records.rows)):
        row = records.rows[r]
        marks = state.table[row]  # [ids] bits; 0: not in the cache
        ring = state.queues[row, 0]  # [capacity]
        size, hand = state.registers[row, 0], state.registers[row, 1]
        ids = records.ids[records.offsets[r] : records.offsets[r + 1]]

        missed = 0
        for i in range(len(ids)):
            block = ids[i]
            found = marks[block] & HELD
            outcome.hit[i] = found != 0
            outcome.misses[missed] = block
            missed += 1 - found
            marks[block] |= found * (READ | PINNED)
        outcome.hits[r] = len(ids) - missed

        gone = 0
        loose = size + missed - len(ids)  # blocks that are not pinned
        for i in range(missed):
            slot = size
            if size < capacity:
                size += 1
            else:
                pinned = PINNED if loose else 0
                while True:
                    slot = hand
                    hand = hand + 1 if hand + 1 < capacity else 0
                    if marks[ring[slot]] & READ:
                        marks[ring[slot]] ^= READ
                    elif not marks[ring[slot]] & pinned:
                        break
                outcome.victims[gone] = ring[slot]
                gone += 1
                marks[ring[slot]] = 0
                loose = max(0, loose - 1)
            ring[slot] = outcome.misses[i]
            marks[outcome.misses[i]] = HELD | PINNED
        for block in ids:
            marks[block] &= HELD | READ
        state.registers[row, 0] = size
        state.registers[row, 1] = hand
    return gone
