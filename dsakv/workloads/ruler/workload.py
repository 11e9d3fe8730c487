"""The RULER workload: generated items, or those of RULER's own files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from dsakv.config import Config
from dsakv.errors import InputError
from dsakv.request import Request
from dsakv.tokenizer import Tokenizer
from dsakv.workloads.base import fit_prompt, prompt_room
from dsakv.workloads.corpus import load_text
from dsakv.workloads.ruler.essay import Essay
from dsakv.workloads.ruler.generator import GENERATED, IN_TEXT, Generator
from dsakv.workloads.ruler.needles import needle_spans
from dsakv.workloads.ruler.reader import Item, find_files, read_items
from dsakv.workloads.ruler.templates import TASKS


@dataclass(slots=True)
class Ruler:
    """RULER (Hsieh et al., 2024, https://arxiv.org/abs/2404.06654): long-context tasks of a chosen length."""

    tasks: tuple[str, ...] = ("all",)
    context_length: int = 4096
    """Tokens of prompt and answer together; for generated items."""
    data: Path | None = None
    """RULER JSONL file or directory in place of the generator."""
    limit: int = 64
    """Items at most, the tasks in turn."""
    max_new_tokens: int = 64
    truncate: Literal["head", "tail", "middle"] = "middle"
    seed: int = 0
    essay: Essay | None = None
    """Haystack of generated items that hide needles in a text; None takes the default text."""
    dropped: Counter[str] = field(default_factory=Counter, init=False)
    name: str = field(default="ruler", init=False)
    score_groups: tuple[str, ...] = field(default=("task",), init=False)

    @classmethod
    def from_config(cls, config: Config) -> Ruler:
        workload = cls(
            tasks=config.ruler.tasks,
            context_length=config.ruler.context_length,
            data=Path(os.path.expanduser(config.ruler.data)) if config.ruler.data is not None else None,
            limit=config.workload.limit,
            max_new_tokens=config.engine.max_new_tokens,
            truncate=config.workload.truncate,
            seed=config.engine.seed,
        )
        # Wrong tasks and missing files are told of before a model is loaded.
        if workload.data is None:
            tasks = workload._generated_tasks()
            if IN_TEXT & set(tasks):
                workload.essay = Essay.of(load_text(config.workload.corpus))
        else:
            workload._chosen_files(workload.data)
        return workload

    def requests(self, tokenizer: Tokenizer, max_seq_len: int) -> Iterator[Request]:
        """See ``Workload.requests``. Raises InputError for unknown tasks, for tasks that cannot be generated or
        do not fit the context length, and for every bad row among the ``limit`` that will be read."""
        self.dropped = Counter()
        room = prompt_room(max_seq_len, self.max_new_tokens)
        if self.data is None:
            tasks = self._generated_tasks()
            essay = Essay.of(load_text()) if self.essay is None and IN_TEXT & set(tasks) else self.essay
            generator = Generator.load(tokenizer, self.context_length, self.seed, essay)
            generator.check(tasks, self.limit)
            items = generator.items(tasks, self.limit)
        else:
            chosen = self._chosen_files(self.data)
            for _ in self._rows(chosen):  # a bad row stops the run before it begins
                pass
            items = self._rows(chosen)
        return self._requests(items, tokenizer, room)

    def score(self, request: Request, text: str) -> float:
        """Share of the gold strings that the completion holds, letter case aside; for the QA tasks 1 if it
        holds any (RULER's ``string_match_all`` and ``string_match_part``)."""
        found = [answer.lower() in text.lower() for answer in request.answers]
        if _any_will_do(str(request.metadata["task"])):
            return float(any(found))
        return sum(found) / len(found)

    def _generated_tasks(self) -> tuple[str, ...]:
        return _choose(self.tasks, GENERATED, "generated")

    def _chosen_files(self, data: Path) -> dict[str, list[Path]]:
        files = find_files(data)
        return {task: files[task] for task in _choose(self.tasks, tuple(files), f"in {data}")}

    def _rows(self, files: dict[str, list[Path]]) -> Iterator[Item]:
        def of_task(task: str) -> Iterator[Item]:
            return chain.from_iterable(read_items(task, file) for file in files[task])

        return islice(_in_turn([of_task(task) for task in files]), self.limit)

    def _requests(self, items: Iterable[Item], tokenizer: Tokenizer, max_prompt_tokens: int) -> Iterator[Request]:
        number = 0
        for item in items:
            spans = needle_spans(item.task, item.text, item.answers)
            fitted = fit_prompt(
                tokenizer, item.text, max_prompt_tokens, self.truncate, answer_prefix=item.answer_prefix, spans=spans
            )
            if fitted is None:
                self.dropped["no room beside template and answer prefix"] += 1
                continue
            yield Request(
                request_id=number,
                prompt_token_ids=fitted.token_ids,
                max_new_tokens=self.max_new_tokens,
                source_id=item.source_id,
                prompt=item.text,
                truncated_tokens=fitted.truncated_tokens,
                answers=item.answers,
                completion=" " + ", ".join(item.answers[:1] if _any_will_do(item.task) else item.answers),
                needle_spans=fitted.spans,
                metadata={
                    "task": item.task,
                    "index": item.index,
                    "context_length": self.context_length if self.data is None else None,
                    "answer_prefix": item.answer_prefix,
                    "haystack": item.haystack,
                    # Percent of the text's characters before each needle, of those cut away too.
                    "needle_depths": [round(100 * begin / len(item.text), 2) for begin, _ in spans],
                },
            )
            number += 1


def _any_will_do(task: str) -> bool:
    """Whether the gold strings of a task are spellings of one answer."""
    return task.startswith("qa")


def _in_turn(sources: list[Iterator[Item]]) -> Iterator[Item]:
    """One item of each source after the other, until all are exhausted."""
    while sources:
        left = []
        for source in sources:
            for item in islice(source, 1):
                yield item
                left.append(source)
        sources = left


def _choose(names: tuple[str, ...], available: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The tasks named, each once, in the order given; ``all`` stands for every available one."""
    chosen = dict.fromkeys(task for name in names for task in (available if name == "all" else (name,)))
    listed = f"tasks {where}: {', '.join(available)}"
    for task in chosen:
        if task in available:
            continue
        if task in TASKS and available == GENERATED:
            raise InputError(
                f"RULER task {task} cannot be generated: it asks about documents that RULER downloads",
                f"give RULER's own files with --ruler-data; {listed}",
            )
        near = get_close_matches(task, available, n=1)
        raise InputError(f"unknown RULER task {task!r}", (f"did you mean {near[0]}? " if near else "") + listed)
    if not chosen:
        raise InputError("no RULER task is chosen", f"name one or more with --tasks; {listed}")
    return tuple(chosen)
