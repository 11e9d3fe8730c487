"""Rounds put together: median, extremes and spread of every figure, and whether the machine kept its pace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

DRIFT = 0.1
"""Share by which the halves of a run may differ before the machine counts as another one."""
STATISTICS = ("median", "min", "max", "spread")
LEFT_OUT = frozenset({"transfers", "output_digest"})
"""Of a round: what is kept for it alone."""
DRIFT_RULE = (
    "Compared are the medians of the second half of the rounds and of the first, without the middle one of an odd "
    f"number; flagged where the time of a round, its prefill or its median decode step differs by over {DRIFT:.0%}, "
    "or the disk's speed before and after all rounds."
)


def statistics(values: Sequence[float | None]) -> dict[str, float | None]:
    """``median``, ``min``, ``max`` and ``spread``, which is ``(max - min) / median``; None without values.

    One value has no spread: None, and not 0, which would look steady.
    """
    known = [value for value in values if value is not None]
    if not known:
        return dict.fromkeys(STATISTICS)
    middle, low, high = median(known), min(known), max(known)
    spread = (high - low) / middle if middle and len(known) > 1 else None
    return {"median": middle, "min": low, "max": high, "spread": spread}


def summarize(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The tree of figures that each of ``rounds`` is, with the statistics over rounds in the place of every number."""
    found: dict[str, Any] = {}
    for name, value in rounds[0].items():
        if name in LEFT_OUT:
            continue
        column = [one[name] for one in rounds]
        found[name] = summarize(column) if isinstance(value, Mapping) else statistics(column)
    return found


def medians(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The same tree with the medians alone."""
    return {
        name: value["median"] if set(value) == set(STATISTICS) else medians(value) for name, value in summary.items()
    }


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float | None]:
    """The figures of a round by their path, as ``ttft_ms.mean``."""
    found: dict[str, float | None] = {}
    for name, value in tree.items():
        if name in LEFT_OUT:
            continue
        if isinstance(value, Mapping):
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def drift(rounds: Sequence[Mapping[str, Any]], disk_bytes_per_s: Sequence[float] = ()) -> dict[str, Any]:
    """How the machine changed over a run; ``disk_bytes_per_s`` is the disk's speed before and after it, if known.

    ``flag`` is None where neither is there to compare: one round tells nothing about change.
    """
    half = len(rounds) // 2
    watched = {
        "e2e_ms": [one["e2e_ms"] for one in rounds],
        "prefill_ms": [one["prefill_ms"] for one in rounds],
        "decode_step_ms": [one["decode_step_ms"]["p50"] for one in rounds],
    }
    changes: dict[str, float | None] = {
        name: _change(values[:half], values[len(values) - half :]) if half else None for name, values in watched.items()
    }
    changes["disk"] = _change(disk_bytes_per_s[:1], disk_bytes_per_s[-1:]) if len(disk_bytes_per_s) > 1 else None
    known = [change for change in changes.values() if change is not None]
    return {
        "change": changes,
        "threshold": DRIFT,
        "rule": DRIFT_RULE,
        "flag": any(abs(change) > DRIFT for change in known) if known else None,
    }


def _change(before: Sequence[float | None], after: Sequence[float | None]) -> float | None:
    """By what share the median grew."""
    first, second = (
        median(known) if (known := [v for v in half if v is not None]) else None for half in (before, after)
    )
    return second / first - 1 if first and second is not None else None
