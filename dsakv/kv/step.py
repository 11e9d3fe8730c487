"""A step as the cache sees it: where its tokens go, where its queries may read, and what keeps the rows of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dsakv.kv.marks import Mark
from dsakv.models.contracts import Segment, Selection


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


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens ``start .. start + length`` of a sequence, which a step computes."""

    table: BlockTable
    start: int
    length: int
    warm_tokens: int = 0
    """Tokens of its prompt where this is the sequence's first decode step, else 0: those that a warm start offers."""


class StepTables:
    """Where the tokens of a step's spans go, and where its queries find what was before them."""

    def __init__(self, spans: Sequence[Span], block_size: int, device: torch.device, *, decode: bool) -> None:
        self.spans, self.block_size, self.decode = spans, block_size, decode
        self.segments: list[Segment] = []
        row = 0
        for span in spans:
            self.segments.append(Segment(slice(row, row + span.length), span.start + span.length))
            row += span.length
        if row == len(spans):
            self.positions = torch.tensor([span.start for span in spans], device=device)  # [T]
            owner = torch.arange(row, device=device)
        else:
            ranges = [torch.arange(span.start, span.start + span.length, device=device) for span in spans]
            self.positions = torch.cat(ranges)
            owner = torch.repeat_interleave(torch.tensor([span.length for span in spans], device=device))
        ids = torch.nn.utils.rnn.pad_sequence([span.table.ids for span in spans], batch_first=True)  # [n, blocks]
        self.flat_table = ids.view(-1)
        self.row_base = (owner * ids.shape[1]).unsqueeze(1)  # [T, 1]
        self.last = torch.tensor([s.seq_len - 1 for s in self.segments], device=device)[owner].unsqueeze(1)  # [T, 1]
        self.new_slots = self.slots(self.positions.unsqueeze(1), slice(0, row)).squeeze(1)  # [T]

    def blocks(self, positions: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The block and the place in it of ``positions`` ``[t, K]`` of the queries ``rows``."""
        block = torch.div(positions, self.block_size, rounding_mode="floor")
        return self.flat_table.take(block + self.row_base[rows]), positions - block * self.block_size

    def slots(self, positions: Tensor, rows: slice) -> Tensor:
        """Row numbers in a pool of all blocks of ``positions`` ``[t, K]`` of the queries ``rows``."""
        block, place = self.blocks(positions, rows)
        return block * self.block_size + place

    def sequence(self, pool: Tensor, segment: int) -> Tensor:
        """What ``pool`` ``[slots, ...]`` holds of a segment's sequence, in place where its blocks are adjacent."""
        size = self.block_size
        seq_len = self.segments[segment].seq_len
        runs = self.spans[segment].table.runs
        if len(runs) == 1:
            first = runs[0][0] * size
            return pool[first : first + seq_len]
        return torch.cat([pool[b * size : (b + n) * size] for b, n in runs])[:seq_len]


class Read(NamedTuple):
    """One batched read from a tier: for which of the step's queries, when it began and ended."""

    tier: int
    rows: slice
    begin: Mark
    end: Mark


class LayerRows(Protocol):
    """The KV rows of one layer in one step, as they are kept: ``width`` numbers each."""

    reads: list[Read]
    """What was read, for the step's facts."""

    def append(self, rows: Tensor) -> None:
        """Keep the step's own rows ``[T, width]``."""
        ...

    def fetch(self, selection: Selection | None) -> None:
        """As :meth:`~dsakv.models.contracts.LayerCache.fetch`."""
        ...

    def gather(self, rows: slice) -> Tensor:
        """What was fetched for the queries ``rows``: ``[t, K, width]``."""
        ...

    def sequence(self, segment: int) -> Tensor:
        """All rows of a segment's sequence, ``[S, width]``."""
        ...

    def found(self, rows: Tensor) -> Tensor | None:
        """For the queries ``rows`` ``[B]`` the tier that held each of their positions ``[B, K]`` uint8; None where
        everything is on the device. Padding columns say what the first one does.
        """
        ...


class StepRows(Protocol):
    """The rows of all layers in one step."""

    def layer(self, layer_id: int) -> LayerRows: ...
