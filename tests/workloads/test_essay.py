"""Needles in a text, against a plain rendering of the same rule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsakv.errors import InputError
from dsakv.workloads.corpus import CorpusText
from dsakv.workloads.ruler.essay import Essay
from dsakv.workloads.ruler.niah import DEPTHS

TEXT = " ".join(
    f'Sentence {i} has words{" more" * (i % 5)}, e.g. these. "Is it so?"\n\n  Mr. A. Holmes (of {i}) agreed.)'
    for i in range(40)
)


def sentences(words: list[str]) -> list[str]:
    """A sentence a string."""
    found, last = [], 0
    for i, word in enumerate(words, 1):
        if word in ("these.", 'so?"', "agreed.)"):
            found.append(" ".join(words[last:i]))
            last = i
    return found + ([" ".join(words[last:])] if last < len(words) else [])


@given(n=st.integers(1, 2500), depths=st.lists(st.sampled_from(DEPTHS), max_size=5, unique=True).map(sorted))
def test_needles_stand_between_sentences(n: int, depths: list[int]) -> None:
    essay = Essay.of(CorpusText(TEXT, "text"))
    words = TEXT.split()
    assert len(words) < 2500
    taken = [words[i % len(words)] for i in range(n)]
    expected = sentences(taken)
    total = len(expected)
    needles = [f"needle{i}" for i in range(len(depths))]
    for already, (depth, needle) in enumerate(zip(depths, needles, strict=True)):
        expected.insert(total * depth // 100 + already, needle)
    assert essay.hide(n, depths, needles) == " ".join(expected)


def test_a_text_without_an_end_and_one_of_no_words() -> None:
    endless = Essay.of(CorpusText("word " * 300, "text"))
    assert endless.hide(600, (50,), ("X",)) == " ".join(["word"] * 300 + ["X"] + ["word"] * 300)
    with pytest.raises(InputError, match="has only 1 words"):
        Essay.of(CorpusText("x" * 5000, "text"))
