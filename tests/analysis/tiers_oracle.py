"""A tiered cache block by block, from what a made-up engine knew, with the slow policies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from dsakv.analysis.replay import ReplayOptions
from dsakv.policies import POLICIES
from tests.analysis.kv_runs import DecodeStep, Run
from tests.policies.oracle import ORACLES, Oracle

HBM, LOCAL, REMOTE = range(3)
Block = tuple[int, int]
"""Block and layer."""


class Copies:
    """Blocks near the reader, under one policy: of each layer by itself, or of all together."""

    def __init__(self, options: ReplayOptions, capacity: int) -> None:
        policy = next(name for name, made in POLICIES.items() if type(options.tiers.policy) is made)
        self.layers = options.tiers.layers
        self.shared = options.tiers.scope == "shared"
        caches = [ORACLES[policy](capacity * self.layers if self.shared else capacity) for _ in range(self.layers)]
        self.of_layer: list[Oracle] = [caches[0]] * self.layers if self.shared else caches

    def step(self, layer: int, blocks: list[int]) -> tuple[set[int], set[Block]]:
        """Which of ``blocks`` were there; who leaves."""
        hits, victims = self.of_layer[layer].step([self.number(block, layer) for block in blocks])
        there = {block for block, hit in zip(blocks, hits, strict=True) if hit}
        return there, {divmod(victim, self.layers) if self.shared else (victim, layer) for victim in victims}

    def number(self, block: int, layer: int) -> int:
        return block * self.layers + layer if self.shared else block

    def drop(self, block: int) -> None:
        for layer, cache in enumerate(self.of_layer):
            cache.drop(self.number(block, layer))


class SlowTiers:
    """Counts by (phase, layer, tier, figure)."""

    def __init__(self, options: ReplayOptions) -> None:
        self.options = options
        self.hot = Copies(options, options.tiers.hot)
        self.local = Copies(options, options.tiers.local) if options.tiers.local else None
        self.read: set[Block] = set()
        self.dirty: set[Block] = set()
        self.counts: Counter[tuple[str, int, int, str]] = Counter()

    def replay(self, run: Run) -> SlowTiers:
        for step in run.steps:
            for layer in range(run.layers):
                self.decode(run, step, layer)
            for block in step.unheld:
                for copies in (self.hot, self.local):
                    if copies is not None:
                        copies.drop(block)
                for known in (self.read, self.dirty):
                    known -= {(block, layer) for layer in range(run.layers)}
        return self

    def decode(self, run: Run, step: DecodeStep, layer: int) -> None:
        begun, selected, opened, closing = set[int](), set[int](), set[int](), set[int]()
        for sequence, number, seq_len in step.batch:
            positions = step.selected[layer, sequence.request]
            selected |= {sequence.table[position // run.block_size] for position in positions}
            newest = sequence.table[(seq_len - 1) // run.block_size]
            opened.add(newest)
            closing |= {newest} if seq_len % run.block_size == 0 else set()
            begun |= set(sequence.table[: len(sequence.prompt) // run.block_size] if number == 0 else ())
            self.counts["decode", layer, HBM, "read_ops"] += len(positions)
        if begun and self.options.warm:
            self.place("warm_up", layer, begun, set())
        if wanted := (selected - opened) | closing:
            self.place("decode", layer, wanted, closing)
        self.counts["decode", layer, HBM, "hits"] += len(selected & opened)

    def place(self, phase: str, layer: int, blocks: set[int], closing: set[int]) -> None:
        ordered = sorted(blocks)
        there, victims = self.hot.step(layer, ordered)
        kept = {block for block in blocks if (block, layer) not in victims}
        missing = [block for block in ordered if block not in there | closing]
        copied, local_victims = self.local.step(layer, missing) if self.local and missing else (set[int](), set())
        copied_kept = {
            block for block in missing if self.local and block not in copied and (block, layer) not in local_victims
        }
        found = {block: LOCAL if block in copied else self.options.tiers.home for block in missing}
        moved = set(missing) if phase == "decode" else {block for block in missing if block in kept | copied_kept}
        for tier in (LOCAL, REMOTE):
            mine = {block for block in moved if found[block] == tier}
            self.counts[phase, layer, tier, "hits"] += len(mine)
            self.counts[phase, layer, tier, "read_ops"] += len(mine)
            self.counts[phase, layer, tier, "reads"] += bool(mine)
            if phase == "decode":
                self.counts[phase, layer, tier, "cold"] += len({b for b in mine if (b, layer) not in self.read})
        if phase == "decode":
            self.counts[phase, layer, HBM, "hits"] += len(there - closing)
        moved |= set() if phase == "warm_up" else blocks
        self.read |= {(block, layer) for block in moved}
        self.write(phase, layer, self.dirty & {victim for victim in victims if victim[1] != layer or victim[0] not in
                                               blocks})  # fmt: skip
        self.write(phase, layer, self.dirty & {(block, layer) for block in there - closing - kept})
        if self.options.write == "through":
            self.write(phase, layer, {(block, layer) for block in closing})
        else:
            self.write(phase, layer, {(block, layer) for block in closing - kept})
            self.dirty |= {(block, layer) for block in closing & kept}

    def write(self, phase: str, layer: int, blocks: Iterable[Block]) -> None:
        written = set(blocks)
        self.dirty -= written
        self.counts[phase, layer, self.options.tiers.home, "writes"] += bool(written)
        self.counts[phase, layer, self.options.tiers.home, "write_ops"] += len(written)
