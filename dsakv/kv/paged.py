"""The KV cache: index keys of every layer in blocks on the device, and rows wherever their store keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsakv.errors import DsakvError
from dsakv.kv.formats import row_format
from dsakv.kv.options import TierOptions
from dsakv.kv.resident import ResidentRows, ResidentStep
from dsakv.kv.step import BlockTable, LayerRows, Read, Span, StepRows, StepTables
from dsakv.kv.tiered import TieredRows
from dsakv.kv.tiered_layer import TieredLayers
from dsakv.kv.tiered_step import TieredStep
from dsakv.models.contracts import Fp8Kv, IndexKeys, Model, Segment, Selection
from dsakv.request import Phase, TierTraffic


class LayerView:
    """One layer of a step; what ``models.contracts.LayerCache`` asks for."""

    def __init__(self, cache: PagedCache, tables: StepTables, rows: LayerRows, layer_id: int) -> None:
        self.tables, self.rows, self.format, self.fp8 = tables, rows, cache.format, cache.fp8
        self.index_rows = cache.index_rows[layer_id]  # [slots, D]
        self.index_scale = cache.index_scale[layer_id] if cache.index_scale is not None else None  # [slots]

    @property
    def segments(self) -> list[Segment]:
        return self.tables.segments

    @property
    def reads(self) -> list[Read]:
        """What fetching and gathering took."""
        return self.rows.reads

    def append(self, kv: Tensor, index_key: Tensor | None) -> None:
        self.rows.append(self.format.encode(kv))
        if index_key is None:
            return
        slots = self.tables.new_slots
        if self.fp8 and self.index_scale is not None:
            values, scale = self.fp8.quantize(index_key, index_key.shape[-1])  # a scale for each key
            self.index_scale.index_copy_(0, slots, scale.squeeze(-1))
            index_key = values.view(torch.uint8)
        self.index_rows.index_copy_(0, slots, index_key)

    def index_keys(self, segment: int) -> IndexKeys:
        values = self.tables.sequence(self.index_rows, segment)
        if self.index_scale is None:
            return IndexKeys(values, None)
        return IndexKeys(values.view(torch.float8_e4m3fn), self.tables.sequence(self.index_scale, segment))

    def fetch(self, selection: Selection | None) -> None:
        self.rows.fetch(selection)

    def gather(self, rows: slice) -> Tensor:
        return self.format.decode(self.rows.gather(rows))

    def sequence(self, segment: int) -> Tensor:
        return self.format.decode(self.rows.sequence(segment))

    def found(self, rows: Tensor) -> Tensor | None:
        """As :meth:`~dsakv.kv.step.LayerRows.found`."""
        return self.rows.found(rows)


class StepCache:
    """The cache as one step sees it."""

    def __init__(self, cache: PagedCache, tables: StepTables, rows: StepRows) -> None:
        self.cache, self.tables, self.rows = cache, tables, rows
        self.positions, self.segments = tables.positions, tables.segments

    def layer(self, layer_id: int) -> LayerView:
        return LayerView(self.cache, self.tables, self.rows.layer(layer_id), layer_id)


class KvBytes(NamedTuple):
    """What a KV cache takes."""

    rows: int
    index_keys: int
    """With their scales."""


def kv_bytes(model: Model, slots: int) -> KvBytes:
    """Of all layers of ``model``, for ``slots`` tokens."""
    key_bytes = model.index_key_dim * (1 if model.kv_fp8 else model.dtype.itemsize) + (4 if model.kv_fp8 else 0)
    row_bytes = row_format(model.kv_row_dim, model.dtype, model.kv_fp8).row_bytes
    return KvBytes(*(len(model.layers) * slots * size for size in (row_bytes, key_bytes)))


class PagedCache:
    """KV rows and index keys of all layers, for ``blocks * block_size`` tokens.

    ``fp8`` is what the model says of it: index keys are then float8 with one float32 scale each, and rows packed.
    Layers that share another's selection have room for index keys too, and leave it untouched. With ``tiers`` the
    device keeps part of the rows, for at most ``seats`` sequences at a time; index keys are always there.
    Raises DsakvError where there is no room for them, and what :class:`TieredRows` raises.
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
        tiers: TierOptions | None = None,
        seats: int = 1,
    ) -> None:
        self.block_size = block_size
        self.device = device
        self.fp8, self.format = fp8, row_format(row_dim, dtype, fp8)
        self.row_bytes = self.format.row_bytes
        """Of the row of a token in a layer; index keys come on top."""
        self.index_scale: Tensor | None = None
        self.tiers: TieredRows | None = None
        slots = n_blocks * block_size
        key_dtype = torch.uint8 if fp8 else dtype  # float8 lacks some operations that move bits
        width, row_dtype = self.format.width, self.format.dtype
        try:
            self.index_rows = torch.empty(n_layers, slots, index_dim, dtype=key_dtype, device=device)
            if fp8:
                self.index_scale = torch.empty(n_layers, slots, dtype=torch.float32, device=device)
            if tiers is None:
                self.resident = ResidentRows(n_layers, slots, width, row_dtype, device)
            else:
                self.tiers = TieredRows(
                    n_layers=n_layers, n_blocks=n_blocks, block_size=block_size, width=width, dtype=row_dtype,
                    device=device, seats=seats, options=tiers,
                )  # fmt: skip
        except (RuntimeError, MemoryError) as error:  # the allocator's own message is long and says less
            key_bytes = index_dim * key_dtype.itemsize + (4 if fp8 else 0)
            size = n_layers * slots * ((0 if tiers else self.row_bytes) + key_bytes)
            raise DsakvError(
                f"no room on {device} for a KV cache of {size / 1e9:.1f} GB",
                "lower --batch-size or --kv-blocks, or shorten the prompts",
            ) from error

    def bind(self, spans: Sequence[Span], *, decode: bool) -> StepCache:
        """The view of a step that computes these spans, each of another sequence. A decode step computes one token of
        each and is what the hot tier is for.
        """
        tables = StepTables(spans, self.block_size, self.device, decode=decode)
        if self.tiers is None:
            return StepCache(self, tables, ResidentStep(self.resident, tables))
        return StepCache(self, tables, TieredLayers(TieredStep(self.tiers, tables)))

    def retire(self, tables: Iterable[BlockTable], unheld: Sequence[int], published: Sequence[int]) -> None:
        """Sequences have ended: nobody holds the blocks ``unheld`` any more, of which prompts may find ``published``
        again.
        """
        if self.tiers is not None:
            self.tiers.retire(tables, unheld, published)

    def traffic(self) -> Mapping[tuple[Phase, str], TierTraffic]:
        """What the tiers did since this was last asked."""
        return {} if self.tiers is None else self.tiers.ledger.settle()

    def close(self) -> None:
        """Remove what the cache keeps outside this process."""
        if self.tiers is not None:
            self.tiers.close()
