"""What the tiers did in a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from dsakv.kv.marks import Mark
from dsakv.policies.placement import HBM
from dsakv.request import TIERS, Phase, TierTraffic


class _Batch(NamedTuple):
    phase: Phase
    tier: int
    written: bool
    begin: Mark
    end: Mark


class Ledger:
    """Adds up one step; times are asked for once it is over, so that no device has to be waited for before."""

    def __init__(self) -> None:
        self._traffic: dict[tuple[Phase, str], TierTraffic] = defaultdict(TierTraffic)
        self._batches: list[_Batch] = []

    def found(self, phase: Phase, tier: int, blocks: int, cold: int = 0) -> None:
        """A layer needed so many blocks of a tier, of which ``cold`` for the first time in decode."""
        if blocks:
            entry = self._traffic[phase, TIERS[tier]]
            entry.hits += blocks
            entry.cold += cold

    def read(self, phase: Phase, tier: int, ops: int, n_bytes: int, begin: Mark, end: Mark) -> None:
        """One batch of ``ops`` blocks, or rows of the device, with ``n_bytes`` of payload was read."""
        entry = self._traffic[phase, TIERS[tier]]
        entry.reads += 1
        entry.read_ops += ops
        entry.bytes_read += n_bytes
        self._batches.append(_Batch(phase, tier, False, begin, end))

    def wrote(self, phase: Phase, tier: int, ops: int, n_bytes: int, begin: Mark, end: Mark) -> None:
        """Likewise of blocks that were written."""
        entry = self._traffic[phase, TIERS[tier]]
        entry.writes += 1
        entry.write_ops += ops
        entry.bytes_written += n_bytes
        self._batches.append(_Batch(phase, tier, True, begin, end))

    def retried(self, phase: Phase, tier: int, commands: int) -> None:
        """So many commands of a remote pool were tried again."""
        if commands:
            self._traffic[phase, TIERS[tier]].retries += commands

    def staged(self, phase: Phase, blocks: int) -> None:
        """A layer's step had so many blocks in staging frames."""
        if blocks:
            entry = self._traffic[phase, TIERS[HBM]]
            entry.staged_blocks = max(entry.staged_blocks, blocks)

    def settle(self) -> Mapping[tuple[Phase, str], TierTraffic]:
        """The step's traffic, by phase and tier; the next begins at nothing."""
        traffic, self._traffic = self._traffic, defaultdict(TierTraffic)
        for batch in self._batches:
            entry, us = traffic[batch.phase, TIERS[batch.tier]], batch.begin.us_until(batch.end)
            if batch.written:
                entry.write_us += us
            else:
                entry.read_us += us
        self._batches = []
        return dict(traffic)
