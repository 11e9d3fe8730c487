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
class Speeds:
    """What the links of this machine can do, measured in the same run; None where that is not known."""

    disk_bytes_per_s: float | None = None
    device_bytes_per_s: float | None = None
    ahead_bytes: int = 0
    """Weights that may have been read before a pass began, and so need no time in it: those of the units ahead."""


def physical_bound(disk_bytes: int, device_bytes: int, speeds: Speeds) -> float | None:
    """Microseconds that a pass must take which moves so many bytes; None where no speed is known.

    Links work side by side, so that the slowest counts alone.
    """
    pairs = (disk_bytes, speeds.disk_bytes_per_s), (device_bytes, speeds.device_bytes_per_s)
    times = [max(0, size - speeds.ahead_bytes) / speed * 1e6 for size, speed in pairs if speed]
    return max(times) if times else None


def bounds(passes: Sequence[Pass], speeds: Speeds) -> dict[str, float | None]:
    """Milliseconds that these passes must take in all, what they took, and the second over the first."""
    must = [
        bound
        for one in passes
        if one.weights is not None
        and (bound := physical_bound(one.weights.disk_bytes, one.weights.device_bytes, speeds)) is not None
    ]
    bound_ms, wall_ms = sum(must) / 1e3 if must else None, sum(one.wall_us for one in passes) / 1e3
    return {"bound_ms": bound_ms, "wall_ms": wall_ms, "wall_to_bound": wall_ms / bound_ms if bound_ms else None}


def rejections(log: RoundLog, place: str, new_tokens: int, speeds: Speeds) -> list[str]:
    """Why the round at ``place``, which should have given ``new_tokens`` for each request, cannot be right."""
    found = []
    for request_id, times in log.token_s.items():
        if len(times) != new_tokens:
            found.append(f"{place}: request {request_id} has {len(times)} new tokens, not {new_tokens}")
        if any(b < a for a, b in pairwise([log.begin_s, *times])):
            found.append(f"{place}: request {request_id} has a token before the one that it follows")
    if (walls := sum(one.wall_us for one in log.passes)) > _slack((log.end_s - log.begin_s) * 1e6, len(log.passes)):
        found.append(f"{place}: its passes take {walls / 1e3:.3f} ms, the round {(log.end_s - log.begin_s) * 1e3:.3f}")
    numbers: dict[str, int] = {}
    for one in log.passes:
        number = numbers[one.kind] = numbers.get(one.kind, -1) + 1
        name = f"decode step {number}" if one.kind == "decode" else f"prefill pass {number}"
        found += [f"{place}, {name}: {fault}" for fault in _faults(one, speeds)]
    return found


def _faults(one: Pass, speeds: Speeds) -> list[str]:
    found = []
    times = {f"reads from {name}": one.pool(name).read_us for name in ("local_pool", "remote_pool")}
    if (weights := one.weights) is not None:
        times |= {"the disk": weights.disk_us, "the device's link": weights.device_us, "waiting": weights.wait_us}
        if weights.disk_bytes != weights.planned_bytes:
            found.append(f"{weights.disk_bytes:,} bytes were read, the plan says {weights.planned_bytes:,}")
        bound = physical_bound(weights.disk_bytes, weights.device_bytes, speeds)
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


def ahead_bytes(plan: Mapping[str, Any] | None) -> int:
    """What may be read before a pass begins, by the plan of its weights: so many units ahead, of the largest kind.

    One more than planned where the pass before ends with a unit that stays.
    """
    if not plan:
        return 0
    sizes = [row["stored_bytes"] / row["units"] for row in plan["rows"] if row["on_disk"]]
    depth = plan["prefetch_depth"]
    stays = any(row["on_device"] for row in plan["rows"])
    return int((depth + (depth > 0 and stays)) * max(sizes, default=0.0))
