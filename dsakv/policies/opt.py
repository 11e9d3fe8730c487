"""OPT: no eviction policy has more hits, since this one knows the future.

A block that is read at steps ``a < t`` of its cache, and not between, hits at ``t`` if the cache holds it all the time,
that is in each of the gaps between the steps ``a .. t``; in a gap it holds at most ``capacity`` blocks. So a hit is an
interval, a cache is ``capacity`` machines, and OPT is the largest number of intervals that they can take. Taking the
intervals by their end, each where the latest machine that is free by its start was last busy, is optimal (Faigle and
Nawijn, "Note on scheduling intervals on-line", 1995; Carlisle and Lloyd, "On the k-coloring of intervals", 1995). It
counts what OPTgen counts (Jain and Lin, "Back to the future", ISCA 2016) without a history of occupancy: what must be
known of a cache is when its machines become free, at most ``capacity`` numbers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsakv.compiled import compiled
from dsakv.policies.base import Ints, Records, Steps, doubled, enlarged


class Opt:
    """The bound for caches of several ``capacities`` at once; rows as in ``Caches``.

    A step takes time in proportion to its set and, for each capacity, to the steps whose blocks are still held, at
    most the capacity. Memory is 4 bytes for each row and block id and, for each row and capacity, 8 bytes times the
    most such steps so far of any row.

    Raises:
        ValueError: a capacity is below 1.
    """

    def __init__(self, capacities: tuple[int, ...]) -> None:
        if min(capacities, default=1) < 1:
            raise ValueError(f"a cache of {min(capacities)} blocks")
        self._capacities = np.array(capacities, dtype=np.int64)
        self._last: NDArray[np.int32] = np.zeros((0, 0), dtype=np.int32)
        """[rows, ids] the step, from 1, that read the block last; 0 for none."""
        self._now: Ints = np.zeros(0, dtype=np.int64)
        """[rows] steps so far."""
        self._free: NDArray[np.int32] = np.zeros((0, len(capacities), 0, 2), dtype=np.int32)
        """[rows, C, n, 2] since which step machines are free, and how many, by step."""
        self._depth: Ints = np.zeros((0, len(capacities)), dtype=np.int64)
        """[rows, C] of ``n``, how many are in use."""

    @property
    def nbytes(self) -> int:
        return self._last.nbytes + self._now.nbytes + self._free.nbytes + self._depth.nbytes

    def step(self, steps: Steps) -> Ints:
        """Blocks of each record that its cache could hold since they were last read, [R, C]."""
        hits = np.zeros((len(steps.records.rows), len(self._capacities)), dtype=np.int64)
        scratch = np.zeros(steps.longest, dtype=np.int64)
        self._grow(steps.rows, steps.width)
        done = 0
        while True:
            done = _run(
                self._last, self._now, self._free, self._depth, self._capacities, steps.records, scratch, hits, done
            )
            if done == len(hits):
                return hits
            rows, count, slots, _ = self._free.shape
            self._free = enlarged(self._free, (rows, count, doubled(slots, slots + 2), 2))

    def clear(self, rows: Ints) -> None:
        """Empty the caches ``rows`` [n], so that others may use these rows."""
        used = rows[rows < len(self._now)]
        for array in (self._last, self._now, self._depth):
            array[used] = 0

    def _grow(self, rows: int, width: int) -> None:
        height, before = self._last.shape
        height = doubled(height, rows)
        self._last = enlarged(self._last, (height, doubled(before, width)))
        self._now = enlarged(self._now, (height,))
        self._free = enlarged(self._free, (height, *self._free.shape[1:]))
        self._depth = enlarged(self._depth, (height, self._depth.shape[1]))


@compiled
def _run(
    last: NDArray[np.int32],
    now: Ints,
    free: NDArray[np.int32],
    depth: Ints,
    capacities: Ints,
    records: Records,
    starts: Ints,
    hits: Ints,
    done: int,
) -> int:
    """Take ``records`` from ``done`` on, up to the first for which ``free`` is too small; returns which that is."""
    for r in range(done, len(records.rows)):
        row = records.rows[r]
        for c in range(len(capacities)):
            if depth[row, c] + 2 > free.shape[2]:  # one for the machines never used, one for those of this step
                return r
        now[row] += 1
        step = now[row]
        seen = last[row]

        # Most blocks were read in the step before: those are counted, the other starts sorted.
        recent = older = 0
        for i in range(records.offsets[r], records.offsets[r + 1]):
            block = records.ids[i]
            start = seen[block]
            seen[block] = step
            starts[older] = start
            recent += start == step - 1
            older += start > 0 and start < step - 1
        recent = recent if step > 1 else 0
        starts[:older].sort()

        for c in range(len(capacities)):
            machines = free[row, c]
            size = depth[row, c]
            if size == 0:
                machines[0, 0] = 0
                machines[0, 1] = capacities[c]
                size = 1
            hits[r, c] = 0
            # Starts from the latest down, and with them the machines, which lie by the time since when they are free.
            at = size - 1
            lowest = size  # machines from here up were looked at; some are used up
            start, wanted, next_start = step - 1, recent, older - 1
            while True:
                while wanted > 0 and at >= 0:
                    if machines[at, 0] > start:
                        at -= 1
                        continue
                    lowest = min(lowest, at)
                    taken = min(wanted, machines[at, 1])
                    machines[at, 1] -= taken
                    wanted -= taken
                    hits[r, c] += taken
                    if machines[at, 1] == 0:
                        at -= 1
                if next_start < 0 or at < 0:
                    break
                start = starts[next_start]
                wanted = 0
                while next_start >= 0 and starts[next_start] == start:
                    wanted += 1
                    next_start -= 1
            kept = lowest
            for j in range(lowest, size):
                machines[kept, 0] = machines[j, 0]
                machines[kept, 1] = machines[j, 1]
                kept += machines[j, 1] > 0
            if hits[r, c] > 0:
                machines[kept, 0] = step
                machines[kept, 1] = hits[r, c]
                kept += 1
            depth[row, c] = kept
    return len(records.rows)
