"""Which weights stay in memory under a budget, and what of it the others pass through. No torch.

A pass over a model needs every unit once, in the same order each time. A cache that keeps what was used last never
holds what is needed next, whatever its size; a set that always stays spares its part of the reading. The units that
stay are spread evenly, so that there is something to compute while each of the others is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from dsakv.errors import InputError

Residency = Literal["static", "lru", "none"]
LEFT_OVER = 128 << 20
"""Bytes of a budget for host memory that steps may compute with: an eighth of it, and at most this."""


class Sizes(NamedTuple):
    """A unit, in bytes of one kind of memory."""

    stays: int
    """Where it stays."""
    passes: int
    """Of a slot that it passes through."""
    way: int
    """That it passes through, once, on its way to where it stays; 0 where it is read there."""


class Kept(NamedTuple):
    """What stays, and the slots for what does not."""

    units: frozenset[int]
    slots: int
    slot_bytes: int
    way: int
    """Bytes that others pass through once to where they stay, because no slot holds them; 0 where one does."""
    n_bytes: int
    """Of all of that."""


def usable(budget: int) -> int:
    """Bytes of a budget for host memory that weights may take."""
    return budget - min(budget // 8, LEFT_OVER)


def keep(units: Sequence[Sizes], budget: int, depth: int, residency: Residency) -> Kept | None:
    """What a budget of so many bytes holds of ``units`` while up to ``depth`` are read ahead; None where it is too
    small.

    The largest units stay first, because slots are as large as the largest one that passes.
    """
    best: Kept | None = None
    best_read = 0
    order = sorted(range(len(units)), key=_spread)
    for limit in sorted({0, *(unit.passes for unit in units)}):
        staying = {i for i, unit in enumerate(units) if unit.passes > limit}
        if residency != "static" and limit < max(unit.passes for unit in units):
            continue
        passing = len(units) - len(staying)
        slots = min(depth + 1, passing)
        way = max((units[i].way for i in staying), default=0)
        room = budget - slots * limit - sum(units[i].stays for i in staying) - _beside(way, limit)
        if room < 0:
            continue
        if residency == "static":
            for i in order:
                longer = max(way, units[i].way)
                cost = units[i].stays + _beside(longer, limit) - _beside(way, limit)
                if i not in staying and cost <= room:
                    staying.add(i)
                    room, way = room - cost, longer
        elif residency == "lru":
            more = min(room // limit, passing - slots)
            slots, room = slots + more, room - more * limit
        passing = len(units) - len(staying)
        slots = min(slots, passing)
        beside = _beside(way, limit if slots else 0)
        n_bytes = sum(units[i].stays for i in staying) + slots * limit + beside
        kept = Kept(frozenset(staying), slots, limit, beside, n_bytes)
        read = sum(unit.passes for i, unit in enumerate(units) if i not in staying)
        if best is None or read < best_read:
            best, best_read = kept, read
    return best


def least(units: Sequence[Sizes], depth: int, residency: Residency) -> int:
    """Bytes of the smallest budget that :meth:`keep` can do with."""
    low, high = 0, sum(unit.stays + unit.passes * (depth + 1) + unit.way for unit in units)
    while low < high:
        middle = (low + high) // 2
        if keep(units, middle, depth, residency) is None:
            low = middle + 1
        else:
            high = middle
    return low


def _beside(way: int, slot: int) -> int:
    """Bytes beside the slots that ``way`` takes."""
    return way if way > slot else 0


def _spread(i: int) -> int:
    """``i`` with its bits in reverse: of numbers in this order, the first so many lie evenly among all."""
    return int(f"{i:032b}"[::-1], 2)


class PlanRow(NamedTuple):
    """All units of a kind."""

    kind: str
    units: int
    stored_bytes: int
    """That their tensors take in the files."""
    on_device: int
    """Units that stay on the device; on CPU that is host memory."""
    in_host: int
    """Units that stay in host memory, and are copied to the device whenever they are needed."""
    on_disk: int


@dataclass(frozen=True, slots=True)
class WeightsPlan:
    """Where weights live, and what moving the others takes. Bytes, unless another unit is named."""

    unit: Literal["layer", "sublayer", "expert"]
    residency: Residency
    prefetch_depth: int
    """Units."""
    rows: list[PlanRow]
    host_bytes: int
    """Of host memory: weights that stay, and what others pass through."""
    device_bytes: int
    """Likewise on the device; 0 on CPU."""
    ahead_bytes: int
    """Read before a pass begins, at most, because the one before it has time to."""
    pass_units: int
    """Units that every pass reads or copies, experts aside."""
    pass_disk_bytes: int
    """Read from disk for them, whole pages."""
    pass_device_bytes: int
    """Copied or converted for them."""
    n_experts: int
    """In all layers, where they are units."""
    expert_slots: int
    """Experts that are kept from one step to the next."""
    experts_per_token: int
    """In all layers."""
    expert_disk_bytes: int
    """Read from disk for one expert, at most."""
    expert_device_bytes: int

    @property
    def reads(self) -> bool:
        """Whether anything is left on disk."""
        return any(row.on_disk for row in self.rows)

    def describe(self) -> dict[str, Any]:
        """As results hold it."""
        return asdict(self) | {"rows": [row._asdict() for row in self.rows]}


def too_small(flag: str, budget: int, needed: int, unit: str) -> InputError:
    """What to say of a budget that does not hold what a step needs at a time."""
    what = {"layer": "a layer", "sublayer": "half a layer", "expert": "half a layer without its experts"}[unit]
    less = " or --stream-unit sublayer" if unit == "layer" else ""
    return InputError(
        f"{flag} of {budget:,} bytes is too small: {what} has to fit, or the embedding, and what is read ahead",
        f"give at least {needed}B, or try --prefetch-depth 0{less}",
    )
