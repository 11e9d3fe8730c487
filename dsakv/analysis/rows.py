"""Numbers for what is alive: streams, requests and caches come and go, the arrays that hold their state stay."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

K = TypeVar("K", bound=Hashable)


class ReappearedError(Exception):
    """Something that was taken for finished goes on: the trace must be read again with everything kept."""


class Rows:
    """Gives each key a row, and a row that is free to the next key."""

    def __init__(self) -> None:
        self._rows: dict[Hashable, int] = {}
        self._keys: list[Hashable] = []  # by row
        self._free: list[int] = []
        self._gone: set[Hashable] = set()

    def __len__(self) -> int:
        """Rows ever used at the same time."""
        return len(self._keys)

    @property
    def live(self) -> int:
        """Rows in use."""
        return len(self._rows)

    def key(self, row: int) -> Any:
        return self._keys[row]

    def row(self, key: Hashable) -> int:
        """The row of ``key``, a free one if it is new.

        Raises:
            ReappearedError: its row has been released.
        """
        row = self._rows.get(key)
        if row is not None:
            return row
        if key in self._gone:
            raise ReappearedError
        row = self._free.pop() if self._free else len(self._keys)
        if row == len(self._keys):
            self._keys.append(key)
        self._keys[row] = key
        self._rows[key] = row
        return row

    def rows(self, keys: Iterable[K]) -> tuple[list[int], list[K]]:
        """The row of each key, and the keys that are new. Raises as :meth:`row`."""
        rows, new = [], []
        known = self._rows.get
        for key in keys:
            row = known(key)
            if row is None:
                row = self.row(key)
                new.append(key)
            rows.append(row)
        return rows, new

    def release(self, row: int) -> None:
        """Free ``row``; its key must not come back."""
        key = self._keys[row]
        del self._rows[key]
        self._gone.add(key)
        self._free.append(row)


class IdleClock:
    """Tells which rows of streams have been idle for so long that their streams must have ended.

    In a trace in the order of the engine's steps every live stream has a record in every step, so that none is idle
    for more records than there are live streams; sampled traces leave some steps out.
    """

    PATIENCE = 4096
    ROUNDS = 16
    """Records, and records for each stream that had one within ``PATIENCE``, after which an idle one has ended."""

    def __init__(self) -> None:
        self._last = np.zeros(0, dtype=np.int64)  # [rows], number of the last record seen; -1 for a free row

    def seen(self, rows: NDArray[np.int64], now: int) -> None:
        """``rows`` [R] have had records, up to number ``now``."""
        top = int(rows.max(initial=-1)) + 1
        if len(self._last) < top:
            self._last = np.concatenate([self._last, np.full(2 * top - len(self._last), -1, dtype=np.int64)])
        self._last[rows] = now

    def ended(self, now: int) -> list[int]:
        """Rows to release at record number ``now``; they count as free from here on."""
        live = int(np.count_nonzero(self._last >= max(now - self.PATIENCE, 0)))
        rows = np.flatnonzero((self._last >= 0) & (self._last < now - self.PATIENCE - self.ROUNDS * live))
        self._last[rows] = -1
        return list(rows.tolist())


_TABLE = 4096


class LayerRows:
    """Numbers for the layers of a model, which all stay."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}
        self._table = np.empty(0, dtype=np.int64)  # [layers + 1], rows from layer -1 on; -1 for none

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Layer and row of each, in the order of the layers."""
        return iter(sorted(self._rows.items()))

    def row(self, layer: int) -> int:
        """The row of ``layer``, the next one if it is new."""
        return self._rows.setdefault(layer, len(self._rows))

    def rows(self, layers: NDArray[np.integer]) -> NDArray[np.int64]:
        """The row of each layer, [R]. Layers are -1 or above."""
        top = int(layers.max(initial=-1))
        if top >= _TABLE:  # no model has so many
            return np.array([self.row(layer) for layer in layers.tolist()], dtype=np.int64)
        if top + 1 >= len(self._table):
            self._table = np.full(top + 2, -1, dtype=np.int64)
            for layer, row in self._rows.items():
                if layer <= top:
                    self._table[layer + 1] = row
        rows: NDArray[np.int64] = self._table[layers + 1]
        if (rows < 0).any():
            for layer in np.unique(layers[rows < 0]).tolist():
                self._table[layer + 1] = self.row(layer)
            rows = self._table[layers + 1]
        return rows

    def of(self, layer: int | None) -> list[int]:
        """The row of ``layer``, or all rows."""
        return list(self._rows.values()) if layer is None else [self._rows[layer]]


class Grid:
    """Arrays ``[rows, width]`` that grow in both directions, zero where nothing has been written."""

    def __init__(self, **dtypes: DTypeLike) -> None:
        self._dtypes = dtypes
        self.rows = self.width = 0
        self._arrays = {name: np.zeros((0, 0), dtype=dtype) for name, dtype in dtypes.items()}

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._arrays[name]

    def reserve(self, rows: int, width: int) -> bool:
        """Make room for ``rows`` and ``width``; True where the arrays are new ones."""
        if rows <= self.rows and width <= self.width:
            return False
        rows = self.rows if rows <= self.rows else max(rows, 2 * self.rows)
        width = self.width if width <= self.width else -(-max(width, self.width * 9 // 8) // 64) * 64
        for name, old in self._arrays.items():
            grown = np.zeros((rows, width), dtype=self._dtypes[name])
            grown[: self.rows, : self.width] = old
            self._arrays[name] = grown
        self.rows, self.width = rows, width
        return True

    def clear(self, row: int) -> None:
        for array in self._arrays.values():
            array[row] = 0
