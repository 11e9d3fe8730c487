"""What several ranks must compute as one does, and the program that computes it: one launch for all cases."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsakv.config import ModelConfig, WeightsConfig
from dsakv.distributed import ALONE, World, joined
from dsakv.engine.engine import Engine, dismiss
from dsakv.engine.options import EngineOptions
from dsakv.jobs.model import load_model
from dsakv.kv.options import Amount, TierOptions
from dsakv.launch import find_place
from dsakv.request import Request

Selections = dict[tuple[int, int, int], dict[int, float]]
"""By request, layer and step: the selected positions with their scores."""


@dataclass(frozen=True)
class Case:
    checkpoint: str
    options: dict[str, Any] = field(default_factory=dict)
    forced: bool = False
    host_budget: str | None = None
    """Whether weights are streamed, and how much of them stays."""


TIERS = TierOptions(Amount.parse("3", "--kv-hot-capacity"), scope="shared", write="back", start="warm")
EVERYTHING: dict[str, Any] = {
    "record": True,
    "record_prefill_tail": 20,
    "temperature": 0.8,
    "batch_size": 2,
    "admission": "batch",
    "prefix_cache": True,
    "prefill_chunk": 16,
    "block_size": 8,
    "tiers": TIERS,
}
CASES = {
    "one by one": Case("deepseek", {"record": True}),
    "batch": Case("deepseek", {"record": True, "batch_size": 4}),
    "batch, small chunks": Case("deepseek", {"record": True, "batch_size": 3, "prefill_chunk": 13, "block_size": 16}),
    "not traced": Case("deepseek", {"batch_size": 3}),
    "prefill tail": Case("deepseek", {"record": True, "record_prefill_tail": 20, "batch_size": 2}),
    "prefix cache": Case("deepseek", {"record": True, "prefix_cache": True, "batch_size": 2, "block_size": 16}),
    "batches": Case("deepseek", {"record": True, "batch_size": 3, "admission": "batch"}),
    "sampled": Case("deepseek", {"record": True, "temperature": 0.8, "batch_size": 2}),
    "forced": Case("deepseek", {"record": True, "batch_size": 2, "prefill_chunk": 16}, forced=True),
    "dense": Case("dense", {"record": True, "batch_size": 2}),
    "shared layers": Case("glm", {"record": True, "batch_size": 2}),
    "tiers": Case("deepseek", {"record": True, "batch_size": 2, "block_size": 8, "tiers": TIERS}),
    "converted": Case("converted", {"record": True, "batch_size": 2}),
    "all at once": Case("deepseek", EVERYTHING, forced=True),
    "streamed": Case("deepseek", {"record": True, "batch_size": 2}, host_budget="700KB"),
}
OF_MANY = ("batch, small chunks", "dense", "shared layers", "converted", "all at once")
"""What more than two ranks compute: every way to divide weights, and every option, which all followers follow alike."""


def requests(forced: bool) -> list[Request]:
    """Prompts around top-k and beyond, two of which share a prefix; they arrive while others run."""
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in (5, 40, 100, 17, 130)]
    prompts.append(prompts[2][:70] + prompts[4][:30])
    answer = torch.randint(0, 256, (9,), generator=generator).tolist() if forced else None
    return [
        Request(i, ids, 9, arrival_s=0.001 * i, forced_token_ids=answer if i % 2 else None)
        for i, ids in enumerate(prompts)
    ]


def compute(case: Case, checkpoints: Path, world: World = ALONE) -> tuple[dict[int, list[int]], Selections] | None:
    """Tokens by request, and what was selected; None on a rank that only takes part."""
    name = f"converted-{world.size}" if case.checkpoint == "converted" else case.checkpoint
    weights = WeightsConfig(host_budget=case.host_budget, prefetch_depth=1)
    loaded = load_model(ModelConfig(ckpt_path=str(checkpoints / name), dtype="float32"), world, weights=weights)
    record = case.options.get("record", False) and world.rank == 0
    engine = Engine(loaded.model, EngineOptions(**case.options | {"record": record}), world, loaded.weights)
    if world.rank:
        engine.follow()
        loaded.close()
        return None
    tokens: dict[int, list[int]] = {}
    selections: Selections = {}
    for step in engine.run(requests(case.forced)):
        for completion in step.finished:
            tokens[completion.request_id] = completion.token_ids
        for key, selected in _selections(step.records):
            selections[key] = selected
        if case.host_budget:
            assert step.weights is None or step.weights.expert_misses > 0
    dismiss(world)
    loaded.close()
    return tokens, selections


def _selections(records: Any) -> Iterator[tuple[tuple[int, int, int], dict[int, float]]]:
    if records is None:
        return
    for layer in range(len(records.positions)):
        for b, count in enumerate(records.counts):
            chosen = zip(records.positions[layer, b, :count], records.scores[layer, b, :count], strict=True)
            key = (int(records.request_id[b]), layer, int(records.step_idx[b]))
            yield key, {int(position): float(score) for position, score in chosen}


def agree(one: dict[int, float], other: dict[int, float]) -> bool:
    """Whether two selections hold the same positions, but for those whose scores nearly tie with the lowest."""
    for mine, theirs in ((one, other), (other, one)):
        lowest = min(mine.values())
        if any(mine[position] - lowest > 1e-5 for position in mine.keys() - theirs.keys()):
            return False
    shared = one.keys() & other.keys()
    return len(one) == len(other) and all(abs(one[p] - other[p]) < 1e-3 * (1 + abs(one[p])) for p in shared)


def main(checkpoints: str, results: str, *names: str) -> None:
    place = find_place(os.environ)
    assert place is not None
    torch.set_num_threads(1)
    found = {}
    with joined(place.rank, place.size, place.address, place.port, torch.device("cpu")) as world:
        for name in names:
            found[name] = compute(CASES[name], Path(checkpoints), world)
    if place.rank == 0:
        Path(results).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
