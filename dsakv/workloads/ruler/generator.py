"""RULER items made from a seed: the tasks that need no question data sets."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from dsakv.errors import InputError
from dsakv.tokenizer import Tokenizer
from dsakv.workloads.ruler.draft import Draft, largest_fit
from dsakv.workloads.ruler.essay import Essay
from dsakv.workloads.ruler.niah import NEEDLE_TASKS, draft_needle
from dsakv.workloads.ruler.reader import Item
from dsakv.workloads.ruler.templates import ANSWER_TOKENS
from dsakv.workloads.ruler.vocabulary import Vocabulary, load_vocabulary
from dsakv.workloads.ruler.vt import draft_tracking
from dsakv.workloads.ruler.words import LONG, SHORT, draft_common_words, draft_frequent_words

GENERATED = (*NEEDLE_TASKS, "vt", "cwe", "fwe")
"""The tasks that can be made here."""
IN_TEXT = frozenset(task for task, kind in NEEDLE_TASKS.items() if kind.haystack == "essay")
"""Those whose haystack is a text."""

SHORT_REPEATS_BELOW = 4096
"""Context length below which RULER makes cwe with fewer repetitions."""


@dataclass(frozen=True, slots=True)
class Generator:
    """Items whose prompt, template and answer prefix included, and RULER's answer length fill ``context_length``.

    The item depends on seed, task and index alone; the size of its haystack also on length and tokenizer.
    """

    tokenizer: Tokenizer
    context_length: int
    seed: int
    vocabulary: Vocabulary
    essay: Essay | None = None
    """Needed for the tasks ``IN_TEXT`` only."""

    @classmethod
    def load(cls, tokenizer: Tokenizer, context_length: int, seed: int, essay: Essay | None = None) -> Generator:
        return cls(tokenizer, context_length, seed, load_vocabulary(), essay)

    def items(self, tasks: tuple[str, ...], limit: int) -> Iterator[Item]:
        """Item ``i`` of ``limit`` is the next one of task ``i % len(tasks)``."""
        for i in range(limit):
            yield self.item(tasks[i % len(tasks)], i // len(tasks))

    def check(self, tasks: tuple[str, ...], limit: int) -> None:
        """Raise InputError where one of ``items`` does not fit the context length even with the smallest haystack."""
        short: dict[str, int] = {}
        for task in tasks[:limit]:
            needs = [self._draft(task, 0)[1]]
            if 2 * needs[0] > self.context_length:  # items of a task differ by a few words
                needs += [self._draft(task, index)[1] for index in range(1, -(-limit // len(tasks)))]
            if max(needs) > self.context_length:
                short[task] = max(needs)
        if short:
            raise self._too_short(short)

    def item(self, task: str, index: int) -> Item:
        """Raises InputError where the context length is too small for the task, or too large for its words."""
        draft, need = self._draft(task, index)
        budget = self.context_length - _answer_tokens(task)
        n = largest_fit(lambda n: self._size(draft, n), budget, draft.smallest, draft.largest)
        if n is None:
            raise self._too_short({task: need})
        if n == draft.largest:
            raise InputError(
                f"RULER task {task} runs out of words below the context length of {self.context_length}",
                "use a smaller --context-length, or leave the task out with --tasks",
            )
        haystack = self.essay.label if self.essay is not None and task in IN_TEXT else None
        return Item(task, f"{task}/{index}", draft.prompt(n), draft.answer_prefix, draft.answers, index, haystack)

    def _draft(self, task: str, index: int) -> tuple[Draft, int]:
        """The first variant that fits, else the last, and the tokens that it needs with its smallest haystack."""
        for draft in self._variants(task, index):
            need = self._size(draft, draft.smallest) + _answer_tokens(task)
            if need <= self.context_length:
                break
        return draft, need

    def _too_short(self, needs: dict[str, int]) -> InputError:
        enough = -(-max(needs.values()) // 256) * 256
        listed = ", ".join(f"{task} (at least {need})" for task, need in needs.items())
        return InputError(
            f"a context length of {self.context_length} tokens is too short with this tokenizer for RULER's {listed}",
            f"use --context-length {enough}, or leave such tasks out with --tasks",
        )

    def _variants(self, task: str, index: int) -> list[Draft]:
        """The item as RULER makes it, and for cwe its shorter form for lengths that the long one does not fit."""

        def rng() -> random.Random:
            return random.Random(f"{self.seed}/{task}/{index}")

        words = self.vocabulary
        if task in NEEDLE_TASKS:
            return [draft_needle(rng(), words, NEEDLE_TASKS[task], self.essay)]
        if task == "vt":
            return [draft_tracking(rng(), lambda text: len(self.tokenizer.encode(text)), self.context_length)]
        if task == "cwe":
            repeats = [LONG, SHORT] if self.context_length >= SHORT_REPEATS_BELOW else [SHORT]
            return [draft_common_words(rng(), words, each) for each in repeats]
        return [draft_frequent_words(rng())]

    def _size(self, draft: Draft, n: int) -> int:
        return len(self.tokenizer.encode_prompt_with_offsets(draft.prompt(n), draft.answer_prefix).ids)


def _answer_tokens(task: str) -> int:
    return ANSWER_TOKENS[task.split("_")[0]]
