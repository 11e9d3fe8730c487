"""Real text that made-up prompts and haystacks are cut from.

A prompt of one repeated token makes every selection meaningless, so prompts that a trace knows only by their length
are windows of a text. Without ``--corpus`` that is the prose of the language reference that every CPython carries for
its ``help()`` (``pydoc_data.topics``): a quarter of a million characters of edited English, at hand without a
download, without a text in this package and without its licence. It differs a little between versions of Python, so
the label says which one it was.
"""

from __future__ import annotations

import math
import platform
import random
import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from dsakv.errors import DsakvError, InputError
from dsakv.tokenizer import Tokenizer
from dsakv.workloads.rows import regular_file

SMALLEST = 4096
LARGEST = 1 << 26
"""Characters of a corpus: fewer would make prompts that repeat themselves, more take minutes to encode."""
PIECE = 1 << 20
"""Characters encoded at a time, up to the end of their line."""
PROSE_WORDS = 8
PROSE_LETTERS = 0.85
"""What a paragraph of the reference has at least to be no grammar and no code: words, share of letters and spaces."""


@dataclass(frozen=True, slots=True)
class CorpusText:
    text: str
    label: str
    """Where the text is from and a short hash of it, for ``Request.metadata``."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text as token ids, as a ring: behind its end it begins again."""

    ids: list[int]
    label: str
    start: int
    """Where window 0 begins."""
    stride: int
    """Tokens from the begin of one window to that of the next; has no divisor in common with the number of ids."""

    @classmethod
    def encode(cls, source: CorpusText, tokenizer: Tokenizer, seed: int) -> Corpus:
        """Raises InputError where the tokenizer makes next to nothing of the text."""
        ids: list[int] = []
        begin = 0
        while begin < len(source.text):
            end = source.text.find("\n", begin + PIECE) + 1 or len(source.text)
            ids += tokenizer.encode(source.text[begin:end])
            begin = end
        if len(ids) < SMALLEST // 16:
            raise InputError(
                f"the tokenizer makes only {len(ids)} tokens of the {len(source.text)} characters of {source.label}",
                "give a text in a language of the model with --corpus",
            )
        stride = int(len(ids) * (math.sqrt(5) - 1) / 2)  # golden section: any first windows are spread evenly
        while math.gcd(stride, len(ids)) > 1:
            stride += 1
        return cls(ids, source.label, random.Random(f"{seed}/corpus").randrange(len(ids)), stride)

    def window(self, index: int, n: int) -> list[int]:
        """The ``n`` ids of window ``index``; no two of as many windows as there are ids begin at the same place.

        The ids are the corpus's own int objects: a window takes 8 bytes a token, not the 36 of new ones.
        """
        begin = (self.start + index * self.stride) % len(self.ids)
        window = self.ids[begin : begin + n]
        while len(window) < n:
            window += self.ids[: n - len(window)]
        return window


def load_text(path: str | Path | None = None) -> CorpusText:
    """The text of a UTF-8 file, or without one the prose of Python's language reference.

    Raises InputError for a file that cannot be read, is no UTF-8, or is too short or too long; DsakvError where this
    Python comes without its reference.
    """
    if path is None:
        text, name = _reference(), f"Python {platform.python_version()} language reference"
    else:
        text, name = _read(regular_file(path, "--corpus")), Path(path).name
    return CorpusText(text, f"{name} sha256:{sha256(text.encode()).hexdigest()[:12]}")


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(LARGEST + 1)
    except OSError as error:
        raise InputError(f"cannot read the corpus {path}: {error.strerror}", "check --corpus") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"the corpus {path} is not UTF-8: byte {error.start} of a piece cannot be read",
            "give a plain text file with --corpus, converted to UTF-8",
        ) from error
    if not SMALLEST <= len(text) <= LARGEST:
        size = f"more than {LARGEST}" if len(text) > LARGEST else f"only {len(text)}"
        raise InputError(
            f"the corpus {path} has {size} characters",
            f"give a text of {SMALLEST} to {LARGEST} characters with --corpus",
        )
    return text


def _reference() -> str:
    """Paragraphs of prose, each once and in one line, of all topics in alphabetical order."""
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise DsakvError(
            "this Python comes without pydoc_data, whose text prompts are made of by default",
            "give a text file with --corpus",
        ) from error
    paragraphs = (" ".join(part.split()) for topic in sorted(topics) for part in re.split(r"\n\s*\n", topics[topic]))
    return "\n".join(dict.fromkeys(part for part in paragraphs if _is_prose(part)))


def _is_prose(paragraph: str) -> bool:
    letters = sum(char.isalpha() or char == " " for char in paragraph)
    return (
        paragraph.endswith((".", ":", "!", "?", ")"))
        and len(paragraph.split()) >= PROSE_WORDS
        and letters >= PROSE_LETTERS * len(paragraph)
        and ">>>" not in paragraph
        and "::=" not in paragraph
    )
