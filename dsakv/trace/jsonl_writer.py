"""One JSON object a line: a record of the trace, a finished request."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import numpy as np
import orjson

from dsakv.config import TraceConfig
from dsakv.request import TIERS, Completion, Request
from dsakv.trace.batch import Floats, Ints, TraceBatch
from dsakv.trace.fetch import FetchColumns
from dsakv.trace.records import RATIO_BINS, Derived, PrefixFacts

_LINE = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE


def record_lines(
    batch: TraceBatch, derived: Derived, block_size: int, prefix: list[PrefixFacts], options: TraceConfig
) -> list[bytes]:
    """Each record of ``batch`` as a line; ``prefix`` [R] holds the facts of its request. Long lists come last."""
    unique = derived.unique_blocks
    counts = np.diff(batch.offsets)
    first, last = batch.offsets.tolist(), derived.first_block.tolist()
    last.append(len(derived.block_ids))
    if batch.scores is None:
        raise ValueError("a batch without scores cannot be written")
    scores = batch.scores
    low, mean, high = score_stats(scores, batch.offsets)
    columns = zip(
        _list(batch.request_id),
        _list(batch.layer_id),
        _list(batch.index_layer_id),
        _list(batch.step_idx),
        _list(batch.engine_step),
        _list(batch.step_wall_us),
        _list(batch.seq_len),
        _list(counts),
        _list(derived.offset_min),
        _list(derived.offset_p50),
        _list(derived.offset_max),
        _list(unique),
        _list(derived.touched_bins / RATIO_BINS),
        _list(counts / unique),
        _list(derived.tokens_p50),
        _list(derived.tokens_p95),
        zip(*(_fetched(derived.fetch.get(name), options.store_block_ids) for name in TIERS), strict=False),
        _list(derived.shared_bins / RATIO_BINS),
        _list(derived.shared_blocks),
        prefix,
        strict=True,
    )
    lines = []
    for r, (
        request_id,
        layer_id,
        index_layer_id,
        step_idx,
        engine_step,
        step_wall_us,
        seq_len,
        count,
        offset_min,
        offset_p50,
        offset_max,
        unique_blocks,
        touched_ratio,
        tokens_mean,
        tokens_p50,
        tokens_p95,
        fetched,
        shared_ratio,
        shared_blocks,
        facts,
    ) in enumerate(columns):
        record: dict[str, Any] = {
            "event": "dsa_topk",
            "request_id": request_id,
            "layer_id": layer_id,
            "index_layer_id": index_layer_id,
            "step_idx": step_idx,
            "engine_step": engine_step,
            "step_wall_us": step_wall_us,
            "seq_len_current": seq_len,
            "unique_token_pos_count": count,
            "offset_min": offset_min,
            "offset_p50": offset_p50,
            "offset_max": offset_max,
            "block_size_tokens": block_size,
            "unique_blocks": unique_blocks,
            "touched_block_ratio": touched_ratio,
            "tokens_per_touched_block": {"mean": tokens_mean, "p50": tokens_p50, "p95": tokens_p95},
            "kv_fetch": dict(zip(TIERS, fetched, strict=True)),
            "prefix": {
                "prefix_cache_hit": facts.prefix_cached_blocks > 0,
                "prefix_cached_blocks": facts.prefix_cached_blocks,
                "prefix_key": facts.prefix_key,
                "intersection_ratio": shared_ratio,
                "intersection_blocks": shared_blocks,
            },
        }
        if not options.store_scores:
            record["scores_stats"] = {"min": low[r], "mean": mean[r], "max": high[r]}
        if options.store_block_ids:
            record["selected_block_ids"] = derived.block_ids[last[r] : last[r + 1]]
        if options.store_token_pos:
            record["selected_token_pos"] = batch.positions[first[r] : first[r + 1]]
        if options.store_scores:
            record["scores_topk"] = scores[first[r] : first[r + 1]]
        lines.append(orjson.dumps(record, option=_LINE))
    return lines


def _fetched(tier: FetchColumns | None, store_block_ids: bool) -> Iterator[dict[str, Any]]:
    """What each record says of one tier; the same over and over of one that no record used."""
    if tier is None:
        unused: dict[str, Any] = {"hit_blocks": 0, "bytes_read": 0, "read_ops": 0, "latency_us": None, "batch_size": 0}
        yield from repeat(unused | {"hit_block_ids": []} if store_block_ids else unused)
        return
    first = tier.first_block.tolist()
    columns = (tier.hit_blocks, tier.bytes_read, tier.read_ops, tier.latency_us, tier.batch_size)
    for r, (hits, size, ops, latency_us, queries) in enumerate(zip(*map(_list, columns), strict=True)):
        found: dict[str, Any] = {
            "hit_blocks": hits,
            "bytes_read": size,
            "read_ops": ops,
            "latency_us": latency_us,  # NaN is written as null
            "batch_size": queries,
        }
        if store_block_ids:
            found["hit_block_ids"] = tier.block_ids[first[r] : first[r + 1]]
        yield found


def score_stats(scores: Floats, offsets: Ints) -> tuple[Floats, Floats, Floats]:
    """Least, mean and greatest score of each record: float32 [R] each."""
    first = offsets[:-1]
    mean = np.add.reduceat(scores, first, dtype=np.float64) / np.diff(offsets)
    return np.minimum.reduceat(scores, first), mean.astype(np.float32), np.maximum.reduceat(scores, first)


def request_line(
    request: Request,
    completion: Completion,
    facts: PrefixFacts,
    records: int,
    text: str | None,
    score: float | None,
    store_text: bool,
) -> bytes:
    """What ``requests.jsonl`` says of a finished request; ``records`` is the number of its lines in the trace."""
    line: dict[str, Any] = {
        "request_id": request.request_id,
        "source_id": request.source_id,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": len(completion.token_ids),
        "decode_steps": completion.decode_steps,
        "records": records,
        "finish_reason": completion.finish_reason,
        "truncated": request.truncated_tokens > 0,
        "truncated_tokens": request.truncated_tokens,
        "arrival_ms": completion.arrival_ms,
        "queue_ms": completion.queue_ms,
        "ttft_ms": completion.ttft_ms,
        "tpot_ms": completion.tpot_ms,
        "latency_ms": completion.latency_ms,
        "forced": request.forced_token_ids is not None,
        "cached_tokens": completion.cached_tokens,
        "prefix_cache_hit": facts.prefix_cached_blocks > 0,
        "prefix_cached_blocks": facts.prefix_cached_blocks,
        "prefix_key": facts.prefix_key,
        "prefix_owners": facts.prefix_owners,
    }
    if completion.kv_blocks:
        line["kv_blocks"] = _runs(completion.kv_blocks)
    if score is not None:
        line["score"] = score
    line["needle_spans"] = request.needle_spans
    line["metadata"] = request.metadata
    if store_text:
        line["prompt"] = request.prompt
        line["completion"] = text
        line["answers"] = request.answers
        line["prompt_token_ids"] = request.prompt_token_ids
        line["completion_token_ids"] = completion.token_ids
    return orjson.dumps(line, option=_LINE)


def _runs(blocks: list[int]) -> list[list[int]]:
    """``[first, count]`` of each stretch of adjacent ascending ids."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and sum(runs[-1]) == block:
            runs[-1][1] += 1
        else:
            runs.append([block, 1])
    return runs


def _list(values: Any) -> list[Any]:
    return list(values.tolist())
