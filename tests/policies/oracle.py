"""Every policy once more, as slowly and plainly as the standard library allows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, OrderedDict, deque
from itertools import combinations


class Oracle(ABC):
    """One cache. ``enter`` may be called only for misses; ``pinned`` is the set, or nothing when only it is left."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.victims: list[int] = []
        self.set: list[int] = []

    def step(self, ids: list[int]) -> tuple[list[bool], list[int]]:
        self.set, self.victims = ids, []
        hit = [block in self.content() for block in ids]
        self.begin([block for block, found in zip(ids, hit, strict=True) if not found])
        for block, found in zip(ids, hit, strict=True):
            if found:
                self.promote(block)
        for block, found in zip(ids, hit, strict=True):
            if not found:
                if len(self.content()) == self.capacity:
                    self.victims.append(self.evict())
                self.enter(block)
        return hit, self.victims

    def pinned(self, block: int) -> bool:
        return block in self.set and not self.lifted

    @property
    def lifted(self) -> bool:
        return set(self.content()) <= set(self.set)

    def begin(self, misses: list[int]) -> None:
        return None

    def promote(self, block: int) -> None:
        return None

    @abstractmethod
    def drop(self, block: int) -> None:
        """May be called for any block, known or not."""

    @abstractmethod
    def content(self) -> list[int]: ...

    @abstractmethod
    def evict(self) -> int: ...

    @abstractmethod
    def enter(self, block: int) -> None: ...


class FifoOracle(Oracle):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.queue: deque[int] = deque()

    def drop(self, block: int) -> None:
        self.queue = deque(other for other in self.queue if other != block)

    def content(self) -> list[int]:
        return list(self.queue)

    def evict(self) -> int:
        return self.queue.popleft()

    def enter(self, block: int) -> None:
        self.queue.append(block)


class LruOracle(Oracle):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.stack: OrderedDict[int, None] = OrderedDict()

    def step(self, ids: list[int]) -> tuple[list[bool], list[int]]:
        hit = [block in self.stack for block in ids]
        for block in ids:
            self.stack[block] = None
            self.stack.move_to_end(block)
        return hit, [self.evict() for _ in range(len(self.stack) - self.capacity)]

    def drop(self, block: int) -> None:
        self.stack.pop(block, None)

    def content(self) -> list[int]:
        return list(self.stack)

    def evict(self) -> int:
        return self.stack.popitem(last=False)[0]

    def enter(self, block: int) -> None:
        raise NotImplementedError


class LfuOracle(Oracle):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.count: Counter[int] = Counter()
        self.last: dict[int, int] = {}
        self.now = 0

    def step(self, ids: list[int]) -> tuple[list[bool], list[int]]:
        self.set, self.now = ids, self.now + 1
        hit = [block in self.count for block in ids]
        self.count.update(ids)
        self.last.update(dict.fromkeys(ids, self.now))
        return hit, [self.evict() for _ in range(len(self.count) - self.capacity)]

    def drop(self, block: int) -> None:
        self.count.pop(block, None)

    def content(self) -> list[int]:
        return list(self.count)

    def evict(self) -> int:
        loose = [block for block in self.count if not self.pinned(block)]
        victim = min(loose, key=lambda block: (self.count[block], self.last[block], block))
        del self.count[victim]
        return victim

    def enter(self, block: int) -> None:
        raise NotImplementedError


class ClockOracle(FifoOracle):
    """The hand is the front of the queue, which turns under it."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.read: set[int] = set()

    def drop(self, block: int) -> None:
        super().drop(block)
        self.read.discard(block)

    def promote(self, block: int) -> None:
        self.read.add(block)

    def evict(self) -> int:
        while self.queue[0] in self.read or self.pinned(self.queue[0]):
            self.read.discard(self.queue[0])
            self.queue.rotate(-1)
        return self.queue.popleft()


class SieveOracle(ClockOracle):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.hand: int | None = None

    def drop(self, block: int) -> None:
        if self.hand == block:
            self.hand = self.after(block)
        super().drop(block)

    def after(self, block: int) -> int | None:
        newer = list(self.queue)[self.queue.index(block) + 1 :]
        return newer[0] if newer else None

    def evict(self) -> int:
        order = list(self.queue)
        at = 0 if self.hand is None else order.index(self.hand)
        while order[at] in self.read or self.pinned(order[at]):
            self.read.discard(order[at])
            at = (at + 1) % len(order)
        self.hand = self.after(order[at])
        self.queue.remove(order[at])
        return order[at]


class S3FifoOracle(Oracle):
    def __init__(self, capacity: int, percent: int = 10) -> None:
        super().__init__(capacity)
        self.share = max(1, capacity * percent // 100)
        self.small: list[int] = []
        self.main: list[int] = []
        self.ghost: list[int] = []
        self.reads: Counter[int] = Counter()
        self.returned: set[int] = set()

    def begin(self, misses: list[int]) -> None:
        self.returned = set(misses) & set(self.ghost)
        self.ghost = [block for block in self.ghost if block not in self.returned]

    def drop(self, block: int) -> None:
        for queue in (self.small, self.main, self.ghost):
            if block in queue:
                queue.remove(block)
        del self.reads[block]

    def promote(self, block: int) -> None:
        self.reads[block] = min(3, self.reads[block] + 1)

    def content(self) -> list[int]:
        return self.small + self.main

    def evict(self) -> int:
        lifted = self.lifted
        loose = set(self.content()) - (set() if lifted else set(self.set))
        while True:
            small = len(self.small) >= self.share or not loose & set(self.main)
            if small and loose & set(self.small):
                block = self.small.pop(0)
                if self.reads[block] > 1:
                    self.reads[block] = 0
                    self.main.append(block)
                elif block not in loose:
                    self.small.append(block)
                else:
                    self.ghost = [*self.ghost, block][-max(1, self.capacity - self.share) :]
                    return block
            else:
                block = self.main.pop(0)
                if self.reads[block] == 0 and block in loose:
                    return block
                self.reads[block] -= self.reads[block] > 0
                self.main.append(block)

    def enter(self, block: int) -> None:
        self.reads[block] = 0
        (self.main if block in self.returned else self.small).append(block)


class SinkRecentOracle(Oracle):
    def __init__(self, capacity: int, sinks: int = 1) -> None:
        super().__init__(capacity)
        self.sinks = min(sinks, capacity)
        self.held: set[int] = set()

    def step(self, ids: list[int]) -> tuple[list[bool], list[int]]:
        hit = [block in self.held for block in ids]
        self.held.update(ids)
        return hit, [self.evict() for _ in range(len(self.held) - self.capacity)]

    def drop(self, block: int) -> None:
        self.held.discard(block)

    def content(self) -> list[int]:
        return list(self.held)

    def evict(self) -> int:
        victim = min(block for block in self.held if block >= self.sinks)
        self.held.remove(victim)
        return victim

    def enter(self, block: int) -> None:
        raise NotImplementedError


ORACLES: dict[str, type[Oracle]] = {
    "fifo": FifoOracle,
    "lru": LruOracle,
    "lfu": LfuOracle,
    "clock": ClockOracle,
    "sieve": SieveOracle,
    "s3fifo": S3FifoOracle,
    "sink_recent": SinkRecentOracle,
}


def gap_hits(sets: list[list[int]], capacity: int) -> list[int]:
    """Hits of each step as OPTgen counts them: by the occupancy of the gaps between steps."""
    last: dict[int, int] = {}
    held = [0] * len(sets)
    hits = []
    for t, ids in enumerate(sets):
        starts = sorted((last[block] for block in ids if block in last), reverse=True)
        hits.append(0)
        for start in starts:
            if max(held[start:t]) < capacity:
                hits[t] += 1
                held[start:t] = [n + 1 for n in held[start:t]]
        last.update(dict.fromkeys(ids, t))
    return hits


def most_hits(sets: list[list[int]], capacity: int) -> list[int]:
    """Most hits up to each step, by trying everything that a cache may keep after every step."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    totals = []
    for ids in sets:
        after: dict[frozenset[int], int] = {}
        for content, hits in best.items():
            hits += len(content.intersection(ids))
            blocks = content.union(ids)
            for kept in combinations(sorted(blocks), min(capacity, len(blocks))):
                after[frozenset(kept)] = max(hits, after.get(frozenset(kept), 0))
        best = after
        totals.append(max(best.values()))
    return totals
