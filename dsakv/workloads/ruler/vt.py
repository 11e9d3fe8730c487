"""RULER's variable tracking: a chain of assignments scattered over noise, after a solved example."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from string import ascii_uppercase

from dsakv.workloads.ruler import templates
from dsakv.workloads.ruler.draft import Draft, largest_fit

CHAIN = 5  # variables: one value and four hops
EXAMPLE_TOKENS = 500


def draft_tracking(rng: random.Random, count: Callable[[str], int], context_length: int) -> Draft:
    """One chain of five variables; the unit of the haystack is a sentence.

    The solved example before it takes up to 500 tokens, as RULER's, but at most a quarter of ``context_length``,
    and never less than its chain. ``count`` counts the tokens of a text.
    """
    example_value, value = (str(number) for number in rng.sample(range(10000, 100000), 2))
    example_names, names = _names(rng, 3), _names(rng, 5)
    example_seed, seed = rng.getrandbits(64), rng.getrandbits(64)

    def example(n: int) -> str:
        answer = templates.TRACKING_ANSWER.format(count=CHAIN, value=example_value)
        return f"{_text(example_seed, n, example_names, example_value)}{answer} {' '.join(example_names)}\n\n"

    size = largest_fit(lambda n: count(example(n)), min(EXAMPLE_TOKENS, context_length // 4), 0)
    solved = example(size or 0)
    return Draft(
        prompt=lambda n: solved + _text(seed, n, names, value),
        answer_prefix=templates.TRACKING_ANSWER.format(count=CHAIN, value=value),
        answers=tuple(names),
        smallest=0,
    )


def _text(seed: int, n: int, names: list[str], value: str) -> str:
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {before} " for before, name in pairwise(names)]
    rng = random.Random(seed)
    # Distinct places where the haystack has them, so that noise parts the assignments.
    places = sorted(rng.sample(range(n), len(chain)) if n >= len(chain) else rng.choices(range(n + 1), k=len(chain)))
    lines = [templates.NOISE] * n
    for already, (place, assignment) in enumerate(zip(places, chain, strict=True)):
        lines.insert(place + already, assignment)
    return templates.TRACKING_PROMPT.format(context="\n".join(lines), value=value)


def _names(rng: random.Random, letters: int) -> list[str]:
    names: list[str] = []
    while len(names) < CHAIN:
        name = "".join(rng.choices(ascii_uppercase, k=letters))
        if name not in names and name != "VAR":
            names.append(name)
    return names
