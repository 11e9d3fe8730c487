"""Which KV blocks exist, who holds them, and which hold a prefix that others can use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that ``tokens`` tokens fill, the last one perhaps partly."""
    return -(-tokens // block_size)


class BlockManager:
    """Hands out block ids ``0 .. n_blocks - 1``. A sequence gets all it will ever need when it is admitted.

    So a running sequence never waits for memory and none is ever preempted. A block that was published under the
    hash of its prefix may have several holders. It keeps its content when the last one lets go of it, until its
    room is needed: blocks without content go first, then the least recently used.
    """

    def __init__(self, n_blocks: int) -> None:
        self._blank = list(range(n_blocks))  # ascending
        self._holders = [0] * n_blocks
        self._published: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._idle: dict[int, None] = {}  # published blocks without holder, least recently used first

    def cached(self, hashes: Iterable[bytes]) -> list[int]:
        """The published blocks of a prefix, up to the first that is missing."""
        found: list[int] = []
        for prefix in hashes:
            block = self._published.get(prefix)
            if block is None:
                break
            found.append(block)
        return found

    def allocate(self, count: int, shared: Sequence[int] = ()) -> list[int] | None:
        """``shared`` blocks, as :meth:`cached` found them, and ``count - len(shared)`` blocks of one's own behind them.

        None, and nothing is taken, where too few are free.
        """
        own = count - len(shared)
        idle_shared = sum(block in self._idle for block in shared)
        if own > len(self._blank) + len(self._idle) - idle_shared:
            return None
        for block in shared:
            self._holders[block] += 1
            self._idle.pop(block, None)
        taken = self._take_blank(min(own, len(self._blank)))
        while len(taken) < own:
            taken.append(self._evict())
        for block in taken:
            self._holders[block] = 1
        return [*shared, *taken]

    def publish(self, block: int, prefix: bytes) -> None:
        """Let others use a block that holds this prefix's last tokens. A second block of one content stays private."""
        if prefix not in self._published:
            self._published[prefix] = block
            self._hash_of[block] = prefix

    def release(self, blocks: list[int]) -> tuple[list[int], list[int]]:
        """Let go of a sequence's blocks. Its last ones are evicted before its first ones, which more prompts share.

        Returns those that nobody holds any more: without content, and published.
        """
        blank, idle = [], []
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._hash_of:
                self._idle[block] = None
                idle.append(block)
            else:
                blank.append(block)
        self._blank = sorted(self._blank + blank)
        return blank, idle

    def _take_blank(self, count: int) -> list[int]:
        """The first ``count`` adjacent blank blocks, or else the lowest: adjacent ones are read in place."""
        blank = self._blank
        start = 0
        for i in range(len(blank)):
            if i and blank[i] != blank[i - 1] + 1:
                start = i
            if i - start + 1 == count:
                break
        else:
            start = 0
        taken = blank[start : start + count]
        del blank[start : start + count]
        return taken

    def _evict(self) -> int:
        block = next(iter(self._idle))
        del self._idle[block]
        del self._published[self._hash_of.pop(block)]
        return block
