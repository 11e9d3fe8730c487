"""RULER's needle tasks: one needle or several among noise, among other needles, or in a text."""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass
from typing import Literal

from dsakv.workloads.ruler import templates
from dsakv.workloads.ruler.draft import Draft
from dsakv.workloads.ruler.essay import Essay
from dsakv.workloads.ruler.vocabulary import Vocabulary

DEPTHS = tuple(round(100 * i / 39) for i in range(40))
"""Percent of the haystack before the needle: RULER's 40 even points."""


@dataclass(frozen=True, slots=True)
class NeedleTask:
    """What makes the needle tasks differ, by RULER's ``synthetic.yaml``."""

    haystack: Literal["noise", "needles", "essay"]
    key: Literal["words", "uuids"] = "words"
    value: Literal["number", "uuid"] = "number"
    keys: int = 1
    values: int = 1
    """Values of each key."""
    queries: int = 1
    """Keys asked for."""


NEEDLE_TASKS = {
    "niah_single_1": NeedleTask("noise"),
    "niah_single_2": NeedleTask("essay"),
    "niah_single_3": NeedleTask("essay", value="uuid"),
    "niah_multikey_1": NeedleTask("essay", keys=4),
    "niah_multikey_2": NeedleTask("needles"),
    "niah_multikey_3": NeedleTask("needles", key="uuids", value="uuid"),
    "niah_multivalue": NeedleTask("essay", values=4),
    "niah_multiquery": NeedleTask("essay", keys=4, queries=4),
}


def draft_needle(rng: random.Random, words: Vocabulary, task: NeedleTask, essay: Essay | None = None) -> Draft:
    """Needles at ``DEPTHS``, different ones; the unit of the haystack is a word of ``essay``, else a sentence.

    RULER draws from its 40 depths for essay haystacks only and any place for the others; here all take the depths.
    """
    used: set[str] = set()

    def new(kind: str) -> str:
        while True:
            name = {"words": words.compound, "uuids": _uuid, "uuid": _uuid, "number": _number}[kind](rng)
            if name not in used:
                used.add(name)
                return name

    def needle(key: str, value: str) -> str:
        return templates.NEEDLE.format(kind=task.value, key=key, value=value)

    values: dict[str, list[str]] = {}
    for _ in range(task.keys):
        key = new(task.key)
        values[key] = [new(task.value) for _ in range(task.values)]
    needles = [needle(key, value) for key, of_key in values.items() for value in of_key]
    rng.shuffle(needles)
    depths = sorted(rng.sample(DEPTHS, len(needles)))
    asked = rng.sample(list(values), task.queries) if task.keys > 1 else list(values)
    answers = tuple(value for key in asked for value in values[key])
    plural = len(answers) > 1
    query = ", ".join(asked[:-1]) + f", and {asked[-1]}" if len(asked) > 1 else asked[0]
    question = templates.NEEDLES_PROMPT if plural else templates.NEEDLE_PROMPT
    answer = templates.NEEDLES_ANSWER if plural else templates.NEEDLE_ANSWER
    others: list[str] = []

    def context(n: int) -> str:
        if task.haystack == "essay":
            assert essay is not None
            return essay.hide(n, depths, needles)
        if task.haystack == "needles":
            while len(others) < n:
                others.append(needle(new(task.key), new(task.value)))
        lines = others[:n] if task.haystack == "needles" else [templates.NOISE] * n
        for already, (depth, hidden) in enumerate(zip(depths, needles, strict=True)):
            lines.insert(n * depth // 100 + already, hidden)
        return "\n".join(lines)

    def prompt(n: int) -> str:
        return question.format(kind=task.value, key=query, context=context(n))

    return Draft(prompt, answer.format(kind=task.value, key=query), answers, smallest=1)


def _number(rng: random.Random) -> str:
    return str(rng.randint(10**6, 10**7 - 1))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
