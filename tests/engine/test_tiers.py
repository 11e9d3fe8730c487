"""A tiered KV cache: tokens and selections of a plain one, and blocks where a plain replay finds them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsakv.config import ModelConfig
from dsakv.engine.engine import Engine
from dsakv.engine.options import EngineOptions
from dsakv.jobs.model import load_model
from dsakv.kv.options import Amount, TierOptions
from dsakv.models.contracts import Model
from dsakv.policies import POLICIES
from dsakv.request import TIERS, Completion, Request, Step
from tests.policies.oracle import ORACLES, Oracle

HBM, LOCAL, REMOTE = range(3)


def amount(text: str) -> Amount:
    return Amount.parse(text, "--kv-hot-capacity")


def requests_of(count: int, seed: int) -> list[Request]:
    """Prompts that branch off each other, of 1 to 90 tokens."""
    draw = random.Random(seed)
    prompts: list[list[int]] = []
    while len(prompts) < count:
        base = draw.choice(prompts) if prompts and draw.random() < 0.6 else []
        prompt = base[: draw.randint(0, len(base))] + [draw.randrange(256) for _ in range(draw.randint(1, 45))]
        if len(prompt) <= 90:
            prompts.append(prompt)
    return [Request(i, prompt, draw.randint(1, 11)) for i, prompt in enumerate(prompts)]


def run(model: Model, requests: list[Request], options: EngineOptions) -> list[Step]:
    return list(Engine(model, options).run(requests))


def answers(steps: list[Step]) -> dict[int, list[int]]:
    return {c.request_id: c.token_ids for step in steps for c in step.finished}


def records(steps: list[Step]) -> Iterator[tuple[Step, int, int, int]]:
    """Each recorded query: its step, its place there, request and decode step."""
    for step in steps:
        if step.records is not None:
            pairs = zip(step.records.request_id.tolist(), step.records.step_idx.tolist(), strict=True)
            for b, (request, number) in enumerate(pairs):
                yield step, b, request, number


def selected(steps: list[Step]) -> dict[tuple[int, int], Any]:
    """Positions and scores by request and decode step."""
    found = {}
    for step, b, request, number in records(steps):
        assert step.records is not None
        count = step.records.counts[b]
        kept = step.records.positions[:, b, :count], step.records.scores[:, b, :count]
        found[request, number] = tuple(array.tolist() for array in kept)
    return found


class Replay:
    """Where each block is found, derived from selections and block tables alone, with the slow policies."""

    def __init__(self, layers: int, options: EngineOptions, n_blocks: int) -> None:
        tiers = options.tiers
        assert tiers is not None
        self.layers, self.size, self.tiers = layers, options.block_size, tiers
        self.hot = self._caches(int(tiers.hot.number))
        self.local = self._caches(int(tiers.local.number)) if tiers.remote and tiers.local else None

    def _caches(self, capacity: int) -> list[Oracle]:
        make = ORACLES[self.tiers.policy]
        if self.tiers.scope == "shared":
            return [make(capacity * self.layers)]
        return [make(capacity) for _ in range(self.layers)]

    def _step(self, caches: list[Oracle], layer: int, blocks: list[int]) -> dict[int, bool]:
        """Which of ``blocks`` are there."""
        if len(caches) == 1:
            hits, _ = caches[0].step([block * self.layers + layer for block in blocks])
        else:
            hits, _ = caches[layer].step(blocks)
        return dict(zip(blocks, hits, strict=True))

    def found(
        self, steps: list[Step], tables: dict[int, list[int]], prompts: dict[int, int]
    ) -> dict[Any, dict[int, int]]:
        """The tier of each touched block, by request, decode step and layer."""
        result: dict[Any, dict[int, int]] = {}
        for step in steps:
            if step.records is None or step.kind != "decode":
                continue
            for layer in range(self.layers):
                self._layer(step, layer, tables, prompts, result)
            running = {int(r) for r in step.records.request_id} - {c.request_id for c in step.finished}
            held = {block for request in running for block in tables[request]}
            ended = {block for c in step.finished for block in tables[c.request_id]} - held
            for caches in (self.hot, self.local or []):
                for i, cache in enumerate(caches):
                    for block in ended:
                        for layer in range(self.layers) if len(caches) == 1 else [i]:
                            cache.drop(block * self.layers + layer if len(caches) == 1 else block)
        return result

    def _layer(
        self, step: Step, layer: int, tables: dict[int, list[int]], prompts: dict[int, int], result: Any
    ) -> None:
        assert step.records is not None
        touched, tails, closing, warm = {}, {}, set(), set()
        for b, request in enumerate(step.records.request_id.tolist()):
            length, number = int(step.records.seq_len[b]), int(step.records.step_idx[b])
            positions = step.records.positions[layer, b, : step.records.counts[b]].tolist()
            touched[request, number] = sorted({tables[request][p // self.size] for p in positions})
            tails[request] = tables[request][(length - 1) // self.size]
            if length % self.size == 0:
                closing.add(tails[request])
            if number == 0 and self.tiers.start == "warm":
                warm |= set(tables[request][: prompts[request] // self.size])
        if warm:
            self._read(layer, sorted(warm), set())
        wanted = {block for blocks in touched.values() for block in blocks} - set(tails.values()) | closing
        tier = self._read(layer, sorted(wanted), closing) if wanted else {}
        for (request, number), blocks in touched.items():
            result[request, number, layer] = {
                block: HBM if block in tails.values() else tier[block] for block in blocks
            }

    def _read(self, layer: int, blocks: list[int], closing: set[int]) -> dict[int, int]:
        hot = self._step(self.hot, layer, blocks)
        missed = [block for block in blocks if not hot[block] and block not in closing]
        local = {}
        if self.local is not None and missed:
            local = self._step(self.local, layer, missed)
        home = REMOTE if self.tiers.remote else LOCAL
        return {
            block: HBM if hot[block] or block in closing else LOCAL if local.get(block) else home for block in blocks
        }


def measured(steps: list[Step], tables: dict[int, list[int]], size: int) -> dict[Any, dict[int, int]]:
    """What the records say, in the same form."""
    result: dict[Any, dict[int, int]] = {}
    for step, b, request, number in records(steps):
        assert step.records is not None
        assert step.records.found is not None
        if number < 0:
            continue
        for layer in range(len(step.records.positions)):
            count = step.records.counts[b]
            positions = step.records.positions[layer, b, :count].tolist()
            found = step.records.found[layer, b, :count].tolist()
            by_block: dict[int, set[int]] = {}
            for position, tier in zip(positions, found, strict=True):
                by_block.setdefault(tables[request][position // size], set()).add(tier)
            assert all(len(tiers) == 1 for tiers in by_block.values())
            result[request, number, layer] = {block: tiers.pop() for block, tiers in sorted(by_block.items())}
    return result


def cases() -> list[dict[str, Any]]:
    """Every policy with everything else drawn, so that each value meets each policy and most other values."""
    draw = random.Random(4)
    chosen = []
    for policy in POLICIES:
        alone = policy == "sink_recent"  # it needs blocks numbered as they lie
        for number in range(4):
            stack = ("host", "file", "both")[number % 3]
            chosen.append(
                {
                    "policy": policy,
                    "hot": str(draw.choice([1, 2, 3, 5, 9, 40])),
                    "local": str(draw.choice([1, 3, 8])) if stack == "both" else None,
                    "remote": stack != "host",
                    "scope": "layer" if alone else draw.choice(["layer", "shared"]),
                    "write": draw.choice(["through", "back"]),
                    "start": draw.choice(["cold", "warm"]),
                    "batch_size": 1 if alone else draw.choice([1, 2, 4]),
                    "block_size": draw.choice([1, 2, 4, 8, 32]),
                    "prefill_chunk": draw.choice([5, 16, 64]),
                    "prefix_cache": not alone and draw.random() < 0.6,
                    "admission": draw.choice(["batch", "continuous"]),
                    "tail": draw.choice([0, 3]),
                }
            )
    return chosen


def name(case: dict[str, Any]) -> str:
    return "-".join(map(str, case.values()))


@pytest.fixture(scope="module")
def exact(small_checkpoint: Path) -> Model:
    return load_model(ModelConfig(ckpt_path=str(small_checkpoint), device="cpu", dtype="float32")).model


@pytest.mark.parametrize("case", cases(), ids=name)
def test_tokens_selections_and_hits(exact: Model, case: dict[str, Any], tmp_path: Path) -> None:
    check(exact, case, tmp_path)


@pytest.mark.parametrize("case", cases()[::5], ids=name)
def test_packed_rows(model: Model, case: dict[str, Any], tmp_path: Path) -> None:
    check(model, case, tmp_path)


def check(model: Model, case: dict[str, Any], folder: Path) -> None:
    requests = requests_of(6, seed=len(case["policy"]))
    plain = EngineOptions(
        batch_size=case["batch_size"], block_size=case["block_size"], prefill_chunk=case["prefill_chunk"],
        temperature=0.7, admission=case["admission"], prefix_cache=case["prefix_cache"], record=True,
        record_prefill_tail=case["tail"],
    )  # fmt: skip
    tiers = TierOptions(
        amount(case["hot"]), case["policy"], case["scope"], case["local"] and amount(case["local"]),
        f"file://{folder}" if case["remote"] else None, case["write"], case["start"],
    )  # fmt: skip
    options = replace(plain, tiers=tiers)
    expected, steps = run(model, requests, plain), run(model, requests, options)
    assert answers(steps) == answers(expected)
    assert selected(steps) == selected(expected)
    assert answers(run(model, requests, replace(options, record=False))) == answers(expected)
    completions: list[Completion] = [c for step in steps for c in step.finished]
    tables = {c.request_id: c.kv_blocks for c in completions}
    prompts = {c.request_id: c.prompt_tokens for c in completions}
    n_blocks = 1 + max(block for table in tables.values() for block in table)
    replay = Replay(len(model.layers), options, n_blocks)
    found = measured(steps, tables, case["block_size"])
    assert found == replay.found(steps, tables, prompts)

    hits: Counter[str] = Counter()
    for step in steps:
        for (phase, tier), traffic in step.traffic.items():
            if phase == "decode":
                hits[tier] += traffic.hits
    if case["batch_size"] == 1:  # else a block that two requests touch in a step counts once
        assert +hits == +Counter(TIERS[tier] for blocks in found.values() for tier in blocks.values())
