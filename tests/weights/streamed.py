"""Models whose weights are streamed, and what came of a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dsakv.config import ModelConfig, WeightsConfig
from dsakv.distributed import ALONE
from dsakv.engine.engine import Engine
from dsakv.engine.options import EngineOptions
from dsakv.errors import InputError
from dsakv.jobs.loaded import LoadedModel
from dsakv.jobs.model import prepared_model
from dsakv.request import Request, Step, WeightTraffic
from dsakv.weights.load import silent
from dsakv.weights.placement import WeightsPlan

REQUESTS = [Request(i, [(11 * i + 5 * j * j) % 256 for j in range(9 + 23 * i)], 6) for i in range(3)]


class Watched:
    """A model that keeps the logits that it gave."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._model = loaded.model
        self.kept: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def logits(self, hidden: Tensor) -> Tensor:
        self.kept.append(self._model.logits(hidden))
        return self.kept[-1]


class Outcome(NamedTuple):
    """What a run came to, in an order that does not depend on how its steps were cut."""

    logits: list[tuple[int, list[Tensor]]]
    """By request, one for each of its tokens."""
    tokens: dict[int, list[int]]
    selected: list[tuple[int, int, Any, Any]]
    """Request, step, positions and scores of every layer."""

    def same(self, other: Outcome) -> bool:
        """Whether all bits are."""
        return (self.tokens, self.selected) == (other.tokens, other.selected) and all(
            a == b and all(torch.equal(x, y) for x, y in zip(one, two, strict=True))
            for (a, one), (b, two) in zip(self.logits, other.logits, strict=True)
        )


def run(loaded: LoadedModel, options: EngineOptions, requests: list[Request] = REQUESTS) -> tuple[Outcome, list[Step]]:
    """Run the requests on a model, wherever its weights are."""
    model = Watched(loaded)
    steps = list(Engine(model, options, weights=loaded.weights).run(requests))
    tokens = {c.request_id: c.token_ids for step in steps for c in step.finished}
    given = [token for step in steps for token in step.new_tokens]
    logits: dict[int, list[Tensor]] = {}
    for (request_id, _), row in zip(given, (row for rows in model.kept for row in rows), strict=True):
        logits.setdefault(request_id, []).append(row)
    selected = sorted(
        (int(r), int(s), records.positions[:, b, :n].tolist(), records.scores[:, b, :n].tolist())
        for step in steps
        if (records := step.records) is not None
        for b, (r, s, n) in enumerate(zip(records.request_id, records.step_idx, records.counts, strict=True))
    )
    return Outcome(sorted(logits.items()), tokens, selected), steps


def load(config: ModelConfig, **weights: Any) -> LoadedModel:
    """The model, with weights streamed where ``weights`` (of ``WeightsConfig``) has a budget."""
    with prepared_model(config, ALONE, None, WeightsConfig(**weights)) as prepared:
        return prepared.load(silent)


def smallest(config: ModelConfig, **weights: Any) -> int:
    """Bytes of the smallest budget that does."""
    with (
        pytest.raises(InputError) as caught,
        prepared_model(config, ALONE, None, WeightsConfig(host_budget="1B", **weights)),
    ):
        pass
    found = re.search(r"at least ([\d,]+)B", caught.value.hint)
    assert found is not None
    return int(found[1].replace(",", ""))


def traffic(steps: list[Step]) -> list[WeightTraffic]:
    """That of each pass."""
    return [step.weights for step in steps if step.weights is not None]


def plan_of(config: ModelConfig, **weights: Any) -> WeightsPlan:
    """What would be streamed."""
    with prepared_model(config, ALONE, None, WeightsConfig(**weights)) as prepared:
        assert prepared.planned is not None
        prepared.planned.files.close()
        return prepared.planned.plan


def checkpoint_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))
