"""Positions to blocks: directly for a block size, or from the blocks of a smaller one that divides it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsakv.analysis.records import StreamRecords
from dsakv.compiled import compiled


@dataclass(frozen=True, slots=True)
class BlockRecords:
    """Records with the ``T`` blocks that they touch for one block size; ``T >= R``."""

    records: StreamRecords
    block_size: int
    current: NDArray[np.int64]
    """[R] block of the newest token."""
    offsets: NDArray[np.int64]  # [R + 1], into the [T] arrays
    blocks: NDArray[np.int32]
    """[T] ascending and unique within a record."""
    ends: NDArray[np.int32]
    """[T] where the block's tokens end in ``records.positions``; they begin where those before it end."""

    def __len__(self) -> int:
        return len(self.records)

    @property
    def width(self) -> int:
        """Above every touched block: a sequence may be far longer than what is read of it."""
        return int(self.blocks[self.offsets[1:] - 1].max()) + 1


def touched_blocks(records: StreamRecords, block_sizes: Sequence[int]) -> Iterator[BlockRecords]:
    """Map positions to blocks, ``position // block_size``, for each block size in ascending order."""
    made: list[BlockRecords] = []
    for block_size in block_sizes:
        base = next((b for b in reversed(made) if block_size % b.block_size == 0), None)
        if base is None:
            found = _grouped(records.positions, np.empty(0, dtype=np.int32), records.offsets, block_size)
        else:
            found = _grouped(base.blocks, base.ends, base.offsets, block_size // base.block_size)
        offsets, blocks, ends = found
        made.append(BlockRecords(records, block_size, (records.seq_len - 1) // block_size, offsets, blocks, ends))
        yield made[-1]


def _grouped(
    values: NDArray[np.int32], ends: NDArray[np.int32], offsets: NDArray[np.int64], divisor: int
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
    groups, last = np.empty((2, len(values)), dtype=np.int32)
    bounds = np.empty(len(offsets), dtype=np.int64)
    shift = divisor.bit_length() - 1 if divisor & (divisor - 1) == 0 else -1
    count = _group(values, ends, offsets, divisor, shift, groups, last, bounds)
    return bounds, groups[:count], last[:count]


@compiled
def _group(
    values: NDArray[np.int32],  # [V], ascending within a record
    ends: NDArray[np.int32],  # [V], or empty where each value is one token
    offsets: NDArray[np.int64],  # [R + 1]
    divisor: int,
    shift: int,  # of a divisor that is a power of two, else -1
    groups: NDArray[np.int32],  # [V], filled up to the result
    last: NDArray[np.int32],  # [V], likewise
    bounds: NDArray[np.int64],  # [R + 1]
) -> np.int64:
    """Join values with the same quotient. Every value is written, so that nothing branches: a new one moves on."""
    count = np.uint64(0)
    single = len(ends) == 0
    for r in range(len(offsets) - 1):
        bounds[r] = count
        own = values[offsets[r] : offsets[r + 1]]
        own_ends = ends if single else ends[offsets[r] : offsets[r + 1]]
        if not len(own):
            continue
        before = own[0] >> shift if shift >= 0 else own[0] // divisor
        for i in range(len(own)):
            group = own[i] >> shift if shift >= 0 else own[i] // divisor
            count += np.uint64(group != before)
            groups[count] = group
            last[count] = offsets[r] + i + 1 if single else own_ends[i]
            before = group
        count += np.uint64(1)
    bounds[len(offsets) - 1] = count
    return np.int64(count)
