"""What every eviction policy shares: the step model, the arrays of many caches, the one running cache.

A step needs its whole set of blocks at once. Hits count against the cache as it stood when the step began. Then every
block of the set has been read, and the cache keeps at most ``capacity`` of (old content + set); the policy names the
victims, those of either that do not stay. A set larger than the capacity leaves only part of itself. A cache starts
empty and nothing enters it but by being read.

How a policy that was made for one access at a time takes a set, unless its file says otherwise: first the hits are
promoted or marked, in ascending id; then the misses enter, in ascending id, each into room that the policy makes as it
does for a single miss. The set is *pinned* meanwhile: what a step has just needed leaves only when nothing else is
left, and then as the policy orders it. With sets of one block each policy is therefore its textbook self.

A block whose content has ended, as its request has, is *dropped*: it leaves without being evicted, and the policy
forgets it. A full cache has room again afterwards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from dsakv.compiled import compiled

Ints = NDArray[np.int64]
Element = TypeVar("Element", bound=np.generic)


class Records(NamedTuple):
    """Steps of many caches, as arrays: record ``r`` reads ``ids[offsets[r]:offsets[r + 1]]`` in cache ``rows[r]``."""

    rows: Ints
    """[R] which cache; the records of one cache stand in order."""
    offsets: Ints
    """[R + 1]"""
    ids: Ints
    """[T] block ids, small and not negative; ascending and unique within a record."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Checked records, and what arrays must hold to take them."""

    records: Records
    rows: int
    """Largest row + 1."""
    width: int
    """Largest block id + 1."""
    longest: int
    """Blocks in the largest set."""

    @classmethod
    def of(cls, rows: Ints, offsets: Ints, ids: Ints) -> Steps:
        """Check ``rows`` [R], ``offsets`` [R + 1] and ``ids`` [T] once; any number of caches may then take them.

        Raises:
            ValueError: they are not as ``Records`` says.
        """
        if len(offsets) != len(rows) + 1 or offsets[0] != 0 or offsets[-1] != len(ids):
            raise ValueError("offsets must run from 0 to len(ids), one more than there are rows")
        wrong, height, width, longest = _measure(rows, offsets, ids)
        if wrong >= 0:
            raise ValueError(f"record {wrong}: row and ids must not be negative, and ids must ascend")
        return cls(Records(rows, offsets, ids), height, width, longest)


@compiled
def _measure(rows: Ints, offsets: Ints, ids: Ints) -> tuple[int, int, int, int]:
    """First wrong record or -1, largest row + 1, largest id + 1, longest record."""
    height = width = longest = 0
    for r in range(len(rows)):
        begin, end = offsets[r], offsets[r + 1]
        if rows[r] < 0 or end < begin or end > len(ids):
            return r, 0, 0, 0
        fine = True
        before = -1
        for i in range(begin, end):
            fine &= ids[i] > before
            before = ids[i]
        if not fine:
            return r, 0, 0, 0
        height = max(height, rows[r] + 1)
        width = max(width, before + 1)
        longest = max(longest, end - begin)
    return -1, height, width, longest


class State(NamedTuple):
    """Everything that is known of many caches; zeros are an empty cache."""

    table: NDArray[Any]
    """[rows, ids] of the policy's ``cell`` type: what the policy keeps of each block id."""
    queues: NDArray[np.int32]
    """[rows, lanes, slots] block ids in an order; ``slots`` is the capacity, or fewer while fewer ids are known."""
    registers: Ints
    """[rows, registers] sizes, heads, hands."""


class Outcome(NamedTuple):
    """Where a policy writes. ``K`` is at least the largest set."""

    hits: Ints
    """[R] blocks of each record that were in its cache."""
    hit: NDArray[np.bool_]
    """[K] of the last record: each block, whether it was."""
    victims: Ints
    """[K] of the last record: who left, in no order that means anything."""
    misses: Ints
    """[K] scratch."""


@dataclass(frozen=True)
class Policy(ABC):
    """An eviction policy; its fields are its options. A new one is one file here and one line in ``POLICIES``."""

    cell: ClassVar[type[np.uint8 | np.int32]] = np.uint8
    """Type of ``State.table``."""
    lanes: ClassVar[int] = 1
    registers: ClassVar[int] = 1

    @abstractmethod
    def run(self, state: State, capacity: int, records: Records, outcome: Outcome) -> int:
        """Take all ``records`` in one compiled call and return how many victims the last one had.

        ``state`` is large enough and changed in place. ``slots`` may be less than ``capacity`` as long as no cache
        can be full, so a queue must be filled from its beginning until the first eviction.
        """

    @abstractmethod
    def drop(self, state: State, capacity: int, row: int, ids: Ints) -> None:
        """Forget ``ids`` [n] of the cache ``row``, held or not, as if they had never been read.

        ``ids`` ascend and lie within ``state``, which is changed in place: the others keep their order and marks. The
        cache may be full no longer, so queues begin at their beginning again, as :meth:`run` fills them.
        """

    def caches(self, capacity: int) -> Caches:
        """Many empty caches of ``capacity`` blocks each."""
        return Caches(self, capacity)

    def cache(self, capacity: int) -> Cache:
        """One empty cache of ``capacity`` blocks."""
        return Cache(self, capacity)


class Caches:
    """Caches of one policy and capacity: row ``r`` is a cache, a row that was never used is an empty one.

    Rows and block ids come into being by being used; memory grows by doubling, with the largest row times the largest
    id, and is virtual until touched.

    Raises:
        ValueError: ``capacity`` is below 1.
    """

    def __init__(self, policy: Policy, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a cache of {capacity} blocks")
        self.policy = policy
        self.capacity = capacity
        self._state = State(
            np.zeros((0, 0), dtype=policy.cell),
            np.zeros((0, policy.lanes, 0), dtype=np.int32),
            np.zeros((0, policy.registers), dtype=np.int64),
        )

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._state)

    def step(self, steps: Steps) -> Ints:
        """Blocks of each record that were in its cache when the record began, [R]."""
        return self._take(steps)[0].hits

    def _take(self, steps: Steps) -> tuple[Outcome, int]:
        """What the policy wrote, and how many victims the last record had."""
        self._grow(steps.rows, steps.width)
        outcome = Outcome(
            np.zeros(len(steps.records.rows), dtype=np.int64),
            np.zeros(steps.longest, dtype=np.bool_),
            np.zeros(steps.longest, dtype=np.int64),
            np.zeros(steps.longest, dtype=np.int64),
        )
        return outcome, self.policy.run(self._state, self.capacity, steps.records, outcome)

    def drop(self, row: int, ids: Ints) -> None:
        """Take ``ids`` [n], ascending, out of the cache ``row``, because what they held has ended.

        It is as if they had never been read; those that are not in the cache, or never were, may be among them.
        Everything else stays as it is, and a hand that stood at one of them stands at the one it would have come to.

        Raises:
            ValueError: ``row`` or ``ids`` are negative, or ``ids`` do not ascend.
        """
        Steps.of(np.array([row]), np.array([0, len(ids)]), ids)
        height, width = self._state.table.shape
        if row < height:
            self.policy.drop(self._state, self.capacity, row, ids[: np.searchsorted(ids, width)])

    def clear(self, rows: Ints) -> None:
        """Empty the caches ``rows`` [n], so that others may use these rows."""
        used = rows[rows < len(self._state.table)]
        for array in self._state:
            array[used] = 0

    def _grow(self, rows: int, width: int) -> None:
        height, before = self._state.table.shape
        height, width = doubled(height, rows), doubled(before, width)
        slots = min(self.capacity, width)
        table, queues, registers = self._state
        self._state = State(
            enlarged(table, (height, width)),
            enlarged(queues, (height, self.policy.lanes, slots)),
            enlarged(registers, (height, self.policy.registers)),
        )


class Cache:
    """One running cache."""

    def __init__(self, policy: Policy, capacity: int) -> None:
        self._caches = Caches(policy, capacity)
        self._row = np.zeros(1, dtype=np.int64)

    def step(self, ids: Ints) -> tuple[NDArray[np.bool_], Ints]:
        """Read the set ``ids`` [k], ascending: which of it were in the cache [k], and which blocks leave [v],
        in no order that means anything.

        Afterwards the cache holds what it held, and the set, without the victims.

        Raises:
            ValueError: ``ids`` are negative or do not ascend.
        """
        outcome, gone = self._caches._take(Steps.of(self._row, np.array([0, len(ids)]), ids))
        return outcome.hit, outcome.victims[:gone]

    def drop(self, ids: Ints) -> None:
        """Take ``ids`` [n], ascending, out of the cache, as :meth:`Caches.drop` does.

        Raises:
            ValueError: ``ids`` are negative or do not ascend.
        """
        self._caches.drop(0, ids)

    def clear(self) -> None:
        """Forget everything."""
        self._caches.clear(self._row)


@compiled
def close_up(ring: NDArray[np.int32], first: int, size: int, table: NDArray[Any]) -> int:
    """Of the ``size`` blocks from slot ``first`` of ``ring`` [slots] on, those that ``table`` [ids] still knows move to
    the beginning, in their order; how many they are."""
    before = ring.copy()
    kept = 0
    for j in range(size):
        block = before[(first + j) % len(before)]
        ring[kept] = block
        kept += table[block] != 0
    return kept


def doubled(size: int, needed: int) -> int:
    """``size`` while it is enough, else the power of two that is."""
    return size if needed <= size else 1 << (needed - 1).bit_length()


def enlarged(array: NDArray[Element], shape: tuple[int, ...]) -> NDArray[Element]:
    """``array`` with zeros behind each axis, or itself where its shape is ``shape``."""
    if array.shape == shape:
        return array
    larger: NDArray[Element] = np.zeros(shape, dtype=array.dtype)
    larger[tuple(slice(n) for n in array.shape)] = array
    return larger
