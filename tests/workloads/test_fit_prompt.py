"""Truncation against cutting the list of tokens by hand."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsakv.tokenizer import Tokenizer, load_tokenizer, write_byte_tokenizer
from dsakv.workloads.base import fit_prompt

Cut = Literal["head", "tail", "middle"]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("byte")
    write_byte_tokenizer(directory)
    return load_tokenizer(directory)


@given(
    text=st.text("abé字", min_size=1, max_size=12),
    answer_prefix=st.sampled_from(["", " so:"]),
    limit=st.integers(0, 50),
    cut=st.sampled_from(["head", "tail", "middle"]),
    spans=st.lists(st.tuples(st.integers(0, 11), st.integers(1, 4)), max_size=3),
)
def test_truncation(
    tokenizer: Tokenizer, text: str, answer_prefix: str, limit: int, cut: Cut, spans: list[tuple[int, int]]
) -> None:
    chars = [(a, min(a + n, len(text))) for a, n in spans if a < len(text)]
    fitted = fit_prompt(tokenizer, text, limit, cut, answer_prefix=answer_prefix, spans=chars)

    owner = [i for i, char in enumerate(text) for _ in char.encode()]  # character of each token
    head, body, tail = [256, 258], list(zip(text.encode(), owner, strict=True)), [259, *answer_prefix.encode()]
    n = max(0, min(len(body), limit - len(head) - len(tail)))
    first_half = (n + 1) // 2
    kept = {
        "head": body[len(body) - n :],
        "tail": body[:n],
        "middle": body[:first_half] + body[len(body) - (n - first_half) :],
    }[cut]
    if not kept:
        assert fitted is None
        return
    assert fitted is not None
    assert fitted.token_ids == head + [byte for byte, _ in kept] + tail
    assert fitted.truncated_tokens == len(body) - len(kept)
    expected = []
    for first, last in chars:
        wanted = [i for i, owned in enumerate(owner) if first <= owned < last]
        at = [len(head) + i for i, (_, owned) in enumerate(kept) if first <= owned < last]
        if len(at) == len(wanted):
            expected.append((at[0], at[-1] + 1))
    assert fitted.spans == tuple(sorted(expected))


def test_middle_keeps_the_ceil_half_first(tokenizer: Tokenizer) -> None:
    fitted = fit_prompt(tokenizer, "abcdefg", 3 + 5, "middle", spans=[(0, 3), (3, 4), (5, 7), (2, 6)])
    assert fitted is not None
    assert tokenizer.decode(fitted.token_ids) == "abcfg"
    assert fitted.spans == ((2, 5), (5, 7))
