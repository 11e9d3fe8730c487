"""English words from the package wonderwords, as RULER takes them."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Vocabulary:
    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]

    def compound(self, rng: random.Random) -> str:
        """A random ``adjective-noun``."""
        return f"{rng.choice(self.adjectives)}-{rng.choice(self.nouns)}"

    def all(self) -> list[str]:
        """Every word once, in alphabetical order."""
        return sorted({*self.adjectives, *self.nouns, *self.verbs})


def load_vocabulary() -> Vocabulary:
    """wonderwords' lists, sorted, without entries of several words."""
    from wonderwords import RandomWord  # type: ignore[import-untyped]

    source = RandomWord()
    adjectives, nouns, verbs = (
        tuple(sorted(word for word in set(source.filter(include_categories=[kind])) if " " not in word))
        for kind in ("adjective", "noun", "verb")
    )
    return Vocabulary(adjectives, nouns, verbs)
