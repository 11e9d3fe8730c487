"""Attention sinks and the recent window (Xiao et al., "Efficient streaming language models with attention sinks",
ICLR 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dsakv.compiled import compiled
from dsakv.policies.base import Ints, Outcome, Policy, Records, State


@dataclass(frozen=True)
class SinkRecent(Policy):
    """Of what was read, the first ``sinks`` block ids stay, and else the highest ids: the lowest other id leaves.

    Where there are more sinks than capacity, the first ``capacity`` ids are the sinks. Nothing is pinned: an old block
    that was just read is not in the window. StreamingLLM's four tokens lie in the first block.

    No queue is needed: in a full cache the lowest id that is not a sink only ever rises, so a cursor finds it.
    """

    lanes: ClassVar[int] = 0
    registers: ClassVar[int] = 2  # size; an id at or below the lowest that is no sink (0: nowhere yet)

    sinks: int = 1

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"{self.sinks} sinks")

    def run(self, state: State, capacity: int, records: Records, outcome: Outcome) -> int:
        return _run(state, capacity, min(self.sinks, capacity), records, outcome)

    def drop(self, state: State, capacity: int, row: int, ids: Ints) -> None:
        state.registers[row, 0] -= np.count_nonzero(state.table[row, ids])
        state.table[row, ids] = 0


@compiled
def _run(state: State, capacity: int, sinks: int, records: Records, outcome: Outcome) -> int:
    gone = 0
    for r in range(len(records.rows)):
        row = records.rows[r]
        held = state.table[row]  # [ids] 1: in the cache
        size, lowest = state.registers[row, 0], state.registers[row, 1]
        ids = records.ids[records.offsets[r] : records.offsets[r + 1]]

        missed = 0
        for i in range(len(ids)):
            block = ids[i]
            outcome.hit[i] = held[block] != 0
            outcome.misses[missed] = block
            missed += held[block] == 0
            held[block] = 1
        outcome.hits[r] = len(ids) - missed
        size += missed

        floor = lowest  # below it there are only sinks and this step's misses
        below = 0
        while below < missed and outcome.misses[below] < sinks:
            below += 1
        gone = 0
        while size > capacity:
            if below < missed and outcome.misses[below] < floor:
                victim = outcome.misses[below]
                below += 1
            else:
                while lowest < sinks or held[lowest] == 0:
                    lowest += 1
                victim = lowest
            held[victim] = 0
            outcome.victims[gone] = victim
            gone += 1
            size -= 1
        if below < missed and outcome.misses[below] < floor:
            lowest = outcome.misses[below]
        state.registers[row, 0] = size
        state.registers[row, 1] = lowest
    return gone
