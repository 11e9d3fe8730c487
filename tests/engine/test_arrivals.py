"""Who is served when: arrivals, admission and the number of requests in flight, against plain computations."""

from __future__ import annotations

import random
from typing import Any, cast

import pytest

from dsakv.engine.clock import VirtualClock
from dsakv.engine.engine import Engine
from dsakv.engine.options import EngineOptions
from dsakv.models.contracts import Model
from dsakv.request import Completion, Request, Step
from tests.engine.fakes import FakeModel, FakeTime


def serve(requests: list[Request], tick: float = 0.5, **options: Any) -> tuple[list[Step], dict[int, Completion]]:
    """Steps and completions where every look at the clock takes ``tick`` seconds."""
    steps = list(
        Engine(cast(Model, FakeModel()), EngineOptions(**options)).run(requests, VirtualClock(ticks=FakeTime(tick)))
    )
    completions = [completion for step in steps for completion in step.finished]
    assert len({completion.request_id for completion in completions}) == len(completions)
    return steps, {completion.request_id: completion for completion in completions}


def request(request_id: int, arrival_s: float | None = None, tokens: int = 4, new: int = 3) -> Request:
    return Request(request_id, [request_id % 7] * tokens, new, arrival_s=arrival_s)


def begins(completions: dict[int, Completion]) -> dict[int, float]:
    """When the prefill of each request began, in seconds."""
    return {i: round((c.arrival_ms + c.queue_ms) / 1e3, 6) for i, c in completions.items()}


@pytest.mark.parametrize(("admission", "max_concurrency"), [("batch", 0), ("continuous", 0), ("continuous", 64)])
def test_ten_thousand_requests_are_all_served_in_order(admission: str, max_concurrency: int) -> None:
    draw = random.Random(1)
    at, requests = 0.0, []
    for i in range(10_000):
        at += draw.expovariate(600)
        requests.append(request(i, at, draw.randint(1, 40), draw.randint(1, 6)))
    steps, done = serve(
        requests, 0.001, batch_size=32, admission=admission, max_concurrency=max_concurrency, prefill_chunk=128
    )
    assert done.keys() == set(range(10_000))
    started = begins(done)
    order = sorted(started, key=lambda i: (started[i], i))
    assert order == list(range(10_000))  # first come, first served: nobody waits behind one who came later
    for i, completion in done.items():
        assert len(completion.token_ids) == requests[i].max_new_tokens
        arrival = requests[i].arrival_s or 0.0
        assert completion.arrival_ms / 1e3 >= arrival - 1e-9
        if not max_concurrency:
            assert completion.arrival_ms / 1e3 == pytest.approx(arrival)
        assert 0 <= completion.queue_ms <= completion.ttft_ms <= completion.latency_ms
    assert sum(step.prompt_tokens for step in steps) == sum(len(r.prompt_token_ids) for r in requests)
    in_flight = peak_in_flight(done)
    assert in_flight <= max_concurrency if max_concurrency else in_flight > 32


def peak_in_flight(done: dict[int, Completion]) -> int:
    ends = [(round(c.arrival_ms + c.latency_ms, 3), -1) for c in done.values()]
    events = ends + [(round(c.arrival_ms, 3), 1) for c in done.values()]
    now = peak = 0
    for _, change in sorted(events):
        now += change
        peak = max(peak, now)
    return peak


def test_a_batch_waits_for_the_one_before_it() -> None:
    requests = [request(i, new=2 if i % 3 else 6) for i in range(7)]
    steps, done = serve(requests, batch_size=3, admission="batch")
    started = begins(done)
    for batch in ([3, 4, 5], [6]):
        before = [i for i in range(7) if i < batch[0]]
        assert min(started[i] for i in batch) >= max((done[i].arrival_ms + done[i].latency_ms) / 1e3 for i in before)
    sizes = [len(step.new_tokens) for step in steps if step.kind == "decode"]
    assert sizes == [3, 1, 1, 1, 1, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1]


def test_a_batch_takes_who_has_come_and_does_not_wait_for_others() -> None:
    requests = [request(0, 0.0), request(1, 0.2), request(2, 1000.0)]
    _, done = serve(requests, batch_size=2, admission="batch")
    assert begins(done)[0] <= 2
    assert 0 < done[1].queue_ms / 1e3 < 10
    assert begins(done)[2] >= 1000.0
    assert done[2].queue_ms / 1e3 < 2  # the clock jumped there


def test_times_are_those_of_the_clock() -> None:
    _, done = serve([request(0, 5.0, new=4)], tick=1.0)
    only = done[0]
    # The clock is read once for the plan, then at begin and end of each of four steps and when a request retires.
    assert only.arrival_ms == 5000
    assert only.queue_ms == 2000
    assert only.ttft_ms == 3000
    assert only.tpot_ms is not None
    assert only.latency_ms == only.ttft_ms + 3 * only.tpot_ms


def test_a_cap_on_requests_in_flight_holds_the_sender_back() -> None:
    requests = [request(i, 0.0, new=3) for i in range(6)]
    _, done = serve(requests, batch_size=4, max_concurrency=2)
    ends = sorted((c.arrival_ms + c.latency_ms) for c in done.values())
    assert [done[i].arrival_ms for i in (0, 1)] == [0, 0]
    for i in range(2, 6):
        assert done[i].arrival_ms >= ends[i - 2]  # sent when one of those in flight was answered
        assert done[i].queue_ms < 5000
    late = [request(0, 0.0), request(1, 0.0), request(2, 500.0)]
    _, done = serve(late, max_concurrency=1)
    assert done[2].arrival_ms == 500_000


def test_requests_without_times_come_at_once_and_unsorted_ones_in_order() -> None:
    _, done = serve([request(0), request(1), request(2)])
    assert {c.arrival_ms for c in done.values()} == {0.0}
    _, done = serve([request(0, 30.0), request(1, 10.0), request(2, 20.0)])
    started = begins(done)
    assert sorted(started, key=started.__getitem__) == [1, 2, 0]
