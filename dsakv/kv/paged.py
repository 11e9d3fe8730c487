"""The KV cache: rows and index keys of every layer in blocks, found through block tables."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsakv.errors import DsakvError
from dsakv.kv.formats import row_format
from dsakv.models.contracts import Fetch, Fp8Kv, IndexKeys, Mark, Segment


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
        return LayerView(self, layer_id)


class LayerView:
    """One layer of a ``StepCache``; what ``models.contracts.LayerCache`` asks for."""

    def __init__(self, step: StepCache, layer_id: int) -> None:
        self.step, cache = step, step.cache
        self.format, self.fp8 = cache.format, cache.fp8
        self.rows = cache.rows[layer_id]  # [slots, width]
        self.index_rows = cache.index_rows[layer_id]  # [slots, D]
        self.index_scale = cache.index_scale[layer_id] if cache.index_scale is not None else None  # [slots]

    @property
    def segments(self) -> list[Segment]:
        return self.step.segments

    def append(self, kv: Tensor, index_key: Tensor | None) -> None:
        slots = self.step.new_slots
        self.rows.index_copy_(0, slots, self.format.encode(kv))
        if index_key is None:
            return
        if self.fp8 and self.index_scale is not None:
            values, scale = self.fp8.quantize(index_key, index_key.shape[-1])  # a scale for each key
            self.index_scale.index_copy_(0, slots, scale.squeeze(-1))
            index_key = values.view(torch.uint8)
        self.index_rows.index_copy_(0, slots, index_key)

    def index_keys(self, segment: int) -> IndexKeys:
        values = self._sequence(self.index_rows, segment)
        if self.index_scale is None:
            return IndexKeys(values, None)
        return IndexKeys(values.view(torch.float8_e4m3fn), self._sequence(self.index_scale, segment))

    def _sequence(self, pool: Tensor, segment: int) -> Tensor:
        """What ``pool`` ``[slots, ...]`` holds of a segment's sequence, in place where its blocks are adjacent."""
        size = self.step.cache.block_size
        seq_len = self.step.segments[segment].seq_len
        runs = self.step.tables[segment].runs
        if len(runs) == 1:
            first = runs[0][0] * size
            return pool[first : first + seq_len]
        return torch.cat([pool[b * size : (b + n) * size] for b, n in runs])[:seq_len]

    def sequence(self, segment: int) -> Tensor:
        return self.format.decode(self._sequence(self.rows, segment))

    def gather(self, positions: Tensor, rows: slice) -> tuple[Tensor, Fetch]:
        begin = self.step.cache.mark()
        # Padding columns may lie beyond a shorter sequence's end; they are read and ignored.
        slots = self.step.slots(torch.minimum(positions, self.step.last[rows]), rows)  # [t, K]
        stored = self.rows.index_select(0, slots.reshape(-1)).view(*slots.shape, -1)  # [t, K, width]
        fetch = Fetch(rows, begin, self.step.cache.mark())
        return self.format.decode(stored), fetch


class PagedCache:
    """KV rows and index keys of all layers, for ``blocks * block_size`` tokens.

    ``fp8`` is what the model says of it: index keys are then float8 with one float32 scale each, and rows packed.
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
        fp8: Fp8Kv | None = None,
    ) -> None:
        self.block_size = block_size
        self.device = device
        self.fp8, self.format = fp8, row_format(row_dim, dtype, fp8)
        self.row_bytes = self.format.row_bytes
        """Of the row of a token in a layer; index keys come on top."""
        self.index_scale: Tensor | None = None
        slots = n_blocks * block_size
        key_dtype = torch.uint8 if fp8 else dtype  # float8 lacks some operations that move bits
        try:
            self.rows = torch.empty(n_layers, slots, self.format.width, dtype=self.format.dtype, device=device)
            self.index_rows = torch.empty(n_layers, slots, index_dim, dtype=key_dtype, device=device)
            if fp8:
                self.index_scale = torch.empty(n_layers, slots, dtype=torch.float32, device=device)
        except (RuntimeError, MemoryError) as error:  # the allocator's own message is long and says less
            key_bytes = index_dim * key_dtype.itemsize + (4 if fp8 else 0)
            size = n_layers * slots * (self.row_bytes + key_bytes)
            raise DsakvError(
                f"no room on {device} for a KV cache of {size / 1e9:.1f} GB",
                "lower --batch-size or --kv-blocks, or shorten the prompts",
            ) from error

    def bind(self, tables: Sequence[BlockTable], starts: Sequence[int], lengths: Sequence[int]) -> StepCache:
        """The view of a step that computes ``lengths[i]`` tokens from ``starts[i]`` on of each sequence."""
        return StepCache(self, tables, starts, lengths)

    def mark(self) -> Mark:
        return CudaMark() if self.device.type == "cuda" else HostMark()
