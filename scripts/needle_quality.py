"""Does a model that selects still find the needles of RULER, and did its selections hold them?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np

from dsakv.engine.engine import Engine
from dsakv.engine.options import EngineOptions
from dsakv.jobs.loaded import LoadedModel
from dsakv.models.contracts import Model
from dsakv.models.llama import Llama
from dsakv.request import Request, StepRecords
from dsakv.workloads.corpus import CorpusText
from dsakv.workloads.ruler.essay import Essay
from dsakv.workloads.ruler.workload import Ruler
from scripts.training_sources import Work

TASKS = ("niah_single_1", "niah_single_2", "niah_multikey_1")
NEW_TOKENS = 32
"""An answer is a number of seven digits."""


@dataclass(slots=True)
class Answer:
    """What came of one item."""

    task: str
    text: str
    score: float
    """RULER's: 1 where the text holds the number."""
    inside: list[float] | None
    """Share of the needle's tokens that the first decode step selects, by layer. None where nothing selects, and
    where the first token ended the answer."""


def needle_items(
    loaded: LoadedModel, works: list[Work], length: int, count: int, seed: int
) -> tuple[Ruler, list[Request]]:
    """``count`` items whose prompts and answers fill ``length`` tokens, hidden in a text that no training saw."""
    prose = max((work for work in works if work.held_out and work.kind == "prose"), key=lambda work: len(work.text))
    essay = Essay.of(CorpusText(prose.text, prose.name))
    ruler = Ruler(tasks=TASKS, context_length=length, limit=count, max_new_tokens=NEW_TOKENS, seed=seed, essay=essay)
    return ruler, list(ruler.requests(loaded.tokenizer, loaded.max_seq_len))


def answer(
    model: Llama, loaded: LoadedModel, ruler: Ruler, requests: list[Request], advance: Callable[[int], None]
) -> list[Answer]:
    """Greedy answers of the model, in the order of ``requests``; ``advance`` is told of prompt tokens read."""
    options = EngineOptions(eos_token_ids=loaded.eos_token_ids, record=model.top_k > 0)
    texts: dict[int, str] = {}
    inside: dict[int, list[float]] = {}
    for step in Engine(cast(Model, model), options).run(requests):
        advance(step.prompt_tokens)
        for done in step.finished:
            texts[done.request_id] = loaded.tokenizer.decode(done.token_ids)
        if step.records is not None:
            for column in np.flatnonzero(step.records.step_idx == 0).tolist():
                request = requests[int(step.records.request_id[column])]
                inside[request.request_id] = shares_inside(step.records, column, request.needle_spans)
    return [
        Answer(
            task=str(request.metadata["task"]),
            text=texts[request.request_id],
            score=ruler.score(request, texts[request.request_id]),
            inside=inside.get(request.request_id),
        )
        for request in requests
    ]


def shares_inside(records: StepRecords, column: int, spans: tuple[tuple[int, int], ...]) -> list[float]:
    """Share of the tokens in ``spans`` that the query ``column`` selects, by layer."""
    needle = np.concatenate([np.arange(begin, end) for begin, end in spans])
    selected = records.positions[:, column, : records.counts[column]]  # [L, K]
    return [float(np.isin(needle, each).mean()) for each in selected]
