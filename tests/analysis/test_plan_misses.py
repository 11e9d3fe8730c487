"""The hot tier of a plan misses what the running cache's rules miss, layer-step by layer-step."""

from __future__ import annotations

import numpy as np
import pytest

from dsakv.analysis.kv_steps import KvSteps
from dsakv.analysis.plan_misses import HotTier, stretches, written_blocks
from dsakv.policies import POLICIES
from dsakv.policies.placement import HBM, Placement, PlacementOptions
from tests.analysis.kv_batches import batches

LAYERS = 3


def by_placement(policy: str, hot: int, run: list[KvSteps], n_blocks: int) -> list[int]:
    """Misses of each layer-step, one call each."""
    placement = Placement(PlacementOptions(LAYERS, POLICIES[policy](), hot), n_blocks)
    missed = []
    for batch in run:
        ended = list(batch.ended)
        for r in range(len(batch.layer) + 1):
            while ended and ended[0][0] == r:
                placement.drop(ended.pop(0)[1])
            if r == len(batch.layer):
                break
            part = slice(batch.offsets[r], batch.offsets[r + 1])
            if part.start == part.stop:
                missed.append(0)
                continue
            placed = placement.step(int(batch.layer[r]), batch.ids[part], batch.written[part])
            missed.append(int((placed.tier != HBM).sum()))
    return missed


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("hot", [1, 7, 20, 1000])
def test_misses_are_those_of_the_running_cache(policy: str, hot: int) -> None:
    run = list(batches(LAYERS, seed=hot))
    tier = HotTier(policy, hot)
    found = [n for one in run for n in tier.misses(one, stretches(one), written_blocks(one)).tolist()]
    assert found == by_placement(policy, hot, run, 200)
    assert sum(found) > 0


def test_with_room_for_all_each_block_is_fetched_once_a_layer_while_it_is_held() -> None:
    run = list(batches(LAYERS, seed=5))
    tier = HotTier("lru", 1000)
    total = sum(int(tier.misses(one, stretches(one), written_blocks(one)).sum()) for one in run)
    first, held = 0, [set[int]() for _ in range(LAYERS)]
    for one in run:
        ended = list(one.ended)
        for r in range(len(one.layer) + 1):
            while ended and ended[0][0] == r:
                gone = set(ended.pop(0)[1].tolist())
                held = [blocks - gone for blocks in held]
            if r < len(one.layer):
                part = slice(one.offsets[r], one.offsets[r + 1])
                for block, written in zip(one.ids[part].tolist(), one.written[part].tolist(), strict=True):
                    first += block not in held[one.layer[r]] and not written
                    held[one.layer[r]].add(block)
    assert total == first


def test_steps_without_reads_are_there() -> None:
    nothing = np.zeros(0, dtype=np.int64)
    counts = np.zeros(2, dtype=np.int64)
    batch = KvSteps(
        layer=np.arange(2), engine_step=counts, offsets=np.zeros(3, dtype=np.int64), ids=nothing,
        written=nothing.astype(np.bool_), touched=counts, open_touched=counts, queries=counts, rows=counts,
        begins=[], ended=[(2, np.array([3]))],
    )  # fmt: skip
    assert HotTier("lru", 4).misses(batch, stretches(batch), written_blocks(batch)).tolist() == [0, 0]
