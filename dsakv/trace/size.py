"""How large a trace will be, told before the run."""

from __future__ import annotations

from collections.abc import Sequence

from dsakv.config import TraceConfig
from dsakv.request import Request

# Bytes of a line beside its lists, with numbers of usual length.
_RECORD = 890
_BLOCK_LISTS = 85  # the names and brackets that --trace-store-block-ids adds
_REQUEST = 560
_SCORE = 10.6  # eight digits, point, sign or exponent now and then, comma
_TEXT = 8.0  # a token: its id and some four characters of text


def expected_bytes(requests: Sequence[Request], layers: int, topk: int, block_size: int, options: TraceConfig) -> int:
    """Size of the trace if every request generates all its tokens and selects positions spread evenly.

    ``topk`` is the model's; shorter sequences select all of their tokens.
    """
    total = 0.0
    for request in requests:
        prompt, new = len(request.prompt_token_ids), request.max_new_tokens
        total += _REQUEST + len(repr(request.metadata))
        if options.store_text:
            total += _TEXT * (prompt + new)
        steps = new - 1 + min(options.prefill_tail, prompt)
        total += steps * options.sample_rate * layers * _record_bytes(prompt + new // 2, topk, block_size, options)
    return round(total)


def _record_bytes(seq_len: int, topk: int, block_size: int, options: TraceConfig) -> float:
    selected = min(topk, seq_len)
    size = float(_RECORD)
    if options.store_token_pos:
        size += selected * (1 + _mean_digits(seq_len))
    if options.store_scores:
        size += selected * _SCORE
    if options.store_block_ids:
        blocks = -(-seq_len // block_size)
        touched = blocks * (1 - (1 - selected / seq_len) ** block_size)  # of a block's tokens, not one is selected
        size += _BLOCK_LISTS + 2 * touched * (1 + _mean_digits(blocks))
    return size


def _mean_digits(n: int) -> float:
    """Mean number of decimal digits of 0 .. n - 1."""
    digits, total, low = 1, 0, 0
    while low < n:
        high = min(n, 10**digits)
        total += digits * (high - low)
        low, digits = high, digits + 1
    return total / n
