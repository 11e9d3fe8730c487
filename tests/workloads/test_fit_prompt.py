"""Truncation against cutting the list of tokens by hand, of a text, of ranges and of a conversation."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsakv.tokenizer import Tokenizer, load_tokenizer, write_byte_tokenizer
from dsakv.workloads.base import fit_messages, fit_prompt, fit_tokens

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


def survivors(text: list[int], excess: int, cut: Cut) -> set[int]:
    """Which of these token numbers stay when ``excess`` of them, at least one fewer than all, go."""
    keep = len(text) - excess
    first_half = (keep + 1) // 2
    return {
        "head": set(text[excess:]),
        "tail": set(text[:keep]),
        "middle": set(text[:first_half]) | set(text[len(text) - (keep - first_half) :]),
    }[cut]


@given(
    parts=st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=8),
    excess=st.integers(0, 12),
    cut=st.sampled_from(["head", "tail", "middle"]),
)
def test_ranges_are_cut_as_one_text(parts: list[tuple[bool, int]], excess: int, cut: Cut) -> None:
    ranges: list[tuple[int, int]] = []
    owned: list[int] = []
    n = 0
    for is_text, length in parts:
        if is_text:
            ranges.append((n, n + length))
            owned += range(n, n + length)
        n += length
    ids = [1000 + i for i in range(n)]
    excess = min(excess, n)
    fitted = fit_tokens(ids, ranges, n - excess, cut)
    if excess and excess >= len(owned):
        assert fitted is None
        return
    assert fitted is not None
    stay = (set(range(n)) - set(owned)) | survivors(owned, excess, cut)
    assert fitted[0] == [ids[i] for i in range(n) if i in stay]
    gone = [i for begin, end in fitted[1] for i in range(begin, end)]
    assert gone == [i for i in range(n) if i not in stay]


ROLES = {"user": 258, "assistant": 259}


@given(
    contents=st.lists(st.text("ab\u00e9\u5b57 <|>", min_size=1, max_size=9), min_size=1, max_size=5),
    limit=st.integers(0, 60),
    cut=st.sampled_from(["head", "tail", "middle"]),
)
def test_conversations(tokenizer: Tokenizer, contents: list[str], limit: int, cut: Cut) -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    ids = [256]
    ranges: list[tuple[int, int]] = []
    owned: list[int] = []
    for message in messages:
        ids.append(ROLES[message["role"]])
        begin = len(ids)
        ids += message["content"].encode()
        ranges.append((begin, len(ids)))
        owned += range(begin, len(ids))
        ids += [257] * (message["role"] == "assistant")
    ids.append(259)

    encoded = tokenizer.encode_messages_with_contents(messages)
    assert (encoded.ids, encoded.contents) == (ids, ranges)
    assert tokenizer.encode_messages(messages) == ids

    fitted = fit_messages(tokenizer, messages, limit, cut)
    excess = max(0, len(ids) - limit)
    if excess >= len(owned):
        assert fitted is None
        return
    assert fitted is not None
    stay = (set(range(len(ids))) - set(owned)) | survivors(owned, excess, cut)
    assert fitted.token_ids == [token for i, token in enumerate(ids) if i in stay]
    assert fitted.truncated_tokens == excess


def test_a_template_that_rewrites_contents_leaves_nothing_to_cut(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    tokenizer = load_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "abc"}]
    encoded = tokenizer.encode_messages_with_contents(messages)
    assert (bytes(encoded.ids), encoded.contents) == (b"ABC", [])
    assert fit_messages(tokenizer, messages, 2, "tail") is None
    whole = fit_messages(tokenizer, messages, 3, "tail")
    assert whole is not None
    assert (bytes(whole.token_ids), whole.truncated_tokens) == (b"ABC", 0)
