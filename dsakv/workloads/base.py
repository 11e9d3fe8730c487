"""What every workload does, and how a prompt is made to fit the model."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from dsakv.errors import InputError
from dsakv.request import Request
from dsakv.tokenizer import Tokenizer

Span = tuple[int, int]
Cut = Literal["head", "tail", "middle"]


class Workload(Protocol):
    """A source of requests. The same options always give the same requests in the same order."""

    name: str
    dropped: Counter[str]
    """Inputs that the last ``requests`` left out, by reason; complete when it is exhausted."""
    score_groups: tuple[str, ...]
    """Keys of ``Request.metadata`` that scores are shown by; empty where there is no score."""

    def requests(self, tokenizer: Tokenizer, max_seq_len: int) -> Iterator[Request]:
        """Requests numbered from 0, none with more than ``max_seq_len`` tokens of prompt and ``max_new_tokens``.

        Those that know when they arrived do so in order, from 0 s on. Raises InputError for bad options and bad
        input files, before the first request where it can be known.
        """
        ...

    def score(self, request: Request, text: str) -> float | None:
        """The workload's own score of a completion, 0 to 1; None where it has none."""
        ...


@dataclass(frozen=True, slots=True)
class FittedPrompt:
    token_ids: list[int]
    spans: tuple[Span, ...]
    """Half-open token ranges, in order, of the character spans that survived whole."""
    truncated_tokens: int


def prompt_room(max_seq_len: int, max_new_tokens: int) -> int:
    """Prompt tokens that fit beside the new ones. Raises InputError where none does."""
    if max_seq_len <= max_new_tokens:
        raise InputError(
            f"--max-new-tokens {max_new_tokens} leaves no room for a prompt: a sequence holds {max_seq_len} tokens",
            "lower --max-new-tokens or raise --max-seq-len",
        )
    return max_seq_len - max_new_tokens


def fit_prompt(
    tokenizer: Tokenizer,
    text: str,
    max_prompt_tokens: int,
    cut: Cut,
    *,
    answer_prefix: str = "",
    spans: Iterable[Span] = (),
) -> FittedPrompt | None:
    """Encode a prompt, cutting tokens of its text (never of template or answer prefix) until it fits.

    ``cut`` names the part that goes; middle keeps the first ceil and the last floor half. ``spans`` are half-open
    character ranges of the text; one that loses any token is left out. None where no token of the text would remain.
    """
    prompt = tokenizer.encode_prompt_with_offsets(text, answer_prefix)
    fitted = fit_tokens(prompt.ids, [(prompt.start, prompt.stop)], max_prompt_tokens, cut)
    if fitted is None:
        return None
    ids, gaps = fitted
    excess = len(prompt.ids) - len(ids)
    gone = gaps[0] if gaps else (len(prompt.ids), len(prompt.ids))
    token_spans: list[Span] = []
    for first, last in spans:
        begin = prompt.start + bisect_right(prompt.offsets, first, key=lambda span: span[1])
        end = prompt.start + bisect_left(prompt.offsets, last, key=lambda span: span[0])
        if end <= gone[0]:
            token_spans.append((begin, end))
        elif begin >= gone[1]:
            token_spans.append((begin - excess, end - excess))
    return FittedPrompt(ids, tuple(sorted(token_spans)), excess)


def fit_messages(
    tokenizer: Tokenizer, messages: list[dict[str, str]], max_prompt_tokens: int, cut: Cut
) -> FittedPrompt | None:
    """Encode a conversation, cutting tokens of its contents, taken as one text, until it fits. None as above, and
    where the template rewrites contents, so that they cannot be cut.
    """
    encoded = tokenizer.encode_messages_with_contents(messages)
    fitted = fit_tokens(encoded.ids, encoded.contents, max_prompt_tokens, cut)
    return None if fitted is None else FittedPrompt(fitted[0], (), len(encoded.ids) - len(fitted[0]))


def fit_tokens(ids: list[int], text: Sequence[Span], limit: int, cut: Cut) -> tuple[list[int], list[Span]] | None:
    """At most ``limit`` of ``ids``, and what went: only tokens in the ``text`` ranges do, taken as one stream.

    None where no token of the text would remain.
    """
    excess = max(0, len(ids) - limit)
    if not excess:
        return ids, []
    keep = sum(end - begin for begin, end in text) - excess
    if keep < 1:
        return None
    first = {"head": 0, "tail": keep, "middle": keep - keep // 2}[cut]
    gaps, kept = [], []
    passed = copied = 0  # tokens of the stream, of ids
    for begin, end in text:
        a, b = max(first - passed, 0), min(first + excess - passed, end - begin)
        if a < b:
            gaps.append((begin + a, begin + b))
            kept += ids[copied : begin + a]
            copied = begin + b
        passed += end - begin
    return kept + ids[copied:], gaps
