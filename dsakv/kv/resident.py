"""KV rows that all stay on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from dsakv.kv.marks import mark
from dsakv.kv.step import LayerRows, Read, StepTables
from dsakv.models.contracts import Selection
from dsakv.policies.placement import HBM


class ResidentRows:
    """Rows ``[L, slots, width]`` of all layers."""

    def __init__(self, n_layers: int, slots: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = torch.empty(n_layers, slots, width, dtype=dtype, device=device)


class ResidentStep:
    """See :class:`~dsakv.kv.step.StepRows`."""

    def __init__(self, store: ResidentRows, tables: StepTables) -> None:
        self.store, self.tables = store, tables

    def layer(self, layer_id: int) -> LayerRows:
        return _ResidentLayer(self.tables, self.store.rows[layer_id])


class _ResidentLayer:
    """See :class:`~dsakv.kv.step.LayerRows`."""

    def __init__(self, step: StepTables, rows: Tensor) -> None:
        self.step, self.rows = step, rows  # [slots, width]
        self.reads: list[Read] = []

    def append(self, rows: Tensor) -> None:
        self.rows.index_copy_(0, self.step.new_slots, rows)

    def fetch(self, selection: Selection | None) -> None:
        self.selection = selection

    def gather(self, rows: slice) -> Tensor:
        assert self.selection is not None
        begin = mark(self.rows.device)
        # Padding columns may lie beyond a shorter sequence's end; they are read and ignored.
        positions = torch.minimum(self.selection.positions[rows], self.step.last[rows])
        slots = self.step.slots(positions, rows)  # [t, K]
        stored = self.rows.index_select(0, slots.reshape(-1)).view(*slots.shape, -1)  # [t, K, width]
        self.reads.append(Read(HBM, rows, begin, mark(self.rows.device)))
        return stored

    def sequence(self, segment: int) -> Tensor:
        return self.step.sequence(self.rows, segment)

    def found(self, rows: Tensor) -> Tensor | None:
        return None
