"""Exact LRU hit rates for all capacities from one pass.

LRU needs no cache to be simulated (Mattson et al., "Evaluation techniques for storage hierarchies", 1970): the blocks
in order of their last access are the contents of an LRU cache of every capacity at once, so the number of blocks
accessed more recently than one, its stack distance, says which capacities hold it.

Each access takes the next *slot*, a step's set in ascending id. What the step before touched has the newest slots, one
after the other, so the distance of most blocks is a subtraction. The slots of the older blocks are bits; how many lie
above one is a sum over words. When slots run out they are numbered anew without the gaps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsakv.analysis.rows import Grid
from dsakv.compiled import compiled

STEP, SEQUENTIAL = 0, 1
"""Rows of a histogram, see :class:`LruStacks`."""

_SLOTS = 8
"""Slots for each block of the width: the more, the rarer they run out."""
_WORD = 64
_FEW = 512
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_SCALARS = 4  # slots used, first slot of the last step, its blocks, older blocks


class LruStacks:
    """The LRU stacks of many caches, and the histogram of distances of each.

    ``step``: a step needs its whole set at once, so its distances are those from before it began. ``sequential``: one
    access after the other in ascending id. Memory: 25 bytes for each id of a live cache.
    """

    def __init__(self) -> None:
        self._ids = Grid(slot=np.int32, previous=np.uint32)  # slot: one more than the last access's; 0 for a new id
        self._histogram = np.zeros((0, 2, 0), dtype=np.int64)  # [rows, modes, width]: accesses by distance
        self._bits = np.zeros((0, 0), dtype=np.uint64)  # [rows, words]: slots of older blocks
        self._scalars = np.zeros((0, _SCALARS), dtype=np.int64)
        self._cold = np.zeros(0, dtype=np.int64)

    def access(self, rows: NDArray[np.int64], offsets: NDArray[np.int64], ids: NDArray[np.int32], width: int) -> None:
        """Steps of caches, [R] each with its set ``ids[offsets[r]:offsets[r + 1]]``, ascending and below ``width``."""
        self._reserve(int(rows.max()) + 1, width)
        _access(
            rows,
            offsets,
            ids.view(np.uint32),
            self._ids["slot"],
            self._ids["previous"],
            self._bits,
            self._scalars,
            self._histogram,
            self._cold,
        )

    def take(self, row: int) -> tuple[NDArray[np.int64], int]:
        """The histogram [2, n] of a cache that has ended, and its first accesses; the row starts anew."""
        if row >= len(self._cold):
            return np.zeros((2, 0), dtype=np.int64), 0
        histogram, cold = self._histogram[row].copy(), int(self._cold[row])
        self._ids.clear(row)
        for array in (self._histogram, self._bits, self._scalars, self._cold):
            array[row] = 0
        return histogram, cold

    def _reserve(self, rows: int, width: int) -> None:
        had = self._ids.rows
        if not self._ids.reserve(rows, width):
            return
        rows, width = self._ids.rows, self._ids.width
        histogram = np.zeros((rows, 2, width), dtype=np.int64)
        histogram[:had, :, : self._histogram.shape[2]] = self._histogram
        bits = np.zeros((rows, _SLOTS * width // _WORD), dtype=np.uint64)
        scalars, cold = np.zeros((rows, _SCALARS), dtype=np.int64), np.zeros(rows, dtype=np.int64)
        scalars[:had], cold[:had] = self._scalars, self._cold
        for row in range(had):
            _renumber(self._ids["slot"][row], self._bits[row], bits[row], scalars[row])
        self._histogram, self._bits, self._scalars, self._cold = histogram, bits, scalars, cold


@compiled
def _count_bits(word: np.uint64) -> np.int64:
    """Set bits, in the form that compilers make one instruction of."""
    word -= (word >> np.uint64(1)) & np.uint64(0x5555555555555555)
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@compiled
def _count_words(bits: NDArray[np.uint64], below: NDArray[np.int32]) -> None:
    """Set bits in the words before each, into ``below``."""
    count = np.int32(0)
    for word in range(len(bits)):
        below[word] = count
        count += np.int32(_count_bits(bits[word]))


@compiled
def _upto(bits: NDArray[np.uint64], below: NDArray[np.int32], slot: int) -> np.int64:
    """Set bits up to and with that of ``slot``."""
    word = slot // _WORD
    return np.int64(below[word]) + _count_bits(bits[word] & (_ALL >> np.uint64(_WORD - 1 - slot % _WORD)))


@compiled
def _count_moved(slots: NDArray[np.int32], moved: NDArray[np.int32]) -> None:
    """For each slot how many of those before it are greater: by looking, or for many in a Fenwick tree over ranks."""
    n = len(slots)
    if n <= _FEW:
        for i in range(n):
            count = np.int32(0)
            for j in range(i):
                count += np.int32(slots[j] > slots[i])
            moved[i] = count
        return
    rank = np.empty(n, dtype=np.int64)
    rank[np.argsort(slots)] = np.arange(1, n + 1)
    tree = np.zeros(n + 1, dtype=np.int32)
    for i in range(n):
        smaller, node = 0, rank[i]
        while node:
            smaller += tree[node]
            node &= node - 1
        moved[i] = i - smaller
        node = rank[i]
        while node <= n:
            tree[node] += 1
            node += node & -node


@compiled
def _flip(bits: NDArray[np.uint64], slot: int) -> None:
    bits[slot // _WORD] ^= np.uint64(1) << np.uint64(slot % _WORD)


@compiled
def _renumber(
    slots: NDArray[np.int32],  # [width]
    old_bits: NDArray[np.uint64],  # [old words]
    bits: NDArray[np.uint64],  # [words]; may be the old ones
    scalars: NDArray[np.int64],  # [4]
) -> None:
    """Give the blocks the lowest slots in the order that they have."""
    first, size, older = scalars[1], scalars[2], scalars[3]
    below = np.empty(len(old_bits), dtype=np.int32)
    _count_words(old_bits, below)
    for block in range(len(slots)):
        slot = slots[block] - 1
        if slot >= first:
            slots[block] += older - first if slot >= 0 else 0
        elif slot >= 0:
            slots[block] = _upto(old_bits, below, slot)
    for word in range(len(bits)):
        full = min(max(older - word * _WORD, 0), _WORD)
        bits[word] = _ALL >> np.uint64(_WORD - full) if full else np.uint64(0)
    scalars[0], scalars[1] = older + size, older


@compiled
def _access(
    rows: NDArray[np.int64],  # [R]
    offsets: NDArray[np.int64],  # [R + 1]
    ids: NDArray[np.uint32],  # [T]
    all_slots: NDArray[np.int32],  # [rows, width]
    all_previous: NDArray[np.uint32],  # [rows, width]: ids of the last step
    all_bits: NDArray[np.uint64],  # [rows, words]
    all_scalars: NDArray[np.int64],  # [rows, 4]
    histogram: NDArray[np.int64],  # [rows, 2, width]
    cold: NDArray[np.int64],  # [rows]
) -> None:
    below = np.empty(all_bits.shape[1], dtype=np.int32)
    old_slot = np.empty(all_slots.shape[1], dtype=np.int32)  # of the older blocks in the step
    old_top = np.empty(all_slots.shape[1], dtype=np.int32)  # blocks of the last two steps above each when it moves
    moved = np.empty(all_slots.shape[1], dtype=np.int32)  # older blocks above each that the step has moved before it
    for r in range(len(rows)):
        row = rows[r]
        slots, previous, bits, scalars = all_slots[row], all_previous[row], all_bits[row], all_scalars[row]
        step, sequential = histogram[row, STEP], histogram[row, SEQUENTIAL]
        begin, count = offsets[r], offsets[r + 1] - offsets[r]
        if scalars[0] + count > len(bits) * _WORD:
            _renumber(slots, bits, bits, scalars)
        used, first, size, older = scalars[0], scalars[1], scalars[2], scalars[3]

        # An example: a step reads 3 5 8 at slots 10 11 12, the next one 3 4 8. Before it, 8 has distance 0 and 3
        # distance 2. One after the other, 3 still has 2; then 4 comes on top, and 3 went there too, so 8 has 2. In
        # general a block of the last step lies below the later ids of that step that have not moved yet, all of them
        # since ids ascend, and below the ``done`` blocks of this step.
        old, kept, new = 0, 0, 0
        same, times = 0, 0  # a run of equal distances
        for done in range(count):
            block = ids[begin + done]
            slot = slots[block] - 1
            slots[block] = used + done + 1
            if slot >= first and slot >= 0:
                distance = used - 1 - slot
                step[np.uint64(distance)] += 1
                kept += 1
                if done + distance != same:
                    sequential[same] += times
                    same, times = done + distance, 0
                times += 1
            elif slot >= 0:
                old_slot[old], old_top[old] = slot, done + size - kept
                old += 1
            else:
                new += 1
        sequential[same] += times
        cold[row] += new

        if old:
            _count_words(bits, below)
            _count_moved(old_slot[:old], moved)
        for i in range(old):
            above = older - _upto(bits, below, old_slot[i])
            step[size + above] += 1
            sequential[old_top[i] + above - moved[i]] += 1
        for i in range(old):
            _flip(bits, old_slot[i])
        for p in range(size if kept < size else 0):
            slot = slots[previous[p]] - 1
            if slot < used:  # not in this step: it becomes an older one
                _flip(bits, slot)
        previous[:count] = ids[begin : begin + count]
        scalars[0], scalars[1], scalars[2], scalars[3] = used + count, used, count, older - old + size - kept
