"""Where every byte of the result comes from: the layout of each rank's file, as pieces of equal size."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np

from dsakv.convert.source import FP8, Part, Source
from dsakv.errors import InputError
from dsakv.header import ITEM_BYTES, Stored, format_header
from dsakv.layout import converted_file
from dsakv.models.deepseek_v32_names import BLOCK, split_of
from dsakv.models.dsa_shape import check_ranks

PIECE = 4 << 20
"""Bytes of a file that have a checksum and are noted as one."""
CHUNK = 1 << 20
"""Bytes that a thread reads and checks at once: they stay in its core's cache until they are written."""
SPAN = 1 << 20
"""Bytes of whole rows that are read at once where columns of them are taken."""
_ORDER = ("F32", "BF16", "F16", FP8)
"""Dtypes as the safetensors library sorts them: wider ones first, so that all are aligned."""


class Slot(NamedTuple):
    """A tensor of a rank's file and the part of the source that it is."""

    tensor: Stored
    """As it stands in the file."""
    part: Part
    offset: int
    """Byte in the source tensor at which the rank's part begins."""
    width: int
    """Bytes of a row, where the part is columns; all of the part otherwise."""
    pitch: int
    """Bytes from one row to the next in the source; equal to ``width`` where all is contiguous."""


class RankFile:
    """The file of one rank: a header, then its slots without gaps."""

    def __init__(self, name: str, slots: list[Slot], piece_bytes: int) -> None:
        """``slots`` have their place counted from the end of the header."""
        self.name = name
        self.header = format_header([slot.tensor for slot in slots])
        base = len(self.header)
        self.slots = [s._replace(tensor=s.tensor._replace(start=base + s.tensor.start)) for s in slots]
        self.size = base + sum(slot.tensor.size for slot in slots)
        self.n_pieces = -(-self.size // piece_bytes)
        self._piece_bytes = piece_bytes

    def bounds(self, piece: int) -> tuple[int, int]:
        """First byte of a piece, and the one behind its last."""
        start = piece * self._piece_bytes
        return start, min(start + self._piece_bytes, self.size)

    def slot_at(self, offset: int) -> Slot | None:
        """The slot that holds byte ``offset``; None in the header."""
        place = bisect_right(self._starts, offset) - 1
        return self.slots[place] if place >= 0 else None

    def chunks(self, piece: int) -> Iterator[tuple[int, int]]:
        """First byte and length of the parts of a piece that are moved at once."""
        start, end = self.bounds(piece)
        for at in range(start, end, CHUNK):
            yield at, min(CHUNK, end - at)

    def fill(self, source: Source, at: int, view: memoryview) -> None:
        """Compute the bytes from ``at`` on into ``view``; DsakvError where the source cannot be read."""
        start, end = at, at + len(view)
        while at < end:
            slot = self.slot_at(at)
            if slot is None:
                stop = min(end, len(self.header))
                view[at - start : stop - start] = self.header[at:stop]
            else:
                stop = min(end, slot.tensor.start + slot.tensor.size)
                _fill_slot(source, slot, at - slot.tensor.start, view[at - start : stop - start])
            at = stop

    @cached_property
    def _starts(self) -> list[int]:
        return [slot.tensor.start for slot in self.slots]


class Plan(NamedTuple):
    """The whole result."""

    source: Source
    files: list[RankFile]
    """By rank."""
    piece_bytes: int

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Rank and number of every piece. Ranks take turns: what they need of the source lies close together."""
        for piece in range(max(file.n_pieces for file in self.files)):
            for rank, file in enumerate(self.files):
                if piece < file.n_pieces:
                    yield rank, piece


def make_plan(source: Source, n_ranks: int, piece_bytes: int = PIECE) -> Plan:
    """Lay out the files of ``n_ranks`` ranks.

    Raises InputError where the model does not divide among them.
    """
    check_ranks(source.shape, n_ranks, str(source.directory / "config.json"))
    names = sorted(source.parts, key=lambda name: (_ORDER.index(source.parts[name].tensor.dtype), name))
    for name in names:
        _check_divides(name, source.parts[name], n_ranks)
    ranks: list[list[Slot]] = [[] for _ in range(n_ranks)]
    for name in names:
        part, split = source.parts[name], split_of(name)
        holders = range(n_ranks) if split.expert is None else [split.expert * n_ranks // source.shape.n_routed_experts]
        for rank in holders:
            slots = ranks[rank]
            end = slots[-1].tensor.start + slots[-1].tensor.size if slots else 0
            slots.append(_slot(name, part, split.dim, rank, n_ranks, end))
    files = [RankFile(converted_file(i, n_ranks), slots, piece_bytes) for i, slots in enumerate(ranks)]
    return Plan(source, files, piece_bytes)


def _check_divides(name: str, part: Part, n_ranks: int) -> None:
    dim = split_of(name).dim
    if dim is None or n_ranks == 1 or name.endswith(".scale"):  # scales are divided as their weights are
        return
    tensor = part.tensor
    size = tensor.shape[dim]
    if tensor.dtype == FP8 and size % (n_ranks * BLOCK):
        raise InputError(
            f"tensor {tensor.name} is fp8, and {n_ranks} ranks would cut dimension {dim} of {size} within a block of "
            f"{BLOCK} that shares a scale",
            "give a smaller --model-parallel",
        )
    if size % n_ranks:
        raise InputError(
            f"tensor {tensor.name}: dimension {dim} of {size} does not divide among {n_ranks} ranks",
            "give another --model-parallel",
        )


def _slot(name: str, part: Part, dim: int | None, rank: int, n_ranks: int, start: int) -> Slot:
    """A rank's part of a tensor that is cut along ``dim``, ``start`` bytes behind the header."""
    stored = part.tensor
    shape = list(stored.shape)
    if dim is not None:
        shape[dim] //= n_ranks
    item = ITEM_BYTES[stored.dtype]
    size = math.prod(shape) * item
    tensor = Stored(name, stored.dtype, tuple(shape), start, size)
    if dim == 1 and n_ranks > 1:
        width = shape[1] * item
        return Slot(tensor, part, rank * width, width, stored.shape[1] * item)
    return Slot(tensor, part, rank * size if dim == 0 else 0, size, size)


def _fill_slot(source: Source, slot: Slot, at: int, view: memoryview) -> None:
    """Fill ``view`` with the bytes of the slot from ``at`` on."""
    shard, begin = slot.part.shard, slot.part.tensor.start + slot.offset
    width, pitch = slot.width, slot.pitch
    while view:
        row, inside = divmod(at, width)
        start = begin + row * pitch + inside
        rows = min(len(view) // width, SPAN // pitch) if not inside and pitch != width else 0
        if rows > 1:
            taken = rows * width
            _fill_columns(source, shard, start, view[:taken], rows, pitch)
        else:
            taken = min(width - inside, len(view))
            source.read_into(shard, start, view[:taken])
        at, view = at + taken, view[taken:]


def _fill_columns(source: Source, shard: int, start: int, view: memoryview, rows: int, pitch: int) -> None:
    """Fill ``view`` with the first bytes of each of ``rows`` rows, that are ``pitch`` apart from ``start`` on."""
    span = np.empty(rows * pitch, np.uint8)
    width = len(view) // rows
    source.read_into(shard, start, span.data[: (rows - 1) * pitch + width])
    np.frombuffer(view, np.uint8).reshape(rows, width)[...] = span.reshape(rows, pitch)[:, :width]
