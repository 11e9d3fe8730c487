"""SIEVE (Zhang et al., "SIEVE is simpler than LRU", NSDI 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dsakv.compiled import compiled
from dsakv.policies.base import Ints, Outcome, Policy, Records, State

HELD, READ, PINNED = 1, 2, 4


@dataclass(frozen=True)
class Sieve(Policy):
    """Blocks stand in the order in which they entered; a hit sets the block's bit. To make room a hand goes from the
    oldest to the newest and round again: it clears the bits it finds and evicts the first block without one.

    Other than in CLOCK survivors keep their place and the miss becomes the newest. A block enters with its bit clear.
    The hand clears the bits of pinned blocks too, and passes on.
    """

    lanes: ClassVar[int] = 2
    registers: ClassVar[int] = 3  # size; slots in use, holes included; hand

    def run(self, state: State, capacity: int, records: Records, outcome: Outcome) -> int:
        return _run(state, capacity, records, outcome)

    def drop(self, state: State, capacity: int, row: int, ids: Ints) -> None:
        state.table[row, ids] = 0
        _, used, hand = state.registers[row]
        size, hand = _close_up(state.queues[row].reshape(-1), used, hand, state.table[row])
        state.registers[row] = size, size, hand


@compiled
def _close_up(queue: NDArray[np.int32], used: int, hand: int, marks: NDArray[np.uint8]) -> tuple[int, int]:
    """Move the blocks in the first ``used`` slots that ``marks`` [ids] still knows to the beginning, in their order;
    how many they are, and the slot of the first one that ``hand`` would have come to."""
    kept = moved = 0
    for j in range(used):
        if j == hand:
            moved = kept
        block = queue[j]
        queue[kept] = block
        kept += block >= 0 and marks[block] != 0
    return kept, moved if moved < kept else 0


@compiled
def _run(state: State, capacity: int, records: Records, outcome: Outcome) -> int:
    gone = 0
    for r in range(len(records.rows)):
        row = records.rows[r]
        marks = state.table[row]  # [ids] bits; 0: not in the cache
        queue = state.queues[row].reshape(-1)  # [2 * capacity] the oldest first; -1 is a hole, never the last
        size, used, hand = state.registers[row, 0], state.registers[row, 1], state.registers[row, 2]
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
            if size < capacity:
                size += 1
            else:
                pinned = PINNED if loose else 0
                while True:
                    old = queue[hand]
                    slot = hand
                    hand = hand + 1 if hand + 1 < used else 0
                    if old >= 0:
                        if marks[old] & READ:
                            marks[old] ^= READ
                        elif not marks[old] & pinned:
                            break
                outcome.victims[gone] = old
                gone += 1
                marks[old] = 0
                queue[slot] = -1
                loose = max(0, loose - 1)
                if used == len(queue):  # close the holes, of which there are more than half
                    used, hand = _close_up(queue, used, hand, marks)
            queue[used] = outcome.misses[i]
            used += 1
            marks[outcome.misses[i]] = HELD | PINNED
        for block in ids:
            marks[block] &= HELD | READ
        state.registers[row, 0] = size
        state.registers[row, 1] = used
        state.registers[row, 2] = hand
    return gone
