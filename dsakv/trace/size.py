"""How large a trace will be, told before the run."""

from __future__ import annotations

from collections.abc import Sequence

from dsakv.config import TraceConfig
from dsakv.request import Request
from dsakv.trace.formats import FORMATS

# Bytes in requests.jsonl.
_REQUEST = 560
_TEXT = 8.0  # a token: its id and some four characters of text


def expected_bytes(requests: Sequence[Request], layers: int, topk: int, block_size: int, options: TraceConfig) -> int:
    """Size of the trace if every request generates all its tokens and selects positions spread evenly.

    ``topk`` is the model's; shorter sequences select all of their tokens.
    """
    record_format = FORMATS[options.format]
    shards = {request.request_id // options.requests_per_shard for request in requests}
    total = float(len(shards) * record_format.shard_bytes)
    for request in requests:
        prompt, new = len(request.prompt_token_ids), request.max_new_tokens
        total += _REQUEST + len(repr(request.metadata))
        if options.store_text:
            total += _TEXT * (prompt + new)
        seq_len = prompt + new // 2
        record_bytes = record_format.record_bytes(seq_len, min(topk, seq_len), block_size, options)
        steps = new - 1 + min(options.prefill_tail, prompt)
        total += steps * options.sample_rate * layers * record_bytes
    return round(total)
