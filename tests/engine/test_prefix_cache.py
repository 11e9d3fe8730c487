"""Reusing cached blocks: same tokens, less work, and hits as a plain computation from the prompts counts them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dsakv.engine.blocks import BlockManager
from dsakv.engine.engine import Engine
from dsakv.engine.options import EngineOptions
from dsakv.errors import InputError
from dsakv.models.contracts import Model
from dsakv.prefix import PrefixIndex
from dsakv.request import Completion, Request, Step
from tests.engine.fakes import FakeModel

BLOCK = 8


def sharing_requests(count: int, seed: int, vocab: int = 256, longest: int = 12) -> list[Request]:
    """Prompts that branch off each other at any token, some of them twice."""
    draw = random.Random(seed)
    prompts: list[list[int]] = []
    for _ in range(count):
        base = draw.choice(prompts) if prompts and draw.random() < 0.8 else []
        prompt = base[: draw.randint(0, len(base))]
        prompt = prompt + [draw.randrange(vocab) for _ in range(draw.randint(0, longest))]
        prompts.append(prompt or [1])
    return [Request(i, prompt, draw.randint(1, 9)) for i, prompt in enumerate(prompts)]


def run(model: Any, requests: list[Request], **options: Any) -> tuple[dict[int, Completion], list[Step]]:
    steps = list(Engine(model, EngineOptions(block_size=BLOCK, **options)).run(requests))
    return {c.request_id: c for step in steps for c in step.finished}, steps


def selected(steps: list[Step]) -> dict[tuple[int, int], Any]:
    """Positions by request and step, [L, k]."""
    return {
        (int(r), int(s)): step.records.positions[:, b, : step.records.counts[b]].tolist()
        for step in steps
        if step.records is not None
        for b, (r, s) in enumerate(zip(step.records.request_id, step.records.step_idx, strict=True))
    }


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1},
        {"batch_size": 4, "prefill_chunk": 24},
        {"batch_size": 3, "prefill_chunk": 7, "admission": "batch", "record_prefill_tail": 3},
        {"batch_size": 2, "kv_blocks": 30},
    ],
)
def test_tokens_and_selections_stay_the_same(model: Model, options: dict[str, Any]) -> None:
    requests = sharing_requests(16, seed=2, longest=40)
    requests = [r for r in requests if len(r.prompt_token_ids) <= 110]
    assert len(requests) > 10
    plain, plain_steps = run(model, requests, record=True, temperature=0.7, **options)
    reused, steps = run(model, requests, record=True, temperature=0.7, prefix_cache=True, **options)
    assert {i: c.token_ids for i, c in reused.items()} == {i: c.token_ids for i, c in plain.items()}
    assert selected(steps) == selected(plain_steps)
    hits = sum(c.cached_tokens for c in reused.values())
    assert hits > 0
    assert sum(c.cached_tokens for c in plain.values()) == 0
    assert sum(s.prompt_tokens for s in steps) == sum(s.prompt_tokens for s in plain_steps) - hits


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 7, "prefill_chunk": 50}])
def test_hits_are_what_earlier_prompts_share(options: dict[str, Any]) -> None:
    # Prompts hold no token 0, which the model always answers with: what was generated is in no prompt.
    requests = sharing_requests(300, seed=5, vocab=3, longest=30)
    requests = [Request(r.request_id, [t + 1 for t in r.prompt_token_ids], r.max_new_tokens) for r in requests]
    done, _ = run(FakeModel(), requests, prefix_cache=True, **options)
    index = PrefixIndex(BLOCK)
    shared = 0
    for request in requests:
        ids = request.prompt_token_ids
        blocks = 0  # leading full blocks that another prompt began with, the last token aside
        while (blocks + 1) * BLOCK < len(ids) and any(
            other.prompt_token_ids[: (blocks + 1) * BLOCK] == ids[: (blocks + 1) * BLOCK]
            for other in requests[: request.request_id]
        ):
            blocks += 1
        owners = index.lookup(ids)
        index.add(ids, request.request_id)
        assert done[request.request_id].cached_tokens == blocks * BLOCK == (owners[-1][1] if owners else 0)
        shared += blocks
    assert shared > 200


def test_what_was_generated_is_reused_too() -> None:
    turn = Request(0, [5] * 20, 13)
    done, _ = run(FakeModel(), [turn, Request(1, [5] * 20 + [0] * 20, 1)], prefix_cache=True)
    assert done[1].cached_tokens == 32  # 20 prompt tokens and 12 generated ones whose KV was computed


class PlainCache:
    """The same rules over whole prefixes in place of blocks and hashes, one request at a time."""

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks, self.clock = n_blocks, 0
        self.used: dict[tuple[int, ...], int] = {}  # prefix to when it was last used

    def serve(self, tokens: list[int], prompt: int, need: int) -> int:
        hits = 0
        while (hits + 1) * BLOCK < prompt and tuple(tokens[: (hits + 1) * BLOCK]) in self.used:
            hits += 1
        held = {tuple(tokens[: i * BLOCK]) for i in range(1, hits + 1)}
        while len(self.used) + need - hits > self.n_blocks:
            del self.used[min(self.used.keys() - held, key=self.used.__getitem__)]
        for i in range(len(tokens) // BLOCK, 0, -1):
            self.clock += 1
            prefix = tuple(tokens[: i * BLOCK])
            if i <= hits or prefix not in self.used:
                self.used[prefix] = self.clock
        return hits * BLOCK


@pytest.mark.parametrize("n_blocks", [14, 20, 45])
def test_the_least_recently_used_blocks_go_first(n_blocks: int) -> None:
    requests = [r for r in sharing_requests(400, seed=9, vocab=3, longest=25) if len(r.prompt_token_ids) <= 100]
    done, _ = run(FakeModel(), requests, prefix_cache=True, kv_blocks=n_blocks)
    cache = PlainCache(n_blocks)
    for request in requests:
        computed = request.prompt_token_ids + [0] * (request.max_new_tokens - 1)
        expected = cache.serve(computed, len(request.prompt_token_ids), -(-len(computed) // BLOCK))
        assert done[request.request_id].cached_tokens == expected
    assert sum(c.cached_tokens for c in done.values()) > 0


def test_a_cache_too_small_for_a_request_is_refused() -> None:
    with pytest.raises(InputError, match=r"prompt 0 with its 2 new tokens fills 3 blocks, the KV cache has 2"):
        run(FakeModel(), [Request(0, [1] * 17, 2)], kv_blocks=2)


def test_a_small_pool_makes_requests_wait() -> None:
    requests = [Request(i, [i] * 16, 4) for i in range(5)]
    done, steps = run(FakeModel(), requests, batch_size=5, kv_blocks=6)
    assert done.keys() == set(range(5))
    assert max(len(step.new_tokens) for step in steps) == 2


def test_blocks_are_counted_by_their_holders() -> None:
    manager = BlockManager(4)
    first = manager.allocate(3)
    assert first == [0, 1, 2]
    manager.publish(0, b"a")
    manager.publish(1, b"ab")
    assert manager.cached([b"a", b"ab", b"abc"]) == [0, 1]
    assert manager.cached([b"x", b"ab"]) == []
    second = manager.allocate(3, [0, 1])
    assert second == [0, 1, 3]
    assert manager.allocate(1) is None
    manager.release(first)
    assert manager.allocate(2) is None  # 0 and 1 are still held
    assert manager.allocate(1) == [2]
    manager.release([2])
    manager.release(second)
    assert manager.cached([b"a", b"ab"]) == [0, 1]
    assert manager.allocate(3) == [2, 3, 1]  # blank ones, then the end of the prefix before its beginning
    assert manager.cached([b"a", b"ab"]) == [0]
    assert manager.allocate(1, [0]) == [0]
    assert manager.allocate(1) is None


def test_a_second_block_of_one_content_stays_private() -> None:
    manager = BlockManager(2)
    one, two = manager.allocate(1), manager.allocate(1)
    assert one is not None
    assert two is not None
    manager.publish(one[0], b"a")
    manager.publish(two[0], b"a")
    manager.release(two)
    manager.release(one)
    assert manager.cached([b"a"]) == one
    assert manager.allocate(2) == [1, 0]
