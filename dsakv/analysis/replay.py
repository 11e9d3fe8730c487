"""A tiered KV cache once more, without its contents: where decode finds its blocks, and what that moves.

The same rules as in a running cache say which tier holds a block (:mod:`dsakv.policies.placement`), so a run's own
tiers give the run's own counts, and any others what they would have given. Prefill changes nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dsakv.analysis.kv_steps import KvSteps
from dsakv.compiled import compiled
from dsakv.policies.base import Ints, doubled, enlarged
from dsakv.policies.placement import HBM, LOCAL, REMOTE, Placement, PlacementOptions
from dsakv.request import TIERS

Phase = Literal["warm_up", "decode"]
PHASES: tuple[Phase, ...] = ("warm_up", "decode")
_HITS, _COLD, _READS, _READ_OPS, _WRITES, _WRITE_OPS = range(6)


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """Tiers, and how blocks come into them."""

    tiers: PlacementOptions
    write: Literal["through", "back"] = "through"
    """Whether a block is written home once it is full, or when it leaves the device."""
    warm: bool = False
    """Whether the hot tier is offered a prompt's blocks before its first decode step."""
    prefix_cache: bool = False
    """Whether blocks that nobody holds any more may be found by later prompts. With ``back`` they are then written
    home at last: which of them, a trace does not say, and writes are not known.
    """


class Replay:
    """Takes steps in the order of the engine and counts, by phase, layer and tier."""

    def __init__(self, options: ReplayOptions) -> None:
        self.options = options
        self._placement = Placement(options.tiers, 0)
        self._dirty = np.zeros((0, options.tiers.layers), dtype=np.bool_)  # hot, and home does not have it yet
        self._counts = np.zeros((len(PHASES), options.tiers.layers, len(TIERS), 6), dtype=np.int64)
        self._open = np.zeros(options.tiers.layers, dtype=np.int64)
        self._rows = np.zeros(options.tiers.layers, dtype=np.int64)

    def add(self, steps: KvSteps) -> None:
        """Take the next steps. Their layers lie below those of the options."""
        top = max(int(ids.max(initial=-1)) for ids in (steps.ids, *(ids for _, ids in (*steps.begins, *steps.ended))))
        self._placement.reserve(top + 1)
        self._dirty = enlarged(self._dirty, (doubled(len(self._dirty), top + 1), self.options.tiers.layers))
        np.add.at(self._open, steps.layer, steps.open_touched)
        np.add.at(self._rows, steps.layer, steps.rows)
        begins, ended = dict(steps.begins), dict(steps.ended)
        none = np.zeros(0, dtype=np.bool_)
        bounds, at_layer = steps.offsets.tolist(), steps.layer.tolist()
        for r in range(len(steps) + 1):
            if (unheld := ended.get(r)) is not None:
                self._dirty[unheld] = False
                self._placement.drop(unheld)
            if r == len(steps):
                return
            if self.options.warm and (begun := begins.get(r)) is not None:
                self._step(0, at_layer[r], begun, none)
            if bounds[r] < bounds[r + 1]:
                inside = slice(bounds[r], bounds[r + 1])
                self._step(1, at_layer[r], steps.ids[inside], steps.written[inside])

    def transfers(
        self, block_bytes: int, row_bytes: int, phase: Phase = "decode", layer: int | None = None
    ) -> dict[str, dict[str, int | float | None]]:
        """What each tier that had anything to do was asked for, in one layer or in all: distinct blocks of layer-steps
        found there (``hits``), those of them read for the first time (``cold``), batches, blocks (rows in ``hbm``) and
        bytes of payload. None is not known: the batches in which the device reads its rows; writes, where the prefix
        cache keeps what was not written before.
        """
        layers = slice(None) if layer is None else slice(layer, layer + 1)
        counts = self._counts[PHASES.index(phase), layers].sum(axis=0)  # [tiers, 6]
        known = self.options.write == "through" or not self.options.prefix_cache
        result: dict[str, dict[str, int | float | None]] = {}
        for tier, name in enumerate(TIERS):
            hits, cold, reads, read_ops, writes, write_ops = counts[tier].tolist()
            found: dict[str, int | float | None] = {
                "hits": hits,
                "cold": cold,
                "reads": reads,
                "read_ops": read_ops,
                "bytes_read": read_ops * block_bytes,
                "writes": writes,
                "write_ops": write_ops,
                "bytes_written": write_ops * block_bytes,
            }
            if tier == HBM and phase == "decode":
                rows = int(self._rows[layers].sum())
                found |= {"hits": hits + int(self._open[layers].sum()), "reads": None}
                found |= {"read_ops": rows, "bytes_read": rows * row_bytes}
            if not known and tier == self.options.tiers.home:
                found |= dict.fromkeys(("writes", "write_ops", "bytes_written"))
            if any(found.values()) or tier == self.options.tiers.home:
                result[name] = found
        return result

    def _step(self, phase: int, layer: int, ids: Ints, written: NDArray[np.bool_]) -> None:
        placed = self._placement.step(layer, ids, written) if phase else self._placement.offer(layer, ids)
        _count(
            self._counts[phase, layer], ids, written, placed.tier, placed.cold, placed.kept, placed.evicted,
            placed.local_kept, self._dirty.reshape(-1), layer, self.options.tiers.layers, self.options.tiers.home,
            self.options.write == "back", phase == 0,
        )  # fmt: skip


@compiled
def _count(
    counts: Ints,  # [tiers, 6], of the phase and layer
    ids: Ints,  # [k]
    written: NDArray[np.bool_],  # [k], or empty for none
    tier: NDArray[np.uint8],  # [k] and so on as in Placed
    cold: NDArray[np.bool_],
    kept: NDArray[np.bool_],
    evicted: Ints,
    local_kept: NDArray[np.bool_],
    dirty: NDArray[np.bool_],  # [numbers]
    layer: int,
    layers: int,
    home: int,
    back: bool,
    warm_up: bool,
) -> None:
    closed = left = leaving = 0
    local, remote = counts[LOCAL, _READ_OPS], counts[REMOTE, _READ_OPS]
    for i in range(len(ids)):
        if len(written) and written[i]:
            if back and kept[i]:
                dirty[ids[i] * layers + layer] = True
            else:
                closed += 1
        elif tier[i] == HBM:
            counts[HBM, _HITS] += not warm_up
            if not kept[i] and dirty[ids[i] * layers + layer]:
                dirty[ids[i] * layers + layer] = False
                leaving += 1
        elif not warm_up or kept[i] or local_kept[i]:  # else it was offered in vain, and not read
            counts[tier[i], _HITS] += 1
            counts[tier[i], _COLD] += cold[i] and not warm_up
            counts[tier[i], _READ_OPS] += 1
    for number in evicted:
        if dirty[number]:
            dirty[number] = False
            left += 1
    counts[LOCAL, _READS] += counts[LOCAL, _READ_OPS] > local
    counts[REMOTE, _READS] += counts[REMOTE, _READ_OPS] > remote
    for count in (closed, left, leaving):
        counts[home, _WRITES] += count > 0
        counts[home, _WRITE_OPS] += count
