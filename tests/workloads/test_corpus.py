"""Windows of a text: exact, different, of the text and of nothing else."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsakv.errors import DsakvError, InputError
from dsakv.tokenizer import Tokenizer
from dsakv.workloads import corpus
from dsakv.workloads.corpus import Corpus, CorpusText, load_text


@given(size=st.integers(256, 900), index=st.integers(0, 5000), n=st.integers(0, 2000), seed=st.integers(0, 9))
def test_a_window_is_what_stands_in_the_ring(
    byte_tokenizer: Tokenizer, size: int, index: int, n: int, seed: int
) -> None:
    text = "".join(chr(ord("a") + i * i % 26) for i in range(size))
    ring = Corpus.encode(CorpusText(text, "ring"), byte_tokenizer, seed)
    begin = (ring.start + index * ring.stride) % size
    assert bytes(ring.window(index, n)).decode() == (text * 12)[begin : begin + n]
    assert len({(ring.start + i * ring.stride) % size for i in range(size)}) == size


def test_windows_spread_and_share_their_numbers(byte_tokenizer: Tokenizer) -> None:
    ring = Corpus.encode(load_text(), byte_tokenizer, 0)
    begins = sorted((ring.start + i * ring.stride) % len(ring.ids) for i in range(64))
    assert max(b - a for a, b in pairwise(begins)) < 3 * len(ring.ids) / 64
    again = Corpus.encode(load_text(), byte_tokenizer, 1)
    assert ring.window(0, 50) != again.window(0, 50)
    assert all(token is ring.ids[ring.start + i] for i, token in enumerate(ring.window(0, 9)))


def test_a_long_text_is_encoded_whole(byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PIECE", 100)
    text = "".join(f"line {i} of many\n" for i in range(300)) + "and a last one without an end"
    assert bytes(Corpus.encode(CorpusText(text, ""), byte_tokenizer, 0).ids).decode() == text


def test_the_default_is_prose(byte_tokenizer: Tokenizer) -> None:
    source = load_text()
    assert source == load_text()
    assert len(source.text) > 150_000
    paragraphs = source.text.split("\n")
    assert len(paragraphs) == len(set(paragraphs))
    assert not any(mark in source.text for mark in (">>>", "::=", "  "))
    assert source.label.startswith(f"Python {sys.version.split()[0]} language reference sha256:")


def test_python_without_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DsakvError, match="without pydoc_data") as error:
        load_text()
    assert "--corpus" in error.value.hint


def test_a_file(corpus_file: Path) -> None:
    source = load_text(corpus_file)
    assert source.text == corpus_file.read_text(encoding="utf-8")
    corpus_file.write_bytes(b"\xef\xbb\xbf" + corpus_file.read_bytes())
    assert load_text(str(corpus_file)) == source
    assert source.label.startswith("corpus.txt sha256:")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has only 0 characters"),
        (b"short", "has only 5 characters"),
        (b"abc " * 1100 + b"\xff", "is not UTF-8"),
        ("äöü ".encode("utf-16") * 2000, "is not UTF-8"),
        (b"x" * 70, "has more than 50 characters"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "more" in message:
        monkeypatch.setattr(corpus, "LARGEST", 50)
        monkeypatch.setattr(corpus, "SMALLEST", 1)
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_text(path)
    assert str(path) in error.value.message
    for unreadable in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match=r"no such file|is no regular file"):
            load_text(unreadable)


def test_a_text_that_the_tokenizer_does_not_know(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="makes only 3 tokens"):
        Corpus.encode(CorpusText("abc", "x"), byte_tokenizer, 0)
