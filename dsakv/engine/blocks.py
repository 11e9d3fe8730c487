"""Which KV blocks exist and whom they belong to."""

from __future__ import annotations


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that ``tokens`` tokens fill, the last one perhaps partly."""
    return -(-tokens // block_size)


class BlockManager:
    """Hands out block ids ``0 .. n_blocks - 1``. A sequence gets all it will ever need when it is admitted.

    So a running sequence never waits for memory and none is ever preempted.
    """

    def __init__(self, n_blocks: int) -> None:
        self._free = list(range(n_blocks))  # ascending

    def allocate(self, count: int) -> list[int] | None:
        """The first ``count`` adjacent free blocks, or else the lowest free ones; None where too few are free.

        Adjacent blocks let the indexer read a sequence's keys in place.
        """
        free = self._free
        if count > len(free):
            return None
        start = 0
        for i in range(len(free)):
            if i and free[i] != free[i - 1] + 1:
                start = i
            if i - start + 1 == count:
                break
        else:
            start = 0
        taken = free[start : start + count]
        del free[start : start + count]
        return taken

    def release(self, blocks: list[int]) -> None:
        self._free = sorted(self._free + blocks)
