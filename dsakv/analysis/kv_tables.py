"""Block tables of running requests for blocks of any size, by the numbers that a cache knows blocks by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsakv.analysis.kv_facts import LARGEST_ID, KvFacts, RequestKv
from dsakv.analysis.rows import Grid
from dsakv.errors import InputError
from dsakv.policies.base import Ints, doubled, enlarged


class BlockTables:
    """Which block holds a token of a request.

    At the run's own block size blocks have the ids that they had there. At another one they are numbered from 0, the
    least free numbers first: two requests share a block where all of the run's own blocks under it are the same in
    both, which they only are where they hold a prefix that both have. A request whose table is not known shares
    nothing. Numbers are used again once no running request holds their block.
    """

    def __init__(self, facts: KvFacts, block_size: int) -> None:
        self.block_size = block_size
        self._own_size = facts.block_size or block_size
        self._physical = block_size == self._own_size
        self._first = facts.first_free_id if self._physical else 0  # numbers given here begin behind those of tables
        self._grid = Grid(id=np.int32)
        self._height = 0  # rows ever used
        self._free: list[int] = []  # rows
        self._rows: dict[int, int] = {}  # by request
        self._length: dict[int, int] = {}  # blocks, by request
        self._own: dict[int, Ints] = {}  # the run's own blocks, by request
        self._holders = np.zeros(0, dtype=np.int32)  # by number
        self._own_holders = np.zeros(0, dtype=np.int32)  # by the run's own id

    @property
    def grid(self) -> NDArray[Any]:
        """[rows, blocks] int32; rows and columns that are not in use hold anything."""
        return self._grid["id"]

    @property
    def width(self) -> int:
        """Above every number given so far."""
        return len(self._holders)

    def row(self, request: int) -> int:
        return self._rows[request]

    def blocks(self, request: int, tokens: int) -> Ints:
        """The full blocks among the first ``tokens`` tokens, in their order."""
        ids: Ints = self.grid[self._rows[request], : tokens // self.block_size].astype(np.int64)
        return ids

    def begin(self, request: int, facts: RequestKv | None, tokens: int) -> None:
        """Give ``request`` its table, of all that it will ever compute where that is known, else for ``tokens``."""
        row = self._row_for(request)
        self._length[request] = 0
        if facts is None or facts.runs is None:
            self.extend(request, tokens if facts is None else facts.tokens)
            return
        own = _expanded(facts.runs, -(-facts.tokens // self._own_size))
        if self._physical:
            ids = own
        else:
            ids = self._derived(own, facts.tokens)
            self._own_holders = _counted(self._own_holders, own, 1)
            self._own[request] = own
        self._put(request, row, ids)

    def extend(self, request: int, tokens: int) -> None:
        """Room for ``tokens`` tokens, for a request whose table is not known."""
        missing = -(-tokens // self.block_size) - self._length[request]
        if missing > 0:
            self._put(request, self._rows[request], self._new(missing))

    def end(self, requests: Iterable[int]) -> Ints:
        """These have ended. The numbers of blocks that nobody holds any more, ascending; rows stay as they are until
        :meth:`reuse_rows`.
        """
        let_go = [np.zeros(0, dtype=np.int64)]
        for request in requests:
            ids = self.grid[self._rows[request], : self._length.pop(request)].astype(np.int64)
            self._holders[ids] -= 1
            let_go.append(ids)
            if request in self._own:
                self._own_holders[self._own.pop(request)] -= 1
        ids = np.unique(np.concatenate(let_go))
        unheld: Ints = ids[self._holders[ids] == 0]
        return unheld

    def reuse_rows(self) -> None:
        """Give the rows of ended requests to others."""
        for request in [request for request in self._rows if request not in self._length]:
            self._free.append(self._rows.pop(request))

    def _row_for(self, request: int) -> int:
        if request not in self._rows:
            self._rows[request] = self._free.pop() if self._free else self._height
            self._height = max(self._height, self._rows[request] + 1)
        return self._rows[request]

    def _put(self, request: int, row: int, ids: Ints) -> None:
        begin = self._length[request]
        end = self._length[request] = begin + len(ids)
        self._grid.reserve(row + 1, end)
        self.grid[row, begin:end] = ids
        self._holders = _counted(self._holders, ids, 1)

    def _new(self, count: int) -> Ints:
        """The least ``count`` numbers that no block has, ascending."""
        holders = self._holders[self._first :]
        free = np.flatnonzero(holders == 0)[:count] + self._first
        top = max(len(self._holders), self._first)
        if top + count - len(free) > LARGEST_ID:
            raise InputError(
                f"the KV of requests that run together fills over {LARGEST_ID:,} blocks of {self.block_size} tokens",
                "choose larger blocks",
            )
        return np.concatenate([free, np.arange(top, top + count - len(free))])

    def _derived(self, own: Ints, tokens: int) -> Ints:
        """Numbers for a table of the run's own blocks."""
        ids = np.full(-(-tokens // self.block_size), -1, dtype=np.int64)
        last = np.arange(1, len(ids) + 1) * self.block_size
        known = own[own < len(self._own_holders)]
        if self._own_holders[known].any():
            for request, other in self._own.items():
                common = min(len(own), len(other))
                differing = np.zeros(common + 1, dtype=np.int64)
                np.cumsum(own[:common] != other[:common], out=differing[1:])
                if differing[-1] == common:
                    continue
                count = int(np.searchsorted(last, common * self._own_size, side="right"))  # blocks within both
                begin, end = (last[:count] - self.block_size) // self._own_size, -(-last[:count] // self._own_size)
                same = np.flatnonzero(differing[begin] == differing[end])
                ids[same] = self.grid[self._rows[request], same]
        missing = np.flatnonzero(ids < 0)
        ids[missing] = self._new(len(missing))
        return ids


def _expanded(runs: tuple[tuple[int, int], ...], most: int) -> Ints:
    """The first ``most`` blocks of ``runs``."""
    parts = [np.zeros(0, dtype=np.int64)]
    for first, count in runs:
        parts.append(np.arange(first, first + min(count, most)))
        most -= len(parts[-1])
    return np.concatenate(parts)


def _counted(holders: NDArray[np.int32], ids: Ints, by: int) -> NDArray[np.int32]:
    """``holders`` with ``by`` more of each of ``ids``, which are distinct."""
    holders = enlarged(holders, (doubled(len(holders), int(ids.max(initial=-1)) + 1),))
    holders[ids] += by
    return holders
