"""RULER's essay haystack: sentences of a text with needles between them.

RULER's own are Paul Graham's essays, which may not be shipped; here they are any text, and its label goes into the
metadata of each request. As in RULER it is taken from its beginning, its white space is single spaces, and it begins
again where it is too short.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from dsakv.errors import InputError
from dsakv.workloads.corpus import CorpusText

SMALLEST = 256
"""Words of a text that can be a haystack."""
_END = re.compile(r"""(?<!^[A-Z])[.!?]["')\]}*\u2019\u201d]*$""")
"""How the last word of a sentence ends; the dot of an initial ends none."""
_ABBREVIATIONS = frozenset({"e.g.", "i.e.", "cf.", "Mr.", "Mrs.", "Ms.", "Dr.", "St.", "No.", "vs."})


@dataclass(frozen=True, slots=True)
class Essay:
    words: tuple[str, ...]
    ends: tuple[int, ...]
    """Words up to the end of each sentence, ascending; the last is all of them."""
    label: str

    @classmethod
    def of(cls, source: CorpusText) -> Essay:
        """Raises InputError for a text of too few words."""
        words = tuple(source.text.split())
        if len(words) < SMALLEST:
            raise InputError(
                f"the corpus {source.label} has only {len(words)} words",
                f"give a text of {SMALLEST} words or more, with spaces between them, with --corpus",
            )
        ends = [i for i, word in enumerate(words, 1) if _ends_sentence(word)]
        if ends[-1:] != [len(words)]:
            ends.append(len(words))
        return cls(words, tuple(ends), source.label)

    def hide(self, n: int, depths: Sequence[int], needles: Sequence[str]) -> str:
        """The first ``n`` words with each needle before the sentence at its depth, in percent of the sentences.

        ``depths`` ascend. An unfinished sentence at the end is one, too; depth 100 is behind everything.
        """
        sentences = self._sentences(n)
        parts: list[str] = []
        begin = 0
        for depth, needle in zip(depths, needles, strict=True):
            end = self._begin(sentences * depth // 100, n)
            parts += [*self._words(begin, end), needle]
            begin = end
        return " ".join([*parts, *self._words(begin, n)])

    def _sentences(self, n: int) -> int:
        """Sentences in the first ``n`` words, begun ones included."""
        rounds, rest = divmod(n, len(self.words))
        whole = bisect_right(self.ends, rest)
        finished = rest == (self.ends[whole - 1] if whole else 0)
        return rounds * len(self.ends) + whole + (not finished)

    def _begin(self, sentence: int, n: int) -> int:
        """Words before this sentence, counted from 0."""
        rounds, rest = divmod(sentence, len(self.ends))
        return min(n, rounds * len(self.words) + (self.ends[rest - 1] if rest else 0))

    def _words(self, begin: int, end: int) -> tuple[str, ...]:
        first = begin % len(self.words)
        found = self.words[first : first + end - begin]
        while len(found) < end - begin:
            found += self.words[: end - begin - len(found)]
        return found


def _ends_sentence(word: str) -> bool:
    return word not in _ABBREVIATIONS and _END.search(word) is not None
