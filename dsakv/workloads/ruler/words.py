"""RULER's aggregation tasks: the most common words of a list, the most frequent words of a coded text."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from string import ascii_lowercase

from dsakv.workloads.ruler import templates
from dsakv.workloads.ruler.draft import Draft
from dsakv.workloads.ruler.vocabulary import Vocabulary

COMMON = 10
"""Words asked for by cwe."""


@dataclass(frozen=True, slots=True)
class Repeats:
    """How often the common and the other words stand in the list, and in the solved example of ``example`` words."""

    common: int
    other: int
    example: int
    example_common: int
    example_other: int


LONG = Repeats(common=30, other=3, example=40, example_common=10, example_other=3)
SHORT = Repeats(common=6, other=1, example=20, example_common=3, example_other=1)
"""RULER's for context lengths below 4096."""


def draft_common_words(rng: random.Random, words: Vocabulary, repeats: Repeats) -> Draft:
    """Ten common words among others, after a solved example; the unit of the haystack is another word."""
    shuffled = words.all()
    rng.shuffle(shuffled)
    example, rest = shuffled[: repeats.example], shuffled[repeats.example :]
    common, others = rest[:COMMON], rest[COMMON:]
    answers = " ".join(f"{i}. {word}" for i, word in enumerate(example[:COMMON], 1))
    seed = rng.getrandbits(64)
    solved = _word_list(
        rng.getrandbits(64), example[:COMMON] * repeats.example_common + example[COMMON:] * repeats.example_other
    )
    start = f"{solved}{templates.COMMON_WORDS_ANSWER} {answers}\n"
    return Draft(
        prompt=lambda n: start + _word_list(seed, common * repeats.common + others[:n] * repeats.other),
        answer_prefix=templates.COMMON_WORDS_ANSWER,
        answers=tuple(common),
        smallest=1,
        largest=len(others),
    )


def _word_list(seed: int, words: list[str]) -> str:
    random.Random(seed).shuffle(words)
    return templates.COMMON_WORDS_PROMPT.format(context=" ".join(f"{i}. {word}" for i, word in enumerate(words, 1)))


def draft_frequent_words(rng: random.Random) -> Draft:
    """Coded words with Zipf's frequencies; the unit of the haystack is a word.

    The most frequent word is written as dots and not asked for; the gold are the next three.
    """
    codes: list[str] = ["..."]
    seed = rng.getrandbits(64)

    def code(rank: int) -> str:
        while len(codes) <= rank:
            word = "".join(rng.choices(ascii_lowercase, k=6))
            if word not in codes:
                codes.append(word)
        return codes[rank]

    def prompt(n: int) -> str:
        words = [code(rank) for rank, times in enumerate(zipf_counts(n)) for _ in range(times)]
        random.Random(seed).shuffle(words)
        return templates.FREQUENT_WORDS_PROMPT.format(context=" ".join(words))

    return Draft(prompt, templates.FREQUENT_WORDS_ANSWER, tuple(map(code, (1, 2, 3))), smallest=27)


def zipf_counts(n: int) -> list[int]:
    """How often each word stands in a text of about ``n`` words: ``floor(n / zeta(2) / rank**2)``, rank from 1.

    That is RULER's formula with its exponent 2. Where the fourth and the fifth word would tie, which would leave
    the gold undecided, the next smaller ``n`` without a tie counts; from 27 on there is one.
    """
    while True:
        share = n * 6 / math.pi**2  # zeta(2) = pi^2 / 6
        counts = [int(share / rank**2) for rank in range(1, math.isqrt(int(share)) + 1)]
        if len(counts) >= 4 and counts[3] > (counts[4] if len(counts) > 4 else 0):
            return counts
        n -= 1
