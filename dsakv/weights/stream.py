"""A model whose weights are brought in as they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dsakv.errors import DsakvError, InputError
from dsakv.models.contracts import Model
from dsakv.models.moe import MoE
from dsakv.weights.arena import Arena
from dsakv.weights.budget import Room, cpu_room, cuda_room, plan_of
from dsakv.weights.checkpoint import TensorSource
from dsakv.weights.direct import DirectFiles
from dsakv.weights.expert_cache import Expert, ExpertCache, supply
from dsakv.weights.layout import Layout
from dsakv.weights.load import Progress, silent
from dsakv.weights.options import StreamOptions
from dsakv.weights.placement import WeightsPlan
from dsakv.weights.plan import Reading, plan_loading
from dsakv.weights.slots import Load, Loader, Slot
from dsakv.weights.streamer import Streamer
from dsakv.weights.units import Place, Unit, units_of


class Planned:
    """How a model is going to be streamed; nothing is read yet, its files are open."""

    def __init__(self, model: nn.Module, readings: Sequence[Reading], files: DirectFiles, lies: dict[str, Place],
                 options: StreamOptions, device: torch.device) -> None:  # fmt: skip
        self.files, self.options, self.device = files, options, device
        cuda, layers = device.type == "cuda", list(cast(Model, model).layers)
        self.moes = {i: ffn for i, layer in enumerate(layers) if isinstance(ffn := getattr(layer, "ffn", None), MoE)}
        self.units = units_of(readings, lies, files.sizes, len(layers), options.unit, in_place=not cuda)
        self.room: Room = (cuda_room if cuda else cpu_room)(self.units, options)
        per_token = sum(moe.gate.shape.n_activated for moe in self.moes.values()) if self.units.experts else 0
        self.plan: WeightsPlan = plan_of(self.units, self.room, options, per_token, cuda=cuda)


def plan_stream(
    model: nn.Module, checkpoint: TensorSource, layout: Layout, options: StreamOptions, device: torch.device
) -> Planned:
    """Decide what of ``model`` (on ``meta``) will stay in memory, and how the rest is read.

    Raises:
        InputError: the checkpoint does not fit the model or cannot be read in place, or a budget is too small.
        DsakvError: a file cannot be opened.
    """
    if options.unit == "expert" and not any(isinstance(module, MoE) for module in model.modules()):
        raise InputError("--stream-unit expert, but the model has no routed experts", "use layer or sublayer")
    readings = plan_loading(model, checkpoint, layout, device).readings
    places = checkpoint.locate()
    wanted = {name for r in readings for name in (r.stored, r.scale) if name}
    paths = sorted({places[name].path for name in wanted})
    number = {path: i for i, path in enumerate(paths)}
    lies = {
        name: Place(number[places[name].path], places[name].begin, checkpoint.tensors[name].dtype,
                   checkpoint.tensors[name].shape)
        for name in wanted
    }  # fmt: skip
    stamps = {places[name].path: places[name].stamp for name in wanted}
    files = DirectFiles(
        paths, request=options.io_request, threads=options.io_threads, stamps=[stamps[path] for path in paths]
    )
    try:
        return Planned(model, readings, files, lies, options, device)
    except BaseException:
        files.close()
        raise


def stream(planned: Planned, progress: Progress = silent) -> Streamer:
    """Bring in what stays, and give the model its way to the rest.

    Raises DsakvError where memory or a file fails.
    """
    units, room, device = planned.units, planned.room, planned.device
    loader, arena = Loader(planned.files, device), None
    try:
        arena = Arena(planned.plan.host_bytes, pin=device.type == "cuda")
        slots = [_slot(room.slot_host, room.slot_device, arena, device) for _ in range(room.slots)]
        host = {i: arena.take(units.units[i].raw_bytes) for i in sorted(room.in_host)}
        expert_host = [arena.take(unit.raw_bytes) for unit in [*units.experts.values()][: room.experts_in_host]]
        raw = [*((units.units[i], memory) for i, memory in host.items())]
        raw += zip(units.experts.values(), expert_host, strict=False)
        staying = [units.units[i] for i in sorted(room.on_device)]
        with progress(sum(unit.disk_bytes for unit in [*staying, *(unit for unit, _ in raw)])) as advance:
            for unit, memory in raw:
                loader.files.wait(loader.read(unit, memory), unit.files)
                advance(unit.disk_bytes)
            way = arena.take(room.way) if room.way else None
            for load in _settle(staying, way if way is not None else slots[0].host if slots else None, arena, loader):
                advance(load.unit.disk_bytes)
        streamer = Streamer(units, planned.plan, loader, slots, host, room.on_device, arena)
        if units.experts:
            _supply_experts(planned, expert_host, arena, loader, streamer)
    except BaseException:
        loader.close()
        if arena is not None:
            arena.close()
        raise
    return streamer


def _settle(staying: Sequence[Unit], way: Tensor | None, arena: Arena, loader: Loader) -> Iterator[Load]:
    """Bring units to where they stay, those that are converted by way of ``way``."""
    before: Load | None = None
    for unit in staying:
        if loader.device.type == "cpu" and not unit.converted:
            slot = Slot(arena.take(unit.raw_bytes + unit.ready_bytes), None)
        else:
            assert way is not None, "the plan has room for it"
            unit = unit.whole()
            device = loader.device
            own = arena.take(unit.ready_bytes) if device.type == "cpu" else _on_device(unit.ready_bytes, device)
            slot = Slot(way, own)
            if before is not None:
                before.settle()  # the way is free
        before = loader.start(unit, slot, None)
        loader.wait(before)
        before.put()
        yield before
    if before is not None:
        before.settle()


def _supply_experts(planned: Planned, host: Sequence[Tensor], arena: Arena, loader: Loader, streamer: Streamer) -> None:
    """Let the model's layers ask for their experts."""
    room, options = planned.room, planned.options
    slots = [_slot(room.expert_host, room.expert_device, arena, planned.device) for _ in range(room.expert_slots)]
    experts: list[Expert] = []
    numbers: dict[int, dict[int, int]] = {}
    for i, ((layer, number), unit) in enumerate(planned.units.experts.items()):
        experts.append(Expert(planned.moes[layer].expert(number), unit, host[i] if i < len(host) else None))
        numbers.setdefault(layer, {})[number] = i
    cache = ExpertCache(
        experts, slots, room.experts_kept, options.expert_policy, options.prefetch_depth, loader, streamer.used
    )
    for layer, own in numbers.items():
        planned.moes[layer].bring = supply(cache, own)


def _slot(host: int, device_bytes: int, arena: Arena, device: torch.device) -> Slot:
    return Slot(arena.take(host), None if device.type == "cpu" else _on_device(device_bytes, device))


def _on_device(size: int, device: torch.device) -> Tensor:
    """Raises DsakvError where the device has no room for it."""
    try:
        return torch.empty(size, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise DsakvError(f"{device} has no room for the weights of --device-budget", "lower it") from error
