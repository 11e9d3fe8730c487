"""What is read at a time: the parameters of a layer, of half a layer or of an expert, and where their bytes lie."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dsakv.weights.checkpoint import Part
from dsakv.weights.direct import ALIGN, Extent, aligned
from dsakv.weights.fill import fill_tensor
from dsakv.weights.plan import DTYPES, Reading

Kind = Literal["embedding", "layer", "attention", "feed-forward", "expert", "head"]
UnitName = Literal["layer", "sublayer", "expert"]
NUMBERS = 64
"""Bytes that parameters begin at a multiple of, as torch's own do. Those that stay as they are stored lie to it as in
the file, from where a loaded model has them mapped: by the address of weights the CPU's kernels add up in other orders.
"""
_NAME = re.compile(r"layers\.(\d+)\.(?:(attn)|ffn\.experts\.(\d+)|ffn)")


class Place(NamedTuple):
    """Where a stored tensor is."""

    file: int
    begin: int
    dtype: str
    shape: tuple[int, ...]


class _Piece(NamedTuple):
    """Bytes of a unit's raw memory that are a tensor."""

    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def of(self, raw: Tensor) -> Tensor:
        """The tensor within ``raw`` ``[bytes]`` uint8; a copy where torch has no tensors at such addresses."""
        part = raw[self.begin : self.begin + self.n_bytes]
        if (part.data_ptr() % self.dtype.itemsize) or (part.storage_offset() % self.dtype.itemsize):
            part = part.clone()
        return part.view(self.dtype).view(self.shape)


class _Weight(NamedTuple):
    """A parameter of a unit."""

    reading: Reading
    stored: _Piece
    scale: _Piece | None
    ready: int | None
    """Where in the unit's ready memory its numbers go; None where the raw ones are as they are needed."""
    whole: int
    """Where they go in ready memory that holds all parameters."""
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class Unit:
    """Parameters that are read together into raw memory, and converted into ready memory as far as they have to be."""

    kind: Kind
    weights: list[_Weight]
    extents: list[tuple[Extent, int]]
    """What of the files is read, and to which byte of the raw memory."""
    raw_bytes: int
    """Of raw memory, whole pages."""
    ready_bytes: int
    """Of ready memory."""
    whole_bytes: int
    """Of ready memory that would take all of its parameters."""

    @property
    def disk_bytes(self) -> int:
        """What the system is asked for."""
        return sum(extent.end - extent.begin for extent, _ in self.extents)

    @property
    def stored_bytes(self) -> int:
        """What its tensors take in the files."""
        pieces = [piece for w in self.weights for piece in (w.stored, w.scale) if piece is not None]
        return sum(piece.n_bytes for piece in pieces)

    @property
    def moved_bytes(self) -> int:
        """Stored bytes of what does not stay as it was read: what is converted, or copied to a device."""
        return sum(
            w.shape.numel() * w.stored.dtype.itemsize + (w.scale.n_bytes if w.scale else 0)
            for w in self.weights
            if w.ready is not None
        )

    @property
    def converted(self) -> bool:
        """Whether raw memory is of little use once ready memory is filled."""
        return self.ready_bytes * 2 > self.whole_bytes

    @property
    def files(self) -> set[int]:
        return {extent.file for extent, _ in self.extents}

    def whole(self) -> Unit:
        """The same, with all of its parameters in ready memory: nothing is left in the raw one then."""
        weights = [w._replace(ready=w.whole) for w in self.weights]
        return replace(self, weights=weights, ready_bytes=self.whole_bytes)

    def convert(self, raw: Tensor, ready: Tensor) -> None:
        """Fill ``ready`` ``[ready_bytes]`` from ``raw`` ``[raw_bytes]``, both uint8."""
        for weight in self.weights:
            if weight.ready is not None:
                fill_tensor(_at(ready, weight.ready, weight), *_stored(weight, raw))

    def put(self, raw: Tensor, ready: Tensor) -> None:
        """Give the model its parameters, as they lie in ``raw`` and ``ready``."""
        for weight in self.weights:
            value = weight.stored.of(raw) if weight.ready is None else _at(ready, weight.ready, weight)
            _set(weight.reading, value)

    def take(self) -> None:
        """Take the parameters from the model: whoever uses them now fails."""
        for weight in self.weights:
            _set(weight.reading, torch.empty(weight.shape, dtype=weight.dtype, device="meta"))


@dataclass(frozen=True)
class Units:
    """All units of a model, and the order in which a pass over it asks for them."""

    units: list[Unit]
    order: list[int]
    """The unit of each visit: of the embedding, of attention and feed-forward of each layer, of the head. Visits of one
    unit follow each other, a tied head's and the next pass's embedding too: a pass reads no unit twice."""
    experts: dict[tuple[int, int], Unit]
    """Those that are units of their own, by layer and number."""


def units_of(
    readings: Iterable[Reading],
    located: Mapping[str, Place],
    sizes: Sequence[int],
    n_layers: int,
    unit: UnitName,
    *,
    in_place: bool,
) -> Units:
    """Group the parameters of a model of ``n_layers`` layers.

    ``located`` tells where stored tensors are, ``sizes`` how many bytes the files have. ``in_place``: whether
    parameters that are stored as they are needed may stay where they were read to.
    """
    groups: dict[tuple[Kind, int], list[Reading]] = {}
    experts: dict[tuple[int, int], list[Reading]] = {}
    for reading in readings:
        match = _NAME.match(reading.name)
        if match and match[3] and unit == "expert":
            experts.setdefault((int(match[1]), int(match[3])), []).append(reading)
            continue
        kind: Kind = "head" if match is None else "layer"
        if reading.name.startswith("embed."):
            kind = "embedding"
        elif match and unit != "layer":
            kind = "attention" if match[2] else "feed-forward"
        groups.setdefault((kind, int(match[1]) if match else 0), []).append(reading)
    if not any(reading.name.startswith("head.") for reading in groups["head", 0]):  # it is the embedding once more
        groups["head", 0] += groups.pop(("embedding", 0))
        groups["embedding", 0] = groups["head", 0]
    halves: tuple[Kind, Kind] = ("layer", "layer") if unit == "layer" else ("attention", "feed-forward")
    visits = [("embedding", 0), *((kind, i) for i in range(n_layers) for kind in halves), ("head", 0)]
    units: list[Unit] = []
    number: dict[int, int] = {}  # by the identity of the group
    order = []
    for kind, layer in visits:
        group = groups[kind, layer]
        if id(group) not in number:
            number[id(group)] = len(units)
            units.append(_unit(kind, group, located, sizes, in_place=in_place))
        order.append(number[id(group)])
    own = {key: _unit("expert", group, located, sizes, in_place=in_place) for key, group in sorted(experts.items())}
    return Units(units, order, own)


def _unit(
    kind: Kind, readings: Sequence[Reading], located: Mapping[str, Place], sizes: Sequence[int], *, in_place: bool
) -> Unit:
    wanted = {reading.stored: _part(reading.part, located[reading.stored]) for reading in readings}
    wanted |= {reading.scale: located[reading.scale] for reading in readings if reading.scale}
    extents, places, raw_bytes = _extents(wanted, sizes)
    weights: list[_Weight] = []
    ready = whole = 0
    for reading in readings:
        parameter: nn.Parameter = getattr(reading.owner, reading.leaf)
        stored = places[reading.stored]
        as_it_is = (
            in_place
            and reading.scale is None
            and (stored.dtype, stored.shape) == (parameter.dtype, tuple(parameter.shape))
            and stored.begin % stored.dtype.itemsize == 0
        )
        scale = places[reading.scale] if reading.scale else None
        begin = whole + (stored.begin % NUMBERS if as_it_is else 0)
        own = None if as_it_is else ready
        weights.append(_Weight(reading, stored, scale, own, begin, parameter.shape, parameter.dtype))
        size = parameter.numel() * parameter.dtype.itemsize
        whole, ready = _up(begin + size, NUMBERS), ready if as_it_is else _up(ready + size, NUMBERS)
    return Unit(kind, weights, extents, raw_bytes, ready, whole)


def _part(part: Part, whole: Place) -> Place:
    """What has to be read for a part: its rows, or where it is no range of bytes the whole tensor."""
    if part.dim != 0 or part.total == 1:
        return whole
    shape = (whole.shape[0] // part.total, *whole.shape[1:])
    size = math.prod(shape) * DTYPES[whole.dtype].itemsize
    return whole._replace(begin=whole.begin + part.number * size, shape=shape)


def _extents(
    wanted: Mapping[str, Place], sizes: Sequence[int]
) -> tuple[list[tuple[Extent, int]], dict[str, _Piece], int]:
    """Pages that hold ``wanted``, each with its place in raw memory; where each tensor then is; bytes in all."""
    extents: list[tuple[Extent, int]] = []
    pieces: dict[str, _Piece] = {}
    raw = 0
    for name, (file, begin, kind, shape) in sorted(wanted.items(), key=lambda item: item[1][:2]):
        dtype = DTYPES[kind]
        first, last = aligned(begin, begin + math.prod(shape) * dtype.itemsize, sizes[file])
        (file_before, start, end), place = extents[-1] if extents else (Extent(-1, 0, 0), 0)
        if file_before == file and first <= _up(end, ALIGN):
            extents[-1] = Extent(file, start, max(end, last)), place
        else:
            start, place = first, raw
            extents.append((Extent(file, first, last), place))
        raw = place + _up(extents[-1][0].end - start, ALIGN)
        pieces[name] = _Piece(place + begin - start, dtype, shape)
    return extents, pieces, raw


def _stored(weight: _Weight, raw: Tensor) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
    """A parameter's stored numbers, its scales, and where in the whole tensor the numbers begin."""
    stored, part = weight.stored.of(raw), weight.reading.part
    if part.dim is not None and stored.shape != weight.shape:
        size = weight.shape[part.dim]
        stored = stored.narrow(part.dim, part.number * size, size)
    return stored, weight.scale.of(raw) if weight.scale else None, part.start(weight.shape)


def _at(memory: Tensor, begin: int, weight: _Weight) -> Tensor:
    size = weight.shape.numel() * weight.dtype.itemsize
    return memory[begin : begin + size].view(weight.dtype).view(weight.shape)


def _set(reading: Reading, value: Tensor) -> None:
    reading.owner._parameters[reading.leaf] = nn.Parameter(value, requires_grad=False)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
