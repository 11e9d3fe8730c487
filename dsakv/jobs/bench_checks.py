"""What no honest result can be: faster than the link that its bytes came over, or at odds with its own counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dsakv.jobs.bench_log import Pass, RoundLog

NEAREST = 0.9
"""Share of its bound that a pass must take at least; the rest is for the error of the measured speed."""
ROUNDING_US = 2.0
ROUNDING = 1e-3
"""What times may differ by, absolute and as a share: they are taken from several clocks' readings, and rounded."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the links of this machine can do, measured in the same run, and what the plan says; None where unknown."""

    disk_bytes_per_s: float | None = None
    device_bytes_per_s: float | None = None
    ahead_bytes: int = 0
    """Weights that may have been read before a pass began, and so need no time in it."""
    pass_disk_bytes: int | None = None
    """What every pass reads, experts aside; None where the plan leaves it open."""

    @classmethod
    def of(cls, disk: float | None, device: float | None, plan: Mapping[str, Any] | None) -> Limits:
        """By the speeds of the links and the plan of the weights, None where all are loaded."""
        if plan is None:
            return cls(disk, device)
        fixed = None if plan["residency"] == "lru" else plan["pass_disk_bytes"]
        return cls(disk, device, plan["ahead_bytes"], fixed)


def physical_bound(disk_bytes: int, device_bytes: int, limits: Limits) -> float | None:
    """Microseconds that it takes at least to move so many bytes, less those ahead; None where no speed is known.

    Links work side by side, so that the slowest counts alone.
    """
    pairs = (disk_bytes, limits.disk_bytes_per_s), (device_bytes, limits.device_bytes_per_s)
    times = [max(0, size - limits.ahead_bytes) / speed * 1e6 for size, speed in pairs if speed]
    return max(times) if times else None


def bounds(rounds: Sequence[Sequence[Pass]], limits: Limits) -> dict[str, float | None]:
    """Milliseconds that the passes of all rounds must take, what they took, and the second over the first.

    What is read ahead of one pass is read in the one before: of each round only the first has a start.
    """
    must = [bound for passes in rounds if (bound := _bound(passes, limits)) is not None]
    bound_ms, wall_ms = sum(must) / 1e3 if must else None, sum(one.wall_us for passes in rounds for one in passes) / 1e3
    return {"bound_ms": bound_ms, "wall_ms": wall_ms, "wall_to_bound": wall_ms / bound_ms if bound_ms else None}


def _bound(passes: Sequence[Pass], limits: Limits) -> float | None:
    """Microseconds that these passes, one after the other, take at least; None where that is not known."""
    moved = [one.weights for one in passes if one.weights is not None]
    if not moved:
        return None
    return physical_bound(sum(one.disk_bytes for one in moved), sum(one.device_bytes for one in moved), limits)


def rejections(log: RoundLog, place: str, new_tokens: int, limits: Limits, *, first: bool = False) -> list[str]:
    """Why the round at ``place``, which should have given ``new_tokens`` for each request, cannot be right.

    ``first``: whether none came before. Its first pass may read a head once more that is the embedding, too.
    """
    found = []
    for request_id, times in log.token_s.items():
        if len(times) != new_tokens:
            found.append(f"{place}: request {request_id} has {len(times)} new tokens, not {new_tokens}")
        if any(b < a for a, b in pairwise([log.begin_s, *times])):
            found.append(f"{place}: request {request_id} has a token before the one that it follows")
    if (walls := sum(one.wall_us for one in log.passes)) > _slack((log.end_s - log.begin_s) * 1e6, len(log.passes)):
        found.append(f"{place}: its passes take {walls / 1e3:.3f} ms, the round {(log.end_s - log.begin_s) * 1e3:.3f}")
    took, bound = sum(one.wall_us for one in log.passes), _bound(log.passes, limits)
    if bound is not None and took < NEAREST * bound - ROUNDING_US:
        found.append(f"{place}: its passes take {took / 1e3:.3f} ms, their bytes {bound / 1e3:.3f} ms at least")
    numbers: dict[str, int] = {}
    for one in log.passes:
        number = numbers[one.kind] = numbers.get(one.kind, -1) + 1
        name = f"decode step {number}" if one.kind == "decode" else f"prefill pass {number}"
        found += [f"{place}, {name}: {fault}" for fault in _faults(one, limits, first=first and one is log.passes[0])]
    return found


def _faults(one: Pass, limits: Limits, *, first: bool) -> list[str]:
    found = []
    times = {f"reads from {name}": one.pool(name).read_us for name in ("local_pool", "remote_pool")}
    if (weights := one.weights) is not None:
        times |= {"the disk": weights.disk_us, "the device's link": weights.device_us, "waiting": weights.wait_us}
        if weights.disk_bytes != weights.planned_bytes:
            found.append(f"{weights.disk_bytes:,} bytes were read, the plan says {weights.planned_bytes:,}")
        fixed = weights.disk_bytes - weights.expert_bytes
        if limits.pass_disk_bytes not in (None, fixed) and not first:
            found.append(f"{fixed:,} bytes were read, experts aside; a pass should read {limits.pass_disk_bytes:,}")
        bound = physical_bound(weights.disk_bytes, weights.device_bytes, limits)
        if bound is not None and one.wall_us < NEAREST * bound - ROUNDING_US:
            found.append(
                f"{one.wall_us / 1e3:.3f} ms is less than {NEAREST:.0%} of the {bound / 1e3:.3f} ms that its "
                f"{max(weights.disk_bytes, weights.device_bytes):,} bytes must take"
            )
    for what, us in times.items():
        if us < 0:
            found.append(f"{what} took {us / 1e3:.3f} ms, which is less than nothing")
        if us > _slack(one.wall_us, 1):
            found.append(f"{what} took {us / 1e3:.3f} ms of {one.wall_us / 1e3:.3f} ms")
    return found


def _slack(us: float, parts: int) -> float:
    return us * (1 + ROUNDING) + ROUNDING_US * parts
