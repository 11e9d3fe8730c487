"""A step of a tiered cache: what is the same in all of its layers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsakv.kv.step import StepTables
from dsakv.kv.tiered import TieredRows
from dsakv.kv.writes import Writes
from dsakv.models.contracts import Selection
from dsakv.request import Phase


class Wanted(NamedTuple):
    """What the queries of a step read."""

    blocks: Tensor  # [T, K]
    places: Tensor  # [T, K] in the block
    touched: NDArray[np.bool_]  # [n_blocks]


class TieredStep:
    """Where the step's rows go, what it reads, and what it offers to the hot tier."""

    def __init__(self, store: TieredRows, tables: StepTables) -> None:
        self.store, self.tables = store, tables
        seats = [store.seat(span.table) for span in tables.spans]
        self.writes = Writes.of(tables.spans, seats, store.block_size, store.device, tables.decode)
        self.phase: Phase = "decode" if tables.decode else "prefill"
        begun = {
            block
            for span in tables.spans
            if store.options.start == "warm"
            for block in span.table.blocks[: span.warm_tokens // store.block_size]
        }
        self.warm = np.array(sorted(begun), dtype=np.int64)
        """Blocks that the hot tier is offered before decode reads."""
        self._wanted: tuple[Selection, Wanted] | None = None
        ends = [np.arange(span.start, span.start + span.length) + 1 for span in tables.spans]
        self.lengths = np.concatenate(ends)
        """[T] tokens that each query may read."""

    def wanted(self, selection: Selection) -> Wanted:
        """What a selection reads; layers that share it ask one after the other."""
        if self._wanted is None or self._wanted[0] is not selection:
            columns = torch.arange(selection.positions.shape[1], device=self.store.device)
            valid = columns < selection.counts.unsqueeze(1)  # [T, K]
            # Padding columns read what the first one does.
            positions = torch.where(valid, selection.positions, selection.positions[:, :1])
            blocks, places = self.tables.blocks(positions, slice(0, len(positions)))
            touched = torch.zeros(self.store.n_blocks, dtype=torch.bool, device=self.store.device)
            touched[blocks.view(-1)] = True
            self._wanted = selection, Wanted(blocks, places, touched.cpu().numpy())
        return self._wanted[1]

    def everything(self) -> NDArray[np.bool_]:
        """All blocks of the step's sequences, [n_blocks]."""
        touched = np.zeros(self.store.n_blocks, dtype=np.bool_)
        for i in range(len(self.tables.spans)):
            touched[self.blocks(i)] = True
        return touched

    def blocks(self, segment: int) -> list[int]:
        """The blocks of a segment's sequence that hold tokens."""
        seq_len = self.tables.segments[segment].seq_len
        return self.tables.spans[segment].table.blocks[: -(-seq_len // self.store.block_size)]
