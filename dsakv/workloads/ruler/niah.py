"""RULER's needle tasks that need no essays: one needle among noise, or among other needles."""

from __future__ import annotations

import random
import uuid
from typing import Literal

from dsakv.workloads.ruler import templates
from dsakv.workloads.ruler.draft import Draft
from dsakv.workloads.ruler.vocabulary import Vocabulary

DEPTHS = tuple(round(100 * i / 39) for i in range(40))
"""Percent of the haystack before the needle: RULER's 40 even points."""


def draft_needle(
    rng: random.Random,
    words: Vocabulary,
    *,
    keys: Literal["words", "uuids"],
    values: Literal["number", "uuid"],
    haystack: Literal["noise", "needles"],
) -> Draft:
    """One key with one value at one of ``DEPTHS``; the unit of the haystack is a sentence.

    RULER draws from its 40 depths for essay haystacks only and any place for these; here all take the depths.
    """
    used: set[str] = set()

    def new(kind: str) -> str:
        while True:
            name = {"words": words.compound, "uuids": _uuid, "uuid": _uuid, "number": _number}[kind](rng)
            if name not in used:
                used.add(name)
                return name

    key, value, depth = new(keys), new(values), rng.choice(DEPTHS)
    needle = templates.NEEDLE.format(kind=values, key=key, value=value)
    others: list[str] = []

    def prompt(n: int) -> str:
        if haystack == "needles":
            while len(others) < n:
                others.append(templates.NEEDLE.format(kind=values, key=new(keys), value=new(values)))
            lines = others[:n]
        else:
            lines = [templates.NOISE] * n
        lines.insert(n * depth // 100, needle)
        return templates.NEEDLE_PROMPT.format(kind=values, key=key, context="\n".join(lines))

    return Draft(prompt, templates.NEEDLE_ANSWER.format(kind=values, key=key), (value,), smallest=1)


def _number(rng: random.Random) -> str:
    return str(rng.randint(10**6, 10**7 - 1))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
