"""Runs of a made-up engine with a paged KV cache: their files, and what the engine itself knew at each step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from dsakv.engine.blocks import BlockManager, blocks_for
from dsakv.prefix import block_hashes
from tests.analysis.traces import Record, record, write_shard


@dataclass(slots=True)
class Sequence:
    request: int
    prompt: list[int]
    decode_steps: int
    table: list[int] = field(default_factory=list)
    step: int = 0

    @property
    def seq_len(self) -> int:
        """Tokens that the next query may read."""
        return len(self.prompt) + self.step + 1


@dataclass(slots=True)
class DecodeStep:
    engine_step: int
    batch: list[tuple[Sequence, int, int]]
    """Sequence, decode step, tokens in the cache."""
    selected: dict[tuple[int, int], list[int]]
    """Positions by (layer, request)."""
    unheld: list[int]
    """Blocks that nobody holds after the step."""
    published: list[int]
    """Those of them that prompts may find again."""


@dataclass(slots=True)
class Run:
    layers: int
    block_size: int
    sequences: list[Sequence]
    steps: list[DecodeStep]
    n_blocks: int

    def records(self) -> Iterator[Record]:
        for step in self.steps:
            for sequence, number, seq_len in step.batch:
                for layer in range(self.layers):
                    made = record(sequence.request, layer, number, step.selected[layer, sequence.request], seq_len)
                    yield made | {"engine_step": step.engine_step, "block_size_tokens": self.block_size}

    def lines(self) -> list[dict[str, Any]]:
        return [
            {
                "request_id": sequence.request,
                "prompt_tokens": len(sequence.prompt),
                "decode_steps": sequence.decode_steps,
                "kv_blocks": runs_of(sequence.table),
            }
            for sequence in self.sequences
        ]

    def write(self, folder: Path, shards: int = 1, **meta: Any) -> Path:
        """Write the run's files; returns the folder of its trace."""
        trace = folder / f"block{self.block_size}"
        records = list(self.records())
        for shard in range(shards):
            mine = [r for r in records if r["request_id"] % shards == shard]
            if mine:
                write_shard(trace / f"trace_steps_{shard}_{shard + 1}.jsonl", mine)
        (folder / "requests.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in self.lines()))
        known = {"block_size_tokens": self.block_size, "model": {"n_layers": self.layers}, **meta}
        (trace / "run_meta.json").write_bytes(orjson.dumps(known))
        return trace


def runs_of(table: list[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for block in table:
        if runs and sum(runs[-1]) == block:
            runs[-1][1] += 1
        else:
            runs.append([block, 1])
    return runs


def run_engine(
    seed: int,
    *,
    requests: int,
    batch_size: int,
    block_size: int,
    layers: int = 2,
    prefix_cache: bool = False,
    admission: str = "continuous",
    longest: int = 60,
) -> Run:
    """Prompts that branch off each other, decoded ``batch_size`` at a time with selections drawn at random."""
    draw = random.Random(seed)
    waiting = _sequences(draw, requests, longest)
    run = Run(layers, block_size, list(waiting), [], 0)
    needs = [blocks_for(len(one.prompt) + one.decode_steps, block_size) for one in waiting]
    run.n_blocks = sum(needs) if prefix_cache else sum(sorted(needs)[-batch_size:])
    manager = BlockManager(run.n_blocks)
    running: list[Sequence] = []
    engine_step = joining = 0
    while waiting or running:
        if not running:
            joining = batch_size
        while waiting and len(running) < batch_size and (admission == "continuous" or joining):
            sequence = waiting.pop(0)
            hashes = block_hashes(sequence.prompt, block_size)
            shared = manager.cached(hashes[: (len(sequence.prompt) - 1) // block_size]) if prefix_cache else []
            needed = blocks_for(len(sequence.prompt) + sequence.decode_steps, block_size)
            table = manager.allocate(needed, shared)
            assert table is not None
            sequence.table = table
            if prefix_cache:
                for block, prefix in zip(table, hashes, strict=False):
                    manager.publish(block, prefix)
            running.append(sequence)
            joining -= 1
            engine_step += 1
        for sequence in [one for one in running if one.decode_steps == 0]:
            manager.release(sequence.table)
            running.remove(sequence)
        if running:
            run.steps.append(_decode(draw, run, manager, running, engine_step))
            engine_step += 1
    return run


def _sequences(draw: random.Random, count: int, longest: int) -> list[Sequence]:
    made: list[Sequence] = []
    for request in range(count):
        base = draw.choice(made).prompt if made and draw.random() < 0.6 else []
        prompt = base[: draw.randint(0, len(base))] + [draw.randrange(9) for _ in range(draw.randint(1, 25))]
        made.append(Sequence(request, prompt[:longest], draw.randint(0, 9)))
    return made


def _decode(
    draw: random.Random, run: Run, manager: BlockManager, running: list[Sequence], engine_step: int
) -> DecodeStep:
    batch = [(one, one.step, one.seq_len) for one in running]
    selected = {}
    for sequence, _, seq_len in batch:
        for layer in range(run.layers):
            count = draw.randint(1, min(seq_len, 12))
            positions = set(draw.sample(range(seq_len), count))
            if draw.random() < 0.7:
                positions.add(seq_len - 1)
            selected[layer, sequence.request] = sorted(positions)
        sequence.step += 1
    blank: list[int] = []
    idle: list[int] = []
    for sequence in [one for one in running if one.step == one.decode_steps]:
        idle_before = set(manager._idle)
        held_before = {block: manager._holders[block] for block in sequence.table}
        manager.release(sequence.table)
        unheld = [block for block in sequence.table if held_before[block] == 1]
        idle += [block for block in unheld if block in manager._idle and block not in idle_before]
        blank += [block for block in unheld if block not in manager._idle]
        running.remove(sequence)
    return DecodeStep(engine_step, batch, selected, sorted(blank + idle), sorted(idle))
