"""What each hot tier would fetch, and how long that would take: a row for each block size, policy and capacity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsakv.analysis.kv_steps import KvSteps
from dsakv.analysis.links import Floats, Ints, LinkProfile
from dsakv.analysis.plan_facts import RunFacts, StepTime
from dsakv.analysis.plan_misses import HotTier, stretches, written_blocks
from dsakv.errors import InputError


@dataclass(frozen=True, slots=True)
class HotSize:
    """A capacity at one block size."""

    asked: float
    """As it was given."""
    share: float
    """Of the blocks that running requests have at a time."""
    blocks: int
    """Of each layer."""


def hot_sizes(given: Sequence[float], facts: RunFacts, block_size: int, own_size: int) -> list[HotSize]:
    """``given`` capacities: shares of the tokens at a time up to 1, above that blocks of the trace's own size. Either
    comes to the same bytes at every block size, as nearly as whole blocks can; 1 is all blocks.

    Raises:
        InputError: a number of blocks that is not whole.
    """
    total = facts.blocks_at_once(block_size)
    found = {}
    for one in given:
        if one > 1 and one != int(one):
            raise InputError(f"--plan-hot: {one:g} is neither a share nor a number of blocks", "such as 0.25 or 128")
        tokens = one * facts.tokens_at_once if one <= 1 else one * own_size
        blocks = total if one == 1 else max(round(tokens / block_size), 1)
        found[blocks] = HotSize(one, blocks / total, blocks)
    return [found[blocks] for blocks in sorted(found)]


class SizePlan:
    """All hot tiers at one block size, batch by batch."""

    def __init__(self, block_size: int, hot: Sequence[HotSize], policies: Sequence[str], facts: RunFacts) -> None:
        self.block_size, self.facts = block_size, facts
        self._hot = [(size, HotTier(policy, size.blocks)) for policy in policies for size in hot]
        self._misses: list[list[Ints]] = [[] for _ in self._hot]
        self._written: list[Ints] = []
        self._steps: list[Ints] = []
        self._asked = self._touched = self._rows = 0

    @property
    def block_bytes(self) -> int:
        """Of a block in one layer."""
        return self.block_size * self.facts.row_bytes

    def add(self, batch: KvSteps) -> None:
        """Take in the next layer-steps."""
        parts, written = stretches(batch), written_blocks(batch)
        for (_, tier), missed in zip(self._hot, self._misses, strict=True):
            missed.append(tier.misses(batch, parts, written).astype(np.int32))
        self._written.append(written)
        self._steps.append(batch.engine_step)
        self._asked += len(batch.ids) - int(written.sum())
        self._touched += int(batch.touched.sum())
        self._rows += int(batch.rows.sum())

    def result(self, links: LinkProfile, base: StepTime) -> dict[str, Any]:
        """Figures of every row; times are milliseconds of a decode step."""
        steps, written = np.concatenate(self._steps), np.concatenate(self._written)
        if not len(steps):
            raise InputError("no decode step of the trace can be planned with", "leave --plan out")
        begins = np.flatnonzero(np.diff(steps, prepend=steps[0] - 1))
        pools = {tier: pool for tier in links.tiers if (pool := links.pool(tier)) is not None}
        wrote = {
            name: _per_step(pool.write.batches_us(written, self.block_bytes), begins) for name, pool in pools.items()
        }
        rows = []
        for (size, hot), parts in zip(self._hot, self._misses, strict=True):
            missed = np.concatenate(parts).astype(np.int64)
            total = int(missed.sum())
            times = {}
            for name, pool in pools.items():
                read = _per_step(pool.read.batches_us(missed, self.block_bytes), begins)
                times[name] = _times(read, wrote[name], base)
            rows.append(
                {
                    "policy": hot.policy,
                    "asked": size.asked,
                    "hot_share": size.share,
                    "hot_blocks": size.blocks,
                    "hot_bytes": size.blocks * self.block_bytes * self.facts.layers,
                    "misses": total,
                    "hit_rate": 1 - total / self._asked if self._asked else None,
                    "read_batches": int(np.count_nonzero(missed)),
                    "misses_per_step": total / len(begins),
                    "bytes_per_step": total * self.block_bytes / len(begins),
                    "tiers": times,
                }
            )
        return {
            "block_size_tokens": self.block_size,
            "block_bytes": self.block_bytes,
            "blocks_at_once": self.facts.blocks_at_once(self.block_size),
            "decode_steps": len(begins),
            "blocks_read": self._asked,
            "blocks_written": int(written.sum()),
            "read_amplification": self._touched * self.block_size / self._rows if self._rows else None,
            "hbm_gather_ms": self._gather_ms(links, len(steps), len(begins)),
            "rows": rows,
        }

    def _gather_ms(self, links: LinkProfile, layer_steps: int, steps: int) -> float | None:
        """What reading the selected rows on the device takes anyway; None where the profile does not tell."""
        if links.hbm is None:
            return None
        each = links.hbm.batches_us(np.array([self._rows / layer_steps]), self.facts.row_bytes)
        return float(each[0]) * layer_steps / steps / 1e3


def _per_step(batches_us: Floats, begins: Ints) -> Floats:
    """[E] milliseconds of each engine step: its layers follow each other."""
    return np.add.reduceat(batches_us, begins) / 1e3


def _times(read_ms: Floats, write_ms: Floats, base: StepTime) -> dict[str, float]:
    """``added``: nothing is hidden behind compute; ``hidden``: all that can be, a step takes the longer of the two."""
    added = read_ms + write_ms
    return {
        "read_ms": float(read_ms.mean()),
        "write_ms": float(write_ms.mean()),
        "added_ms": float(added.mean()),
        "added_p95_ms": float(np.quantile(added, 0.95)),
        "added_if_hidden_ms": float(np.maximum(added - base.mean_ms, 0.0).mean()),
        "added_percent": 100 * float(added.mean()) / base.mean_ms,
    }


def plan_size(plan: SizePlan, batches: Iterable[KvSteps], links: LinkProfile, base: StepTime) -> dict[str, Any]:
    """The figures of one block size, from all batches of the trace."""
    for batch in batches:
        plan.add(batch)
    return plan.result(links, base)
