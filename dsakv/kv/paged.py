"""The KV cache: rows and index keys of every layer in blocks, found through block tables."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsakv.errors import DsakvError
from dsakv.models.contracts import Fetch, Mark, Segment


@dataclass(frozen=True, slots=True)
class HostMark:
    """A moment on the host's clock."""

    ns: int = field(default_factory=time.perf_counter_ns)

    def us_until(self, later: Mark) -> float:
        assert isinstance(later, HostMark)
        return (later.ns - self.ns) / 1e3


class CudaMark:
    """A moment in the CUDA stream: recorded without waiting, read once the step is over."""

    def __init__(self) -> None:
        self.event: Any = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def us_until(self, later: Mark) -> float:
        assert isinstance(later, CudaMark)
        later.event.synchronize()
        return float(self.event.elapsed_time(later.event)) * 1e3


class BlockTable:
    """The blocks of one sequence, in the order of its tokens."""

    def __init__(self, blocks: Sequence[int], device: torch.device) -> None:
        self.blocks = list(blocks)
        self.ids = torch.tensor(self.blocks, dtype=torch.int64, device=device)  # [n]
        self.runs: list[tuple[int, int]] = []
        """Stretches of adjacent blocks as (first block, number of blocks)."""
        for block in self.blocks:
            if self.runs and sum(self.runs[-1]) == block:
                self.runs[-1] = (self.runs[-1][0], self.runs[-1][1] + 1)
            else:
                self.runs.append((block, 1))


class StepCache:
    """The cache as one step sees it: where the step's tokens go, and where its queries may read.

    ``tables[i]`` belongs to the sequence whose tokens ``starts[i] .. starts[i] + lengths[i]`` the step computes.
    """

    def __init__(
        self, cache: PagedCache, tables: Sequence[BlockTable], starts: Sequence[int], lengths: Sequence[int]
    ) -> None:
        self.cache = cache
        self.tables = tables
        device = cache.device
        self.segments: list[Segment] = []
        row = 0
        for start, length in zip(starts, lengths, strict=True):
            self.segments.append(Segment(slice(row, row + length), start + length))
            row += length
        if all(length == 1 for length in lengths):
            self.positions = torch.tensor(starts, device=device)  # [T]
            owner = torch.arange(row, device=device)
        else:
            ranges = [torch.arange(s, s + n, device=device) for s, n in zip(starts, lengths, strict=True)]
            self.positions = torch.cat(ranges)
            owner = torch.repeat_interleave(torch.tensor(lengths, device=device))
        ids = torch.nn.utils.rnn.pad_sequence([table.ids for table in tables], batch_first=True)  # [n, blocks]
        self.flat_table = ids.view(-1)
        self.row_base = (owner * ids.shape[1]).unsqueeze(1)  # [T, 1]
        self.last = torch.tensor([s.seq_len - 1 for s in self.segments], device=device)[owner].unsqueeze(1)  # [T, 1]
        self.new_slots = self.slots(self.positions.unsqueeze(1), slice(0, row)).squeeze(1)  # [T]

    def slots(self, positions: Tensor, rows: slice) -> Tensor:
        """Row numbers in the pool of ``positions`` ``[t, K]`` of the queries ``rows``."""
        size = self.cache.block_size
        block = torch.div(positions, size, rounding_mode="floor")
        return self.flat_table.take(block + self.row_base[rows]) * size + (positions - block * size)

    def layer(self, layer_id: int) -> LayerView:
        return LayerView(self, self.cache.rows[layer_id], self.cache.index_rows[layer_id])


class LayerView:
    """One layer of a ``StepCache``; what ``models.contracts.LayerCache`` asks for."""

    def __init__(self, step: StepCache, rows: Tensor, index_rows: Tensor) -> None:
        self.step = step
        self.rows = rows  # [slots, R]
        self.index_rows = index_rows  # [slots, D]

    @property
    def segments(self) -> list[Segment]:
        return self.step.segments

    def append(self, kv: Tensor, index_key: Tensor | None) -> None:
        self.rows.index_copy_(0, self.step.new_slots, kv)
        if index_key is not None:
            self.index_rows.index_copy_(0, self.step.new_slots, index_key)

    def index_keys(self, segment: int) -> Tensor:
        size = self.step.cache.block_size
        seq_len = self.step.segments[segment].seq_len
        runs = self.step.tables[segment].runs
        if len(runs) == 1:
            first = runs[0][0] * size
            return self.index_rows[first : first + seq_len]
        return torch.cat([self.index_rows[b * size : (b + n) * size] for b, n in runs])[:seq_len]

    def gather(self, positions: Tensor, rows: slice) -> tuple[Tensor, Fetch]:
        begin = self.step.cache.mark()
        # Padding columns may lie beyond a shorter sequence's end; they are read and ignored.
        slots = self.step.slots(torch.minimum(positions, self.step.last[rows]), rows)  # [t, K]
        read = self.rows.index_select(0, slots.reshape(-1)).view(*slots.shape, -1)  # [t, K, R]
        return read, Fetch(rows, begin, self.step.cache.mark())


class PagedCache:
    """KV rows ``[L, blocks * block_size, R]`` and index keys ``[L, blocks * block_size, D]`` of all layers.

    Layers that share another's selection have room for index keys too, and leave it untouched.
    Raises DsakvError where the device has no room for them.
    """

    def __init__(
        self,
        *,
        n_layers: int,
        n_blocks: int,
        block_size: int,
        row_dim: int,
        index_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.device = device
        slots = n_blocks * block_size
        try:
            self.rows = torch.empty(n_layers, slots, row_dim, dtype=dtype, device=device)
            self.index_rows = torch.empty(n_layers, slots, index_dim, dtype=dtype, device=device)
        except (RuntimeError, MemoryError) as error:  # the allocator's own message is long and says less
            size = n_layers * slots * (row_dim + index_dim) * dtype.itemsize
            raise DsakvError(
                f"no room on {device} for a KV cache of {size / 1e9:.1f} GB",
                "lower --batch-size or --kv-blocks, or shorten the prompts",
            ) from error

    @property
    def row_bytes(self) -> int:
        return self.rows.shape[-1] * self.rows.element_size()

    def bind(self, tables: Sequence[BlockTable], starts: Sequence[int], lengths: Sequence[int]) -> StepCache:
        """The view of a step that computes ``lengths[i]`` tokens from ``starts[i]`` on of each sequence."""
        return StepCache(self, tables, starts, lengths)

    def mark(self) -> Mark:
        return CudaMark() if self.device.type == "cuda" else HostMark()
