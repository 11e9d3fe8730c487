"""What a model's weights come to under the budgets of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dsakv.weights.direct import ALIGN
from dsakv.weights.options import StreamOptions
from dsakv.weights.placement import Kept, PlanRow, Sizes, WeightsPlan, keep, least, too_small, usable
from dsakv.weights.units import Unit, Units

UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True)
class Room:
    """Which units stay where, and the slots for the others. Experts go by their place in ``Units.experts``."""

    on_device: frozenset[int]
    """On CPU: in host memory."""
    slots: int
    in_host: frozenset[int]
    """CUDA: raw."""
    way: int
    """Bytes of host memory that some pass through once, on their way to where they stay; 0 where slots serve."""
    experts_in_host: int
    """CUDA: the first so many, raw."""
    expert_slots: int
    experts_kept: int
    """Of the slots."""
    slot_host: int
    """Bytes of a slot, as the next ones."""
    slot_device: int
    expert_host: int
    expert_device: int


def cpu_room(units: Units, options: StreamOptions) -> Room:
    """Everything in host memory. Raises InputError where the budget does not hold what a step needs at a time."""
    budget = UNLIMITED if options.host_budget is None else usable(options.host_budget)
    experts = list(units.experts.values())
    size = max((_passes(unit) for unit in experts), default=0)
    sizes = [Sizes(_stays(unit), _passes(unit), unit.raw_bytes if unit.converted else 0) for unit in units.units]
    kept, slots, held = _share(sizes, budget, size, len(experts), options, "--host-budget", options.host_budget or 0)
    return Room(kept.units, kept.slots, frozenset(), kept.way, 0, slots, held, kept.slot_bytes, 0, size, 0)


def cuda_room(units: Units, options: StreamOptions) -> Room:
    """Ready weights on the device, raw ones in host memory. Raises InputError as :func:`cpu_room` does."""
    budget = UNLIMITED if options.device_budget is None else options.device_budget
    experts = list(units.experts.values())
    size = max((_pages(unit.whole_bytes) for unit in experts), default=0)
    ready = [_pages(unit.whole_bytes) for unit in units.units]
    sizes = [Sizes(n_bytes, n_bytes, 0) for n_bytes in ready]
    kept, slots, held = _share(sizes, budget, size, len(experts), options, "--device-budget", budget)
    passing = [i for i in range(len(units.units)) if i not in kept.units]
    raw = [Sizes(units.units[i].raw_bytes, units.units[i].raw_bytes, 0) for i in passing]
    expert_raw = max((unit.raw_bytes for unit in experts), default=0)
    way = max((units.units[i].raw_bytes for i in kept.units), default=0)  # what stays on the device came through here
    room = (UNLIMITED if options.host_budget is None else usable(options.host_budget)) - way
    depth = max(kept.slots - 1, 0)  # a slot of the device has one in host memory, and so have those of experts
    bare = least(raw, depth, "static") if passing else 0
    fewest = min(options.prefetch_depth + 1, len(experts))
    if room < bare + fewest * expert_raw:
        needed = _gross(way + bare + fewest * expert_raw)
        raise too_small("--host-budget", options.host_budget or 0, needed, options.unit)
    if slots * expert_raw > room - bare:
        slots = (room - bare) // expert_raw
        held = slots - fewest if held else 0
    room -= slots * expert_raw
    found = keep(raw, room, depth, "static") if passing else Kept(frozenset(), 0, 0, 0, 0)
    assert found is not None, "there is room for the least"
    room -= found.n_bytes
    in_host = min(room // expert_raw, len(experts)) if expert_raw else 0
    if room + slots * expert_raw >= len(experts) * expert_raw:  # slots need no host memory then
        in_host = len(experts)
    on_disk = len(found.units) < len(passing)
    return Room(
        on_device=kept.units,
        slots=kept.slots,
        in_host=frozenset(passing[i] for i in found.units),
        way=way,
        experts_in_host=in_host,
        expert_slots=slots,
        experts_kept=held,
        slot_host=found.slot_bytes if on_disk else 0,
        slot_device=kept.slot_bytes,
        expert_host=expert_raw if in_host < len(experts) else 0,
        expert_device=size,
    )


def _share(
    sizes: Sequence[Sizes], budget: int, expert: int, n_experts: int, options: StreamOptions, flag: str, asked: int
) -> tuple[Kept, int, int]:
    """What is kept of the units that every pass needs, then slots for experts of ``expert`` bytes, and how many of
    them stay.
    """
    depth = options.prefetch_depth
    passing = min(depth + 1, n_experts)
    kept = keep(sizes, budget - passing * expert, depth, options.residency)
    if kept is None:
        needed = least(sizes, depth, options.residency) + passing * expert
        raise too_small(flag, asked, _gross(needed) if flag == "--host-budget" else needed, options.unit)
    if options.residency == "none" or not n_experts:
        return kept, passing, 0
    left = budget - kept.n_bytes
    if n_experts * expert <= left:
        return kept, n_experts, n_experts
    held = left // expert - passing
    return kept, passing + held, held


def _gross(needed: int) -> int:
    """The budget of which ``needed`` bytes are usable."""
    budget = needed
    while usable(budget) < needed:
        budget += needed - usable(budget)
    return budget


def plan_of(units: Units, room: Room, options: StreamOptions, experts_per_token: int, *, cuda: bool) -> WeightsPlan:
    """What is going to be where, and how much moves."""
    experts = list(units.experts.values())
    places = [_place(i, room) for i in range(len(units.units))]
    every = [(unit, place) for unit, place in zip(units.units, places, strict=True)]
    every += [(unit, "host" if i < room.experts_in_host else "disk") for i, unit in enumerate(experts)]
    rows = []
    for kind in dict.fromkeys(unit.kind for unit, _ in every):
        of = [(unit, place) for unit, place in every if unit.kind == kind]
        where = Counter(place for _, place in of)
        stored = sum(unit.stored_bytes for unit, _ in of)
        rows.append(PlanRow(kind, len(of), stored, where["device"], where["host"], where["disk"]))
    moved = [i for i, place in enumerate(places) if place != "device"]
    read = [i for i in moved if places[i] == "disk"]
    again = options.residency == "lru" and room.slots >= len(moved)  # all of them have a slot
    staying = sum(_pages(units.units[i].whole_bytes) if cuda else _stays(units.units[i]) for i in room.on_device)
    slots = room.slots * room.slot_host + room.expert_slots * room.expert_host + room.way
    device = room.slots * room.slot_device + room.expert_slots * room.expert_device
    raw = sum(units.units[i].raw_bytes for i in room.in_host) + sum(
        u.raw_bytes for u in experts[: room.experts_in_host]
    )
    return WeightsPlan(
        unit=options.unit,
        residency=options.residency,
        prefetch_depth=options.prefetch_depth,
        rows=rows,
        host_bytes=slots + raw + (0 if cuda else staying),
        device_bytes=device + staying if cuda else 0,
        ahead_bytes=_ahead(units, read, room, options),
        pass_units=0 if again else len(moved),
        pass_disk_bytes=0 if again else sum(units.units[i].disk_bytes for i in read),
        pass_device_bytes=0 if again else sum(units.units[i].moved_bytes for i in moved),
        n_experts=len(experts),
        expert_slots=room.experts_kept,
        experts_per_token=experts_per_token,
        expert_disk_bytes=max((unit.disk_bytes for unit in experts), default=0),
        expert_device_bytes=max((unit.moved_bytes for unit in experts), default=0),
    )


def _ahead(units: Units, read: Sequence[int], room: Room, options: StreamOptions) -> int:
    """What may be read before a pass begins: one unit more than planned, where the last one to be used stays."""
    depth = options.prefetch_depth
    return (depth + (depth > 0 and bool(room.on_device))) * max((units.units[i].disk_bytes for i in read), default=0)


def _place(unit: int, room: Room) -> str:
    if unit in room.on_device:
        return "device"
    return "host" if unit in room.in_host else "disk"


def _stays(unit: Unit) -> int:
    """Bytes of host memory of a unit that stays there to be computed with."""
    return _pages(unit.whole_bytes) if unit.converted else _passes(unit)


def _passes(unit: Unit) -> int:
    """Bytes of a slot in host memory that a unit passes through to be computed with."""
    return _pages(unit.raw_bytes + unit.ready_bytes)


def _pages(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
