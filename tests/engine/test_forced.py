"""A known answer read in one chunked pass leaves the records that decoding it token by token leaves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from dsakv.engine.engine import Engine
from dsakv.engine.options import EngineOptions
from dsakv.models.contracts import Model
from dsakv.request import Completion, Request, Step

Records = dict[tuple[int, int], dict[str, Any]]


class Dictated:
    """A model that says what it is told, one token after the other, and computes everything else itself."""

    def __init__(self, model: Model, tokens: list[int]) -> None:
        self._model, self._tokens = model, iter(tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def logits(self, hidden: Tensor) -> Tensor:
        assert len(hidden) == 1
        out = torch.zeros(1, self._model.vocab_size)
        out[0, next(self._tokens)] = 1
        return out


@pytest.fixture(scope="module")
def requests(prompts: list[list[int]]) -> list[Request]:
    """Answers of 1 to 90 tokens, some of them longer than the prompt, all others than the model's own."""
    generator = torch.Generator().manual_seed(11)
    return [
        Request(i, ids, n, forced_token_ids=torch.randint(0, 256, (n,), generator=generator).tolist())
        for i, (ids, n) in enumerate(zip(prompts, (40, 1, 2, 90, 7, 33), strict=True))
    ]


def records(steps: list[Step]) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """What a record is made of, by request and step."""
    for step in steps:
        if step.records is not None:
            r = step.records
            for b, key in enumerate(zip(r.request_id.tolist(), r.step_idx.tolist(), strict=True)):
                count = int(r.counts[b])
                yield (
                    key,
                    {
                        "seq_len": int(r.seq_len[b]),
                        "positions": r.positions[:, b, :count],
                        "scores": r.scores[:, b, :count],
                        "index_layer_id": r.index_layer_id,
                        "row_bytes": r.row_bytes,
                    },
                )


@pytest.fixture(scope="module")
def decoded(model: Model, requests: list[Request]) -> tuple[Records, dict[int, Completion]]:
    found: Records = {}
    completions: dict[int, Completion] = {}
    for request in requests:
        plain = Request(request.request_id, request.prompt_token_ids, request.max_new_tokens)
        speaker = cast(Model, Dictated(model, request.forced_token_ids or []))
        steps = list(Engine(speaker, EngineOptions(record=True, record_prefill_tail=3)).run([plain]))
        found |= dict(records(steps))
        completions |= {c.request_id: c for step in steps for c in step.finished}
    return found, completions


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefill_chunk": 17, "batch_size": 3},
        {"prefill_chunk": 64, "batch_size": 6, "block_size": 16, "prefix_cache": True},
        {"prefill_chunk": 1},
    ],
)
def test_forced_records_are_decoded_records(
    model: Model, requests: list[Request], decoded: tuple[Records, dict[int, Completion]], options: dict[str, Any]
) -> None:
    expected, completions = decoded
    engine = Engine(model, EngineOptions(record=True, record_prefill_tail=3, **options))
    steps = list(engine.run([*requests, *repeated(requests)] if "prefix_cache" in options else requests))
    assert all(step.kind == "prefill" and not step.new_tokens for step in steps)
    found: Records = {}
    for key, record in records(steps):
        assert key not in found
        found[key] = record
    for key, record in found.items():
        wanted = expected[key[0] % len(requests), key[1]]
        assert record["seq_len"] == wanted["seq_len"]
        assert np.array_equal(record["positions"], wanted["positions"])
        np.testing.assert_allclose(record["scores"], wanted["scores"], rtol=1e-4, atol=1e-5)
        assert np.array_equal(record["index_layer_id"], wanted["index_layer_id"])
        assert record["row_bytes"] == wanted["row_bytes"]
    copies = 2 if "prefix_cache" in options else 1
    assert len(found) == copies * len(expected)
    done = {c.request_id: c for step in steps for c in step.finished}
    for request_id, completion in done.items():
        decoded_one = completions[request_id % len(requests)]
        assert completion.token_ids == requests[request_id % len(requests)].forced_token_ids == decoded_one.token_ids
        assert completion.decode_steps == decoded_one.decode_steps
        assert completion.finish_reason == "length"
        assert completion.tpot_ms is None
        assert completion.queue_ms <= completion.ttft_ms <= completion.latency_ms
    if copies == 2:
        assert sum(c.cached_tokens for c in done.values()) > 0


def repeated(requests: list[Request]) -> list[Request]:
    return [
        Request(i + len(requests), r.prompt_token_ids, r.max_new_tokens, forced_token_ids=r.forced_token_ids)
        for i, r in enumerate(requests)
    ]


def test_a_pass_counts_as_the_steps_that_it_stands_for(model: Model, requests: list[Request]) -> None:
    engine = Engine(model, EngineOptions(record=True, batch_size=3, prefill_chunk=50, record_prefill_tail=2))
    before = -1
    numbers: dict[int, list[int]] = {request.request_id: [] for request in requests}
    for step in engine.run(requests):
        assert step.index > before
        before = step.index
        if step.records is not None:
            assert (np.diff(step.records.step_offset) >= 0).all()
            before = max(before, step.index + int(step.records.step_offset.max()))
            for b, step_idx in enumerate(step.records.step_idx.tolist()):
                if step_idx >= 0:
                    assert len(numbers[int(step.records.request_id[b])]) == step_idx
                    numbers[int(step.records.request_id[b])].append(step.index + int(step.records.step_offset[b]))
    for request in requests:
        found = numbers[request.request_id]
        assert len(found) == request.max_new_tokens - 1
        assert found == sorted(set(found))


def test_forced_and_free_requests_run_together(model: Model, requests: list[Request]) -> None:
    free = [Request(len(requests) + i, r.prompt_token_ids, 9) for i, r in enumerate(requests)]
    alone = {c.request_id: c for step in Engine(model, EngineOptions()).run(free) for c in step.finished}
    both = [request for pair in zip(requests, free, strict=True) for request in pair]
    steps = list(Engine(model, EngineOptions(batch_size=4, prefill_chunk=30)).run(both))
    done = {c.request_id: c for step in steps for c in step.finished}
    assert done.keys() == set(range(len(both)))
    for request in free:
        assert done[request.request_id].token_ids == alone[request.request_id].token_ids


def test_an_end_of_sequence_in_a_known_answer_does_not_stop_it(model: Model, prompts: list[list[int]]) -> None:
    request = Request(0, prompts[1], 5, forced_token_ids=[3, 4, 5, 6, 7])
    steps = list(Engine(model, EngineOptions(eos_token_ids=frozenset([4, 7]), record=True)).run([request]))
    (done,) = [c for step in steps for c in step.finished]
    assert done.token_ids == [3, 4, 5, 6, 7]
    assert sum(1 for _ in records(steps)) == done.decode_steps == 4
