"""What all remote pools share: checks of the arrays, checksums kept on this side, and the counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from dsakv.errors import DsakvError
from dsakv.kv.tiers.contract import Counted

NEVER, UNSURE, KEPT = range(3)
"""Of each block: never put; the last put failed, so nobody knows what is there; acknowledged."""


class CheckedPool(ABC):
    """A pool whose blocks are compared with a 64-bit digest that stays here, 9 bytes of memory a block.

    The digest is seeded with the block's number. So what is kept elsewhere is the payload alone, and one that is
    cut, altered, missing, of another block or older than the last put is found on every ``get``.
    """

    def __init__(self, name: str, n_blocks: int, block_bytes: int) -> None:
        self.name, self.n_blocks, self.block_bytes = name, n_blocks, block_bytes
        self.counted = Counted()
        self._digests = np.zeros(n_blocks, np.uint64)
        self._state = np.full(n_blocks, NEVER, np.uint8)
        self._closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, {self.n_blocks} blocks of {self.block_bytes} bytes)"

    def put(self, numbers: NDArray[np.int64], blocks: NDArray[np.uint8]) -> None:
        n = self._checked(numbers, blocks)
        if np.unique(numbers).size != n:
            raise ValueError("a block stands twice in one batch to put")
        if not n:
            return
        payload = blocks.data.cast("B")
        self._state[numbers] = UNSURE  # also where the write ends in an error or an interrupt
        self._digests[numbers] = self._digested(numbers, payload)
        self._write(numbers, payload)
        self._state[numbers] = KEPT
        self.counted.writes += 1
        self.counted.write_ops += n
        self.counted.bytes_written += n * self.block_bytes

    def get(self, numbers: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        n = self._checked(numbers, out)
        if not out.flags.writeable:
            raise ValueError("blocks cannot be read into an array that is read-only")
        if not n:
            return
        self._check_kept(numbers)
        payload = out.data.cast("B")
        wrong = self._wrong(numbers, payload, self._read(numbers, payload))
        if wrong:
            self._read_again(numbers, payload, wrong)
        self.counted.reads += 1
        self.counted.read_ops += n
        self.counted.bytes_read += n * self.block_bytes

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._remove()

    def _read_again(self, numbers: NDArray[np.int64], payload: memoryview, wrong: list[int]) -> None:
        """Once: a broken connection can garble or shift what a server has kept well."""
        self.counted.retries += len(wrong)
        again, size = numbers[wrong], self.block_bytes
        fresh = memoryview(bytearray(len(wrong) * size))
        still = self._wrong(again, fresh, self._read(again, fresh, again=True))
        if still:
            raise DsakvError(
                f"block {again[still[0]]} came back from {self.name} as something else than was written"
                + (f", and so did {len(still) - 1} others" if len(still) > 1 else ""),
                "something else writes there, or the disk, memory or network is faulty: check that, then run again",
            )
        for i, row in enumerate(wrong):
            payload[row * size : (row + 1) * size] = fresh[i * size : (i + 1) * size]

    def _wrong(self, numbers: NDArray[np.int64], payload: memoryview, cut: list[int]) -> list[int]:
        """Rows that do not hold what was put last. ``cut`` are those that came in another size."""
        differ = self._digested(numbers, payload) != self._digests[numbers]
        differ[cut] = True
        return [int(row) for row in np.flatnonzero(differ)]

    def _digested(self, numbers: NDArray[np.int64], payload: memoryview) -> NDArray[np.uint64]:
        size, digest = self.block_bytes, xxhash.xxh3_64_intdigest
        each = (digest(payload[i * size : (i + 1) * size], number) for i, number in enumerate(numbers.tolist()))
        return np.fromiter(each, np.uint64, numbers.size)

    def _check_kept(self, numbers: NDArray[np.int64]) -> None:
        state = self._state[numbers]
        if (state == NEVER).any():
            raise KeyError(f"block {numbers[state == NEVER][0]} was never put")
        if (state == UNSURE).any():
            raise DsakvError(
                f"nobody knows what {self.name} has of block {numbers[state == UNSURE][0]}: its last write failed",
                "write the block again before it is read",
            )

    def _checked(self, numbers: NDArray[np.int64], blocks: NDArray[Any]) -> int:
        """How many blocks there are. Raises ValueError for what only a bug can ask for."""
        if self._closed:
            raise ValueError("the pool is closed")
        if numbers.dtype != np.int64 or numbers.ndim != 1:
            raise ValueError(f"numbers of blocks are int64 [n], not {numbers.dtype} {list(numbers.shape)}")
        if blocks.dtype != np.uint8 or blocks.shape != (numbers.size, self.block_bytes):
            wanted = [numbers.size, self.block_bytes]
            raise ValueError(f"blocks are uint8 {wanted}, not {blocks.dtype} {list(blocks.shape)}")
        if not blocks.flags.c_contiguous:
            raise ValueError("blocks are C-contiguous")
        if numbers.size and not (numbers.min() >= 0 and numbers.max() < self.n_blocks):
            raise ValueError(f"numbers of blocks go from 0 to {self.n_blocks - 1}")
        return numbers.size

    @abstractmethod
    def _write(self, numbers: NDArray[np.int64], payload: memoryview) -> None:
        """Keep ``payload``, n * block_bytes bytes, n > 0. Returns when all is acknowledged, else raises DsakvError."""

    @abstractmethod
    def _read(self, numbers: NDArray[np.int64], payload: memoryview, again: bool = False) -> list[int]:
        """Fill ``payload``; rows that came in another size. ``again``: the first try brought something wrong."""

    @abstractmethod
    def _remove(self) -> None:
        """Remove what the run left."""
