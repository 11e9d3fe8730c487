"""What the tiers of the KV cache held and moved over a run: ``kv_tiers`` in ``summary.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from dsakv.request import TIERS, Phase, TierTraffic
from dsakv.trace.fetch import FetchColumns

PHASES: tuple[Phase, ...] = get_args(Phase)
RECORD_FIGURES = ("hit_blocks", "bytes_read", "read_ops")


class RecordTotals:
    """What all records found in each tier."""

    def __init__(self) -> None:
        self._sums = {name: dict.fromkeys(RECORD_FIGURES, 0) for name in TIERS}

    def add(self, fetch: Mapping[str, FetchColumns]) -> None:
        """Count records by their columns."""
        for name, tier in fetch.items():
            self.count(name, *(int(getattr(tier, figure).sum()) for figure in RECORD_FIGURES))

    def count(self, tier: str, *figures: int) -> None:
        """Add to the ``RECORD_FIGURES`` of one tier."""
        for name, value in zip(RECORD_FIGURES, figures, strict=True):
            self._sums[tier][name] += value

    @property
    def pooled(self) -> bool:
        """Whether a block was found elsewhere than on the device."""
        return any(self._sums[name]["hit_blocks"] for name in TIERS[1:])

    def to_dict(self) -> dict[str, Any]:
        """By tier the figures and ``hit_rate``: the share of the touched blocks of all records, None without records.

        A block counts once for every record that touches it.
        """
        blocks = sum(sums["hit_blocks"] for sums in self._sums.values())
        return {name: {**sums, "hit_rate": _ratio(sums["hit_blocks"], blocks)} for name, sums in self._sums.items()}


class Traffic:
    """What the tiers did over the steps of a run, recorded or not, by phase."""

    def __init__(self) -> None:
        self._totals: dict[tuple[Phase, str], TierTraffic] = {}

    def __bool__(self) -> bool:
        return bool(self._totals)

    def add(self, traffic: Mapping[tuple[Phase, str], TierTraffic]) -> None:
        """Add what a step says."""
        for key, counts in traffic.items():
            self._totals.setdefault(key, TierTraffic()).add(counts)

    def transfers(self) -> dict[str, Any]:
        """By phase and tier, as far as the tier did something there, what :class:`TierTraffic` counts.

        Times are milliseconds and bandwidths 1e9 bytes a second over the time in which the tier's batches ran, None
        where nothing was read or written.
        """
        found: dict[str, Any] = {}
        for phase in PHASES:
            tiers = {name: _figures(self._totals[phase, name]) for name in TIERS if (phase, name) in self._totals}
            if tiers:
                found[phase] = tiers
        return found


def decode_hit_rates(transfers: Mapping[str, Any]) -> dict[str, float | None]:
    """How much of what decode needs lay on the device, of ``transfers`` as :meth:`Traffic.transfers` gives them.

    ``hit_rate``: blocks found on the device, of all that a layer's step needed; ``hit_rate_without_cold``: the same
    without those that decode reads for the first time since they were written, which are what a start with an empty
    cache costs. None without blocks.
    """
    tiers = transfers.get("decode", {})
    hits, cold = ({name: tier[figure] for name, tier in tiers.items()} for figure in ("hits", "cold"))
    on_device, every = hits.get("hbm", 0), sum(hits.values())
    return {
        "hit_rate": _ratio(on_device, every),
        "hit_rate_without_cold": _ratio(on_device, every - sum(cold.values())),
    }


def _figures(tier: TierTraffic) -> dict[str, Any]:
    return {
        "hits": tier.hits,
        "cold": tier.cold,
        "reads": tier.reads,
        "read_ops": tier.read_ops,
        "bytes_read": tier.bytes_read,
        "read_ms": tier.read_us / 1e3,
        "read_gb_s": _ratio(tier.bytes_read, tier.read_us * 1e3) if tier.reads else None,
        "writes": tier.writes,
        "write_ops": tier.write_ops,
        "bytes_written": tier.bytes_written,
        "write_ms": tier.write_us / 1e3,
        "write_gb_s": _ratio(tier.bytes_written, tier.write_us * 1e3) if tier.writes else None,
        "retries": tier.retries,
        "staged_blocks": tier.staged_blocks,
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
