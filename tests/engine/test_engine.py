"""The engine's promises that need no second implementation: batching, limits, sampling, recording, errors."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch

from dsakv.distributed import World
from dsakv.engine.engine import Engine
from dsakv.engine.options import EngineOptions
from dsakv.engine.sampling import sample
from dsakv.errors import DsakvError, InputError
from dsakv.models.contracts import Model
from dsakv.request import Completion, Request, Step
from tests.engine.fakes import FakeModel


def run(model: Model, options: EngineOptions, requests: list[Request]) -> tuple[dict[int, Completion], list[Step]]:
    steps = list(Engine(model, options).run(requests))
    return {completion.request_id: completion for step in steps for completion in step.finished}, steps


def make_requests(prompts: list[list[int]], new_tokens: int = 12) -> list[Request]:
    return [Request(i, ids, new_tokens + i) for i, ids in enumerate(prompts)]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_do_not_depend_on_batch_chunk_or_tracing(
    model: Model, prompts: list[list[int]], temperature: float
) -> None:
    requests = make_requests(prompts)
    expected, _ = run(model, EngineOptions(temperature=temperature, seed=5), requests)
    for options in (
        EngineOptions(temperature=temperature, seed=5, batch_size=4, record=True, record_prefill_tail=3),
        EngineOptions(temperature=temperature, seed=5, batch_size=6, block_size=1, prefill_chunk=9),
    ):
        completions, _ = run(model, options, requests)
        assert {i: c.token_ids for i, c in completions.items()} == {i: c.token_ids for i, c in expected.items()}
    assert all(len(c.token_ids) == 12 + i and c.finish_reason == "length" for i, c in expected.items())


def test_seeds_and_requests_draw_their_own_numbers(model: Model, prompts: list[list[int]]) -> None:
    twins = [Request(0, prompts[1], 20), Request(1, prompts[1], 20)]
    completions, _ = run(model, EngineOptions(temperature=1.0, seed=1, batch_size=2), twins)
    other, _ = run(model, EngineOptions(temperature=1.0, seed=2, batch_size=2), twins)
    assert completions[0].token_ids != completions[1].token_ids
    assert completions[0].token_ids != other[0].token_ids


def test_requests_join_as_others_finish(model: Model, prompts: list[list[int]]) -> None:
    requests = [Request(i, prompts[i % len(prompts)], 3 if i % 2 else 15) for i in range(7)]
    _, steps = run(model, EngineOptions(batch_size=2), requests)
    sizes = [len(step.new_tokens) for step in steps if step.kind == "decode"]
    assert max(sizes) == 2
    assert sizes.count(1) < 15  # only the last request runs alone
    finished = [completion.request_id for step in steps for completion in step.finished]
    assert sorted(finished) == list(range(7))
    assert finished[0] == 1
    assert [step.index for step in steps] == list(range(len(steps)))
    assert sum(step.prompt_tokens for step in steps) == sum(len(request.prompt_token_ids) for request in requests)


def test_end_of_sequence_stops_and_is_left_out(model: Model, prompts: list[list[int]]) -> None:
    free, _ = run(model, EngineOptions(), [Request(0, prompts[2], 30)])
    tokens = free[0].token_ids
    stop = tokens[7]
    completions, steps = run(model, EngineOptions(eos_token_ids=frozenset([stop])), [Request(0, prompts[2], 30)])
    length = tokens.index(stop)
    assert completions[0].token_ids == tokens[:length]
    assert completions[0].finish_reason == "stop"
    assert completions[0].decode_steps == sum(step.kind == "decode" for step in steps) == length


def test_one_token_needs_no_decode_step(model: Model, prompts: list[list[int]]) -> None:
    completions, steps = run(model, EngineOptions(record=True), [Request(0, prompts[0], 1)])
    assert len(completions[0].token_ids) == 1
    assert completions[0].tpot_ms is None
    assert [step.kind for step in steps] == ["prefill"]
    assert all(step.records is None for step in steps)


def test_records_are_complete_and_causal(model: Model, prompts: list[list[int]]) -> None:
    tail = 4
    options = EngineOptions(batch_size=3, prefill_chunk=11, record=True, record_prefill_tail=tail)
    requests = make_requests(prompts)
    _, steps = run(model, options, requests)
    seen = set()
    for step in steps:
        if step.records is None:
            continue
        records = step.records
        assert records.positions.shape[0] == len(model.layers)
        for b, (request_id, step_idx) in enumerate(zip(records.request_id, records.step_idx, strict=True)):
            assert (step_idx < 0) == (step.kind == "prefill")
            assert (request_id, step_idx) not in seen
            seen.add((int(request_id), int(step_idx)))
            assert records.seq_len[b] == len(requests[request_id].prompt_token_ids) + step_idx + 1
            assert records.counts[b] == min(records.seq_len[b], model.top_k)
            valid = records.positions[:, b, : records.counts[b]]
            assert (valid[:, 1:] > valid[:, :-1]).all()
            assert (valid >= 0).all()
            assert (valid < records.seq_len[b]).all()
            assert torch.from_numpy(records.scores[:, b, : records.counts[b]]).isfinite().all()
        assert records.found is None
        assert (records.fetch_us[0] > 0).all()
        assert np.isnan(records.fetch_us[1:]).all()
        assert not records.fetch_batch[1:].any()
        if step.kind == "decode":
            assert (records.fetch_batch[0] == len(records.request_id)).all()
    expected = {
        (i, s)
        for i, request in enumerate(requests)
        for s in range(-min(tail, len(request.prompt_token_ids)), request.max_new_tokens - 1)
    }
    assert seen == expected


def test_the_recorded_tail_is_what_token_by_token_prefill_selects(model: Model, prompts: list[list[int]]) -> None:
    def tail_of(chunk: int) -> dict[int, list[list[int]]]:
        options = EngineOptions(prefill_chunk=chunk, record=True, record_prefill_tail=6)
        _, steps = run(model, options, [Request(0, prompts[2], 1)])
        return {
            int(s): step.records.positions[:, b, : step.records.counts[b]].tolist()
            for step in steps
            if step.records is not None
            for b, s in enumerate(step.records.step_idx)
        }

    assert tail_of(64) == tail_of(1)


@pytest.mark.parametrize(
    ("ids", "new_tokens", "message"),
    [
        ([], 4, "is empty"),
        ([1] * 500, 13, "exceeds the limit of 512"),
        ([1, 260], 4, "token 260"),
        ([1, -1], 4, "token -1"),
    ],
)
def test_bad_requests_are_refused_before_the_first_step(
    model: Model, ids: list[int], new_tokens: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Engine(model, EngineOptions()).run([Request(0, [1, 2], 2), Request(1, ids, new_tokens)])


def test_the_longest_sequence_fits_exactly(model: Model) -> None:
    completions, _ = run(model, EngineOptions(), [Request(0, [1] * 500, 12)])
    assert len(completions[0].token_ids) == 12


def test_times_add_up(model: Model, prompts: list[list[int]]) -> None:
    completions, _ = run(model, EngineOptions(batch_size=2), make_requests(prompts))
    for completion in completions.values():
        assert 0 <= completion.queue_ms <= completion.ttft_ms <= completion.latency_ms
        assert completion.tpot_ms is not None
        rest = completion.tpot_ms * completion.decode_steps
        assert completion.latency_ms == pytest.approx(completion.ttft_ms + rest)


def test_a_prompt_waits_until_its_own_prefill(model: Model) -> None:
    requests = [Request(i, [1 + i] * 100, 2) for i in range(3)]
    completions, steps = run(model, EngineOptions(batch_size=3, prefill_chunk=100), requests)
    for i in range(3):
        before = sum(step.wall_us for step in steps[:i]) / 1e3
        assert completions[i].queue_ms >= before


def test_greedy_takes_the_lowest_of_equal_logits() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [3.0, 3.0, 3.0]])
    assert sample(logits, 0.0, [torch.Generator(), torch.Generator()]) == [1, 0]


def test_sampling_follows_the_softmax_of_scaled_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(20000, 3)
    drawn = torch.bincount(torch.tensor(sample(logits, 0.5, [generator] * 20000)), minlength=3) / 20000
    torch.testing.assert_close(drawn, (logits[0] / 0.5).softmax(-1), atol=0.01, rtol=0)


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    for temperature in (1e-3, 1e-45, 5e-324):
        assert sample(logits, temperature, [torch.Generator()]) == [1]


def test_logits_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(DsakvError, match="not finite"):
        sample(torch.tensor([[0.0, float("nan")]]), 0.0, [torch.Generator()])


class Mute(World):
    """A rank whose others hear everything and say nothing."""

    def share(self, value: Any) -> Any:
        return value


def test_a_run_that_others_wait_in_is_taken_to_its_end() -> None:
    engine = Engine(cast(Model, FakeModel()), EngineOptions(), Mute(0, 2))
    requests = [Request(0, [1, 2, 3], 4)]
    steps = engine.run(requests)
    next(steps)
    with pytest.raises(RuntimeError, match="steps left"):
        engine.run(requests)
    list(steps)
    assert len(list(engine.run(requests))) == 4
