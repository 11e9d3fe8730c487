"""Every option of streaming moves a counter, and none of them a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dsakv.config import ModelConfig
from dsakv.engine.options import EngineOptions
from dsakv.request import Request, WeightTraffic
from dsakv.weights.placement import WeightsPlan
from tests.models.llamas import save_llama
from tests.weights.streamed import Outcome, load, plan_of, run, smallest, traffic

OPTIONS = EngineOptions(batch_size=3, block_size=4, prefill_chunk=64)


class Ran(NamedTuple):
    outcome: Outcome
    plan: WeightsPlan
    passes: list[WeightTraffic]
    at_once: int
    """Most reads that were under way at a time."""

    def steps(self) -> WeightTraffic:
        """All decode steps together."""
        total = WeightTraffic()
        for one in self.passes[1:]:
            total.add(one)
        return total


@pytest.fixture(scope="module")
def config(small_checkpoint: Path) -> ModelConfig:
    return ModelConfig(ckpt_path=str(small_checkpoint), device="cpu")


def ran(config: ModelConfig, **weights: Any) -> Ran:
    loaded = load(config, **weights)
    streamer = loaded.streamer
    assert streamer is not None
    try:
        outcome, steps = run(loaded, OPTIONS)
        return Ran(outcome, streamer.plan, traffic(steps), streamer._loader.files.most_at_once)
    finally:
        loaded.close()


def test_half_of_the_weights_in_memory_is_half_of_the_reading(tmp_path: Path) -> None:
    save_llama(tmp_path, "llama3")
    config = ModelConfig(ckpt_path=str(tmp_path), device="cpu")
    everything = plan_of(config, unit="sublayer", host_budget="1GB")
    none = ran(config, unit="sublayer", residency="none", host_budget="1GB")
    assert none.plan.pass_disk_bytes >= sum(row.stored_bytes for row in everything.rows)
    least = smallest(config, unit="sublayer")
    found = [
        ran(config, unit="sublayer", host_budget=f"{least + step * everything.host_bytes // 8}B") for step in range(10)
    ]
    read = [one.steps().disk_bytes / len(one.passes[1:]) for one in found]
    assert read == sorted(read, reverse=True)
    assert read[-1] == 0
    for one, each in zip(found, read, strict=True):
        stays = sum(row.on_device * row.stored_bytes / row.units for row in one.plan.rows)
        whole = sum(row.stored_bytes for row in one.plan.rows)
        assert each / whole == pytest.approx(1 - stays / whole, abs=0.12)  # pages that hold tensors of two units
        assert one.outcome.same(none.outcome)


def test_a_ring_reads_everything_and_a_static_set_does_not(config: ModelConfig) -> None:
    budget = f"{int(smallest(config, unit='layer') * 1.2)}B"
    static, lru, none = (
        ran(config, unit="layer", host_budget=budget, residency=kind, prefetch_depth=1)
        for kind in ("static", "lru", "none")
    )
    assert none.steps().disk_bytes >= lru.steps().disk_bytes > static.steps().disk_bytes
    assert none.plan.host_bytes <= static.plan.host_bytes


def test_smaller_units_need_less_memory_and_experts_less_reading(config: ModelConfig) -> None:
    layer, sublayer = (ran(config, unit=unit, host_budget="10MB", residency="none") for unit in ("layer", "sublayer"))
    assert sublayer.plan.host_bytes < layer.plan.host_bytes
    assert sublayer.passes[1].units > layer.passes[1].units
    expert = ran(config, unit="expert", host_budget="10MB", residency="none")
    assert expert.steps().disk_bytes < sublayer.steps().disk_bytes
    assert expert.steps().expert_misses == expert.steps().units - expert.plan.pass_units * len(expert.passes[1:])


def test_what_is_read_ahead(config: ModelConfig) -> None:
    least = smallest(config, unit="sublayer", prefetch_depth=3)
    found = [
        ran(config, unit="sublayer", host_budget=f"{least}B", residency="none", prefetch_depth=depth)
        for depth in range(4)
    ]
    assert found[0].steps().ahead == 0
    for one in found[1:]:
        assert one.steps().ahead == one.steps().units
    sizes = [one.plan.host_bytes for one in found]
    assert sizes == sorted(set(sizes))  # a slot more for each


def test_beside_what_stays_one_more_is_read(config: ModelConfig) -> None:
    """Its slot is free: the disk goes on."""
    one = {"unit": "sublayer", "prefetch_depth": 1}
    loaded = load(config, host_budget=f"{int(smallest(config, **one) * 1.2)}B", **one)
    streamer = loaded.streamer
    assert streamer is not None
    order, staying = streamer._units.order, streamer._staying
    visits = [streamer.embedding(head=True)]
    for layer in range(len(order) // 2 - 1):
        visits += [streamer.attention(layer), streamer.feed_forward(layer)]
    found = set()
    for unit, visit in zip(order, [*visits, streamer.head()], strict=True):
        with visit:
            found.add((unit in staying, len(streamer._loads.keys() - {unit})))
    loaded.close()
    assert found == {(False, 1), (True, 2)}


def test_experts_are_kept_as_the_policy_says(config: ModelConfig) -> None:
    everything = plan_of(config, unit="expert", host_budget="1GB")
    budget = f"{(everything.host_bytes - 9 * everything.expert_disk_bytes) * 8 // 7}B"
    hits = {}
    for policy in ("lru", "fifo", "lfu", "clock", "sieve", "s3fifo"):
        one = ran(config, unit="expert", host_budget=budget, expert_policy=policy)
        assert 0 < one.plan.expert_slots < one.plan.n_experts
        steps = one.steps()
        assert steps.expert_hits + steps.expert_misses > 0
        hits[policy] = steps.expert_hits
    assert len(set(hits.values())) > 1
    none = ran(config, unit="expert", host_budget=budget, residency="none")
    assert none.steps().expert_hits == 0 < min(hits.values())
    every = ran(config, unit="expert", host_budget="1GB")
    assert every.plan.expert_slots == every.plan.n_experts
    assert sum(one.expert_misses for one in every.passes) <= every.plan.n_experts


def test_requests_and_threads(config: ModelConfig) -> None:
    budget = f"{smallest(config, unit='layer')}B"
    large, small = (ran(config, unit="layer", host_budget=budget, io_request=size) for size in ("8MiB", "4KiB"))
    assert large.steps().disk_bytes == small.steps().disk_bytes
    assert small.steps().disk_reads >= small.steps().disk_bytes / 4096 > large.steps().disk_reads
    one, four = (ran(config, unit="layer", host_budget=budget, io_request="4KiB", io_threads=n).at_once for n in (1, 4))
    assert one == 1 < four <= 4


def test_the_system_read_what_was_counted(config: ModelConfig) -> None:
    """Pages at the ends of files aside: those the system counts whole. A cache that gave the bytes would be seen."""
    budget = f"{smallest(config, unit='layer')}B"
    loaded = load(config, unit="layer", host_budget=budget)
    streamer = loaded.streamer
    assert streamer is not None
    try:
        if not streamer.direct:
            pytest.skip("the file system refuses direct reads")
        requests = [Request(0, [1, 2, 3], 40)]
        run(loaded, OPTIONS, requests)
        before = system_read()
        _, steps = run(loaded, OPTIONS, requests)
        read, counted = system_read() - before, sum(one.disk_bytes for one in traffic(steps))
    finally:
        loaded.close()
    assert counted > 20 << 20
    rounding = 4096 * sum(one.units for one in traffic(steps))
    assert counted - streamer.plan.ahead_bytes <= read <= counted + streamer.plan.ahead_bytes + rounding + (2 << 20)


def system_read() -> int:
    """Bytes that this process has had read from disks."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])
