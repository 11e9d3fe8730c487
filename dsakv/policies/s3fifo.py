"""S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dsakv.compiled import compiled
from dsakv.policies.base import Ints, Outcome, Policy, Records, State, close_up

SMALL, MAIN, GHOST, WHERE = 1, 2, 3, 3
READ, READS = 4, 12  # reads since it entered its queue, at most 3
PINNED = 16


@dataclass(frozen=True)
class S3Fifo(Policy):
    """A small queue, in which a new block must be read twice more to move to the main queue; a ghost queue of the ids
    of those that were not, which enter the main queue when they come back in time.

    The small queue's share is ``max(1, capacity * small_percent // 100)`` blocks, the main queue's the rest, and
    the ghost queue has as many ids as the main queue's share, at least 1. Room is made by one eviction: from the
    small queue while it has its share or more, else from the main queue. The small queue's oldest block moves to
    the main queue if it was read more than once since it entered, which clears its count and may turn the eviction
    to the main queue; else it leaves and becomes a ghost. The main queue's oldest goes round again, with one read
    less, until one has none; it leaves without a trace. With a capacity of 1 there is no main share, and a block
    that moves there leaves.

    Sets: ghosts are looked up when the step begins, as hits are. A pinned block that would leave goes round in its
    own queue, and a queue of pinned blocks alone is passed over. A step takes time in proportion to the set, to what
    goes round, and to the ghosts where one of them comes back.
    """

    lanes: ClassVar[int] = 3  # small, main, ghost
    registers: ClassVar[int] = 6  # of each the slot of the oldest, and the size

    small_percent: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.small_percent <= 100:
            raise ValueError(f"a small queue of {self.small_percent}% of the cache")

    def run(self, state: State, capacity: int, records: Records, outcome: Outcome) -> int:
        return _run(state, capacity, *self._shares(capacity), records, outcome)

    def drop(self, state: State, capacity: int, row: int, ids: Ints) -> None:
        state.table[row, ids] = 0
        _, ghosts = self._shares(capacity)
        registers = state.registers[row].reshape(self.lanes, 2)
        for lane, slots in enumerate((capacity, capacity, ghosts)):
            first, size = registers[lane]
            registers[lane] = 0, close_up(state.queues[row, lane, :slots], first, size, state.table[row])

    def _shares(self, capacity: int) -> tuple[int, int]:
        """Blocks of the small queue, ids of the ghost queue."""
        share = max(1, capacity * self.small_percent // 100)
        return share, max(1, capacity - share)


@compiled
def _run(state: State, capacity: int, share: int, ghosts: int, records: Records, outcome: Outcome) -> int:
    gone = 0
    for r in range(len(records.rows)):
        row = records.rows[r]
        marks = state.table[row]  # [ids] queue, reads, pin
        small, main, ghost = state.queues[row, 0], state.queues[row, 1], state.queues[row, 2]  # rings [capacity]
        registers = state.registers[row]
        small_at, small_size, main_at, main_size = registers[0], registers[1], registers[2], registers[3]
        ghost_at, ghost_size = registers[4], registers[5]
        ids = records.ids[records.offsets[r] : records.offsets[r + 1]]

        missed = returned = 0
        loose_small, loose_main = small_size, main_size  # blocks that are not pinned
        for i in range(len(ids)):
            block = ids[i]
            where = marks[block] & WHERE
            found = where in (SMALL, MAIN)
            outcome.hit[i] = found
            if found:
                loose_small -= where == SMALL
                loose_main -= where == MAIN
                marks[block] = min(marks[block] + READ, where + READS) | PINNED
            else:
                returned += where == GHOST
                marks[block] |= PINNED
                outcome.misses[missed] = block
                missed += 1
        outcome.hits[r] = len(ids) - missed

        if returned:
            kept = 0
            for j in range(ghost_size):
                block = ghost[(ghost_at + j) % ghosts]
                ghost[(ghost_at + kept) % ghosts] = block
                kept += marks[block] & PINNED == 0
            ghost_size = kept

        gone = 0
        pinned = PINNED
        for i in range(missed):
            full = small_size + main_size == capacity
            while full:
                if loose_small + loose_main == 0:
                    pinned, loose_small, loose_main = 0, small_size, main_size
                if loose_small > 0 and (small_size >= share or loose_main == 0):
                    block = small[small_at]
                    small_at = small_at + 1 if small_at + 1 < capacity else 0
                    small_size -= 1
                    if marks[block] & READS > READ:
                        main[(main_at + main_size) % capacity] = block
                        main_size += 1
                        if marks[block] & pinned == 0:
                            loose_small -= 1
                            loose_main += 1
                        marks[block] = MAIN | marks[block] & PINNED
                    elif marks[block] & pinned:
                        small[(small_at + small_size) % capacity] = block
                        small_size += 1
                    else:
                        outcome.victims[gone] = block
                        loose_small -= 1
                        marks[block] = GHOST
                        if ghost_size == ghosts:
                            marks[ghost[ghost_at]] = 0
                            ghost_at = ghost_at + 1 if ghost_at + 1 < ghosts else 0
                            ghost_size -= 1
                        ghost[(ghost_at + ghost_size) % ghosts] = block
                        ghost_size += 1
                        full = False
                else:
                    block = main[main_at]
                    main_at = main_at + 1 if main_at + 1 < capacity else 0
                    main_size -= 1
                    if marks[block] & (READS | pinned):
                        marks[block] -= READ if marks[block] & READS else 0
                        main[(main_at + main_size) % capacity] = block
                        main_size += 1
                    else:
                        outcome.victims[gone] = block
                        loose_main -= 1
                        marks[block] = 0
                        full = False
                gone += not full
            block = outcome.misses[i]
            if marks[block] & WHERE == GHOST:
                main[(main_at + main_size) % capacity] = block
                main_size += 1
                loose_main += pinned == 0
                marks[block] = MAIN | PINNED
            else:
                small[(small_at + small_size) % capacity] = block
                small_size += 1
                loose_small += pinned == 0
                marks[block] = SMALL | PINNED
        for block in ids:
            marks[block] &= WHERE | READS
        registers[0], registers[1], registers[2], registers[3] = small_at, small_size, main_at, main_size
        registers[4], registers[5] = ghost_at, ghost_size
    return gone
