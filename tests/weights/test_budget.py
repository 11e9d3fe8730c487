"""Where units go on CPU and on CUDA, counted byte by byte as streaming takes memory for them. No device is needed."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsakv.errors import InputError
from dsakv.weights.arena import Arena
from dsakv.weights.budget import Room, cpu_room, cuda_room, plan_of
from dsakv.weights.direct import ALIGN, Extent
from dsakv.weights.options import StreamOptions
from dsakv.weights.placement import Residency, WeightsPlan, usable
from dsakv.weights.units import Kind, Unit, Units

RESIDENCIES: list[Residency] = ["static", "lru", "none"]


@st.composite
def units(draw: st.DrawFn, kind: Kind, *, in_place: bool) -> Unit:
    """What is stored as it is needed stays raw where it may; of the rest each byte becomes one, two or four."""
    as_it_is = draw(st.integers(0, 3 * ALIGN)) if in_place else 0
    other = draw(st.integers(not as_it_is, 2 * ALIGN))
    raw = -(-(as_it_is + other) // ALIGN) * ALIGN
    ready = other * draw(st.sampled_from([1, 2, 4]))
    return Unit(kind, [], [(Extent(0, 0, raw), 0)], raw, ready, ready + as_it_is)


@st.composite
def models(draw: st.DrawFn, *, in_place: bool) -> Units:
    layers, tied = draw(st.integers(1, 4)), draw(st.booleans())
    kinds: list[Kind] = ["embedding", *(["layer"] * layers), *([] if tied else ["head"])]  # type: ignore[list-item]
    order = [0, *(i for i in range(1, layers + 1) for _ in range(2)), 0 if tied else layers + 1]
    shapes = [draw(units("expert", in_place=in_place)) for _ in range(draw(st.integers(0, 3)))]
    experts = {(layer, i): shape for layer in range(layers) for i, shape in enumerate(shapes)}
    return Units([draw(units(kind, in_place=in_place)) for kind in kinds], order, experts)


def taken(units: Units, room: Room, plan: WeightsPlan, *, cuda: bool) -> int:
    """Take from an arena of the planned size what streaming does, and count the device's memory; bytes of that."""
    arena, device = Arena(plan.host_bytes, pin=False), 0
    for host, ready, count in (
        (room.slot_host, room.slot_device, room.slots),
        (room.expert_host, room.expert_device, room.expert_slots),
    ):
        for _ in range(count):
            arena.take(host)
            device += ready
    experts = list(units.experts.values())
    for unit in [*(units.units[i] for i in room.in_host), *experts[: room.experts_in_host]]:
        arena.take(unit.raw_bytes)
    arena.take(room.way)
    for i in room.on_device:
        unit = units.units[i]
        if cuda:
            device += unit.whole_bytes
        else:
            arena.take(unit.whole().ready_bytes if unit.converted else unit.raw_bytes + unit.ready_bytes)
    return device


def check_fits(units: Units, room: Room, *, cuda: bool) -> None:
    """Each unit has a place that is large enough for it."""
    behind = 0 if cuda else 1  # on CPU, ready memory lies in the slot
    assert not room.on_device & room.in_host
    passing = [unit for i, unit in enumerate(units.units) if i not in room.on_device]
    from_disk = [unit for i, unit in enumerate(units.units) if i not in room.on_device | room.in_host]
    assert all(unit.raw_bytes + behind * unit.ready_bytes <= room.slot_host for unit in from_disk)
    assert all(unit.ready_bytes <= room.slot_device for unit in passing if cuda)
    assert room.slots >= 1 or not passing
    slot = room.slot_host if room.slots and not cuda else 0
    assert all(units.units[i].raw_bytes <= max(room.way, slot) or not (cuda or units.units[i].converted)
               for i in room.on_device)  # fmt: skip
    experts = list(units.experts.values())
    assert all(u.raw_bytes + behind * u.ready_bytes <= room.expert_host for u in experts[room.experts_in_host :])
    assert all(unit.ready_bytes <= room.expert_device for unit in experts if cuda)


def check_slots(units: Units, room: Room, options: StreamOptions) -> None:
    """Reading ahead has its slots beside those of experts that are kept."""
    n, fewest = len(units.experts), min(options.prefetch_depth + 1, len(units.experts))
    assert room.expert_slots in (room.experts_kept + fewest, n)
    assert 0 <= room.experts_kept <= room.expert_slots <= n
    assert room.experts_kept == n or room.expert_slots == room.experts_kept + fewest
    assert room.experts_kept == 0 or options.residency != "none"
    passing = len(units.units) - len(room.on_device)
    assert room.slots >= min(options.prefetch_depth + 1, passing)


SHARES = st.none() | st.floats(0, 1.5)
"""Of what all units take; None is no limit."""


def budget_of(units: Units, share: float | None) -> int | None:
    every = [*units.units, *units.experts.values()]
    return None if share is None else int(share * sum(unit.raw_bytes + unit.ready_bytes for unit in every))


@settings(max_examples=200)
@given(models(in_place=True), SHARES, st.integers(0, 3), st.sampled_from(RESIDENCIES))
def test_host_memory_alone(units: Units, share: float | None, depth: int, residency: Residency) -> None:
    budget = budget_of(units, share)
    options = StreamOptions(host_budget=budget, unit="expert", residency=residency, prefetch_depth=depth)
    try:
        room = cpu_room(units, options)
    except InputError as error:
        assert budget is not None
        needed = at_least(error, "--host-budget")
        assert needed > budget
        cpu_room(units, replace(options, host_budget=needed))
        with pytest.raises(InputError, match="too small"):
            cpu_room(units, replace(options, host_budget=needed - 1))
        return
    plan = plan_of(units, room, options, 3, cuda=False)
    assert budget is None or plan.host_bytes <= usable(budget)
    assert taken(units, room, plan, cuda=False) == plan.device_bytes == 0
    check_fits(units, room, cuda=False)
    check_slots(units, room, options)
    check_plan(units, room, plan)
    if budget is None and residency == "static":
        assert plan.pass_units == 0
        assert room.experts_kept == len(units.experts)


@settings(max_examples=300)
@given(models(in_place=False), SHARES, SHARES, st.integers(0, 3), st.sampled_from(RESIDENCIES))
def test_host_and_device_memory(
    units: Units, host_share: float | None, device_share: float | None, depth: int, residency: Residency
) -> None:
    host, device = budget_of(units, host_share), budget_of(units, device_share)
    options = StreamOptions(host, device, "expert", residency, prefetch_depth=depth)
    try:
        room = cuda_room(units, options)
    except InputError as error:
        if "--host-budget" in error.message:
            needed = at_least(error, "--host-budget")
            enough, less = (replace(options, host_budget=n) for n in (needed, needed - 1))
            assert needed > (host or 0)
        else:
            needed = at_least(error, "--device-budget")
            enough, less = (replace(options, host_budget=None, device_budget=n) for n in (needed, needed - 1))
            assert needed > (device or 0)
        cuda_room(units, enough)
        with pytest.raises(InputError, match="too small"):
            cuda_room(units, less)
        return
    plan = plan_of(units, room, options, 3, cuda=True)
    assert host is None or plan.host_bytes <= usable(host)
    assert device is None or plan.device_bytes <= device
    assert taken(units, room, plan, cuda=True) <= plan.device_bytes
    check_fits(units, room, cuda=True)
    check_slots(units, room, options)
    check_plan(units, room, plan)
    if host is None:
        assert plan.pass_disk_bytes == 0
        assert room.experts_in_host == len(units.experts)


def check_plan(units: Units, room: Room, plan: WeightsPlan) -> None:
    """Every unit is in one place, and what is not in memory is read as often as a pass comes to it."""
    every = [*units.units, *units.experts.values()]
    assert sum(row.units for row in plan.rows) == len(every)
    for row in plan.rows:
        assert row.units == sum(unit.kind == row.kind for unit in every)
        assert row.on_device + row.in_host + row.on_disk == row.units
    moved = [unit for visit, unit in enumerate(units.order) if unit not in {*room.on_device, units.order[visit - 1]}]
    if plan.residency == "lru" and room.slots == len(set(moved)):
        moved = []
    assert plan.pass_units == len(moved)
    assert plan.pass_disk_bytes == sum(units.units[i].raw_bytes for i in moved if i not in room.in_host)
    assert plan.pass_device_bytes == sum(units.units[i].moved_bytes for i in moved)


def at_least(error: InputError, flag: str) -> int:
    assert flag in error.message
    found = re.search(r"at least ([\d,]+)B", error.hint)
    assert found is not None
    return int(found[1].replace(",", ""))
