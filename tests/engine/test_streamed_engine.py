"""Prompts that go through the layers as a whole, as they do where weights are streamed: every bit stays the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsakv.config import ModelConfig
from dsakv.engine.engine import Engine
from dsakv.engine.options import EngineOptions
from dsakv.engine.weights import InPlace
from dsakv.jobs.loaded import LoadedModel
from dsakv.kv.options import Amount, TierOptions
from dsakv.request import Request, Step
from tests.models.checkpoints import save
from tests.weights.streamed import Outcome, load, run, smallest


class LayerByLayer(InPlace):
    """The order of streamed weights for loaded ones, and what was asked for."""

    streamed = True

    def __init__(self) -> None:
        self.asked: list[str] = []

    def embedding(self, *, head: bool) -> Any:
        self.asked.append("embedding")
        return super().embedding(head=head)

    def attention(self, layer_id: int) -> Any:
        self.asked.append(f"attention {layer_id}")
        return super().attention(layer_id)

    def feed_forward(self, layer_id: int) -> Any:
        self.asked.append(f"feed-forward {layer_id}")
        return super().feed_forward(layer_id)

    def head(self) -> Any:
        self.asked.append("head")
        return super().head()


def requests_of(lengths: list[int], shared: int = 0, new: int = 6) -> list[Request]:
    start = [(3 * j * j) % 256 for j in range(shared)]
    return [Request(i, start + [(11 * i + 5 * j * j) % 256 for j in range(n)], new) for i, n in enumerate(lengths)]


PLAIN = EngineOptions(batch_size=3, block_size=4, prefill_chunk=13, temperature=0.8, record=True, record_prefill_tail=3)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batches": {"admission": "batch"},
    "prefix cache": {"prefix_cache": True},
    "few blocks": {"prefix_cache": True, "kv_blocks": 30},
    "one at a time": {"batch_size": 1},
}


def tiers(directory: Path, **more: Any) -> TierOptions:
    remote = f"file://{directory}" if more.pop("remote", False) else None
    local = Amount.parse("2", "") if remote else None
    return TierOptions(Amount.parse("3", ""), local=local, remote=remote, **more)


TIERS: dict[str, dict[str, Any]] = {
    "hot": {},
    "write back": {"write": "back", "start": "warm", "scope": "shared"},
    "remote": {"remote": True},
    "remote, write back": {"remote": True, "write": "back", "start": "warm"},
}


@pytest.fixture(scope="module")
def loaded(small_checkpoint: Path) -> LoadedModel:
    return load(ModelConfig(ckpt_path=str(small_checkpoint), device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = tmp_path_factory.mktemp("glm")
    save(directory, "glm types")
    return load(ModelConfig(ckpt_path=str(directory), device="cpu"))


def compare(
    loaded: LoadedModel, options: EngineOptions, requests: list[Request]
) -> tuple[list[Step], list[Step], LayerByLayer]:
    """Steps chunk by chunk and layer by layer, which came to the same."""
    expected, steps = run(loaded, options, requests)
    weights = LayerByLayer()
    outcome, whole = run(replace(loaded, weights=weights), options, requests)
    assert outcome.same(expected)
    assert sorted(outcome.tokens) == [request.request_id for request in requests]
    for found in (steps, whole):
        assert [step.index for step in found] == sorted({step.index for step in found})
    return steps, whole, weights


@pytest.mark.parametrize("name", OPTIONS)
def test_every_bit_stays_the_same(loaded: LoadedModel, name: str) -> None:
    options = replace(PLAIN, **OPTIONS[name])
    steps, whole, weights = compare(loaded, options, requests_of([9, 32, 55, 20], shared=21))
    n_layers = len(loaded.model.layers)
    one = ["embedding", *(f"{half} {i}" for i in range(n_layers) for half in ("attention", "feed-forward")), "head"]
    assert weights.asked == one * (len(weights.asked) // len(one))
    if "cache" in name:
        cached = [[c.cached_tokens for step in found for c in step.finished] for found in (steps, whole)]
        assert sorted(cached[0]) == sorted(cached[1])
        assert max(cached[0]) >= 20
    if name == "plain":  # three prompts in one pass, the fourth in another; then decode
        prefills = [step for step in whole if step.kind == "prefill"]
        assert len(weights.asked) == len(one) * (2 + len(whole) - len(prefills))


@pytest.mark.parametrize("name", TIERS)
def test_tiers(loaded: LoadedModel, glm: LoadedModel, name: str, tmp_path: Path) -> None:
    options = replace(PLAIN, tiers=tiers(tmp_path, **TIERS[name]), prefix_cache=name == "hot")
    requests = requests_of([9, 32, 20], shared=9)
    model = glm if "write" in name else loaded
    steps, whole, _ = compare(model, options, requests)
    assert run(model, replace(options, tiers=None), requests)[0].same(run(model, options, requests)[0])
    assert _read(whole) == _read(steps) > 0


def _read(steps: list[Step]) -> int:
    """Blocks that decode fetched from below the device."""
    return sum(
        traffic.read_ops
        for step in steps
        for (phase, tier), traffic in step.traffic.items()
        if phase == "decode" and tier != "hbm"
    )


@pytest.mark.parametrize("tiered", [False, True])
def test_known_answers(loaded: LoadedModel, tiered: bool, tmp_path: Path) -> None:
    # A seat each: an answer that is read leaves its seat when its pass ends, which is later where that is a longer one.
    options = replace(PLAIN, batch_size=4, tiers=tiers(tmp_path, start="warm") if tiered else None)
    requests = [
        replace(request, forced_token_ids=[(7 * i) % 256 for i in range(6)] if request.request_id % 2 else None)
        for request in requests_of([9, 32, 55, 20])
    ]
    compare(loaded, options, requests)
    forced = [replace(request, forced_token_ids=[1, 2, 3, 4, 5, 6]) for request in requests]
    _, whole, weights = compare(loaded, options, forced)
    assert "head" not in weights.asked
    assert weights.asked.count("embedding") == 1
    assert len(whole) > 4


def test_tokens_that_end_a_request_early(loaded: LoadedModel) -> None:
    expected, _ = run(loaded, PLAIN, requests_of([9, 32, 55]))
    eos = frozenset(tokens[2] for tokens in expected.tokens.values())
    _, whole, _ = compare(loaded, replace(PLAIN, eos_token_ids=eos), requests_of([9, 32, 55]))
    assert any(c.finish_reason == "stop" for step in whole for c in step.finished)


def test_times_of_a_pass_are_shared_among_its_steps(loaded: LoadedModel) -> None:
    _, whole, _ = compare(loaded, replace(PLAIN, temperature=0.0), requests_of([30, 40]))
    prefills = [step for step in whole if step.kind == "prefill"]
    assert [step.prompt_tokens for step in prefills] == [13, 13, 13, 13, 13, 5]
    assert all(step.wall_us >= 0 for step in whole)


@pytest.mark.parametrize("unit", ["sublayer", "expert"])
def test_streams(small_checkpoint: Path, loaded: LoadedModel, unit: str, tmp_path: Path) -> None:
    """With everything at once: known answers, a prefix cache, tiers, requests that join while others run."""
    config = ModelConfig(ckpt_path=str(small_checkpoint), device="cpu", dtype="float32")
    options = replace(PLAIN, prefix_cache=True, tiers=tiers(tmp_path, remote=True, write="back", start="warm"))
    requests = requests_of([9, 32, 55, 20], shared=21)
    requests[1] = replace(requests[1], forced_token_ids=[5, 4, 3, 2, 1, 0])
    expected: Outcome = run(replace(loaded, weights=LayerByLayer()), options, requests)[0]
    streamed = load(config, unit=unit, host_budget=f"{smallest(config, unit=unit)}B")
    try:
        assert run(streamed, options, requests)[0].same(expected)
        engine = Engine(streamed.model, options, weights=streamed.weights)
        steps = engine.run(requests)
        next(steps)
        steps.close()  # type: ignore[attr-defined]
        assert run(streamed, options, requests)[0].same(expected)
    finally:
        streamed.close()
