"""The fields of a trace's files and their types, for :mod:`dsakv.trace.validate`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from dsakv.errors import InputError

SCHEMA_VERSION = 1
"""Of all files of a run."""

HINT = "the file was changed or damaged after it was written, or its writer has a bug"

Fields = Mapping[str, tuple[type, ...]]

NUMBER = (int, float)

META: Fields = {
    "schema_version": (int,),
    "created": (str,),
    "dsakv_version": (str,),
    "dataset": (str,),
    "model": (dict,),
    "block_size_tokens": (int,),
    "rank": (int,),
    "world_size": (int,),
    "seed": (int,),
    "trace": (dict,),
    "inputs": (dict,),
}
META_OPTIONAL: Fields = {"requests_digest": (str,), "kv_tiers": (dict,)}
RECORD: Fields = {
    "event": (str,),
    "request_id": (int,),
    "layer_id": (int,),
    "index_layer_id": (int,),
    "step_idx": (int,),
    "engine_step": (int,),
    "step_wall_us": (int,),
    "seq_len_current": (int,),
    "unique_token_pos_count": (int,),
    "offset_min": (int,),
    "offset_p50": (int,),
    "offset_max": (int,),
    "block_size_tokens": (int,),
    "unique_blocks": (int,),
    "touched_block_ratio": NUMBER,
    "tokens_per_touched_block": (dict,),
    "kv_fetch": (dict,),
    "prefix": (dict,),
}
TOKENS: Fields = {"mean": NUMBER, "p50": (int,), "p95": (int,)}
PREFIX: Fields = {
    "prefix_cache_hit": (bool,),
    "prefix_cached_blocks": (int,),
    "prefix_key": (str,),
    "intersection_ratio": NUMBER,
    "intersection_blocks": (int,),
}
TIER: Fields = {
    "hit_blocks": (int,),
    "bytes_read": (int,),
    "read_ops": (int,),
    "latency_us": (*NUMBER, type(None)),
    "batch_size": (int,),
}
SCORES: Fields = {"min": NUMBER, "mean": NUMBER, "max": NUMBER}
REQUEST: Fields = {
    "request_id": (int,),
    "source_id": (str,),
    "prompt_tokens": (int,),
    "completion_tokens": (int,),
    "decode_steps": (int,),
    "records": (int,),
    "finish_reason": (str,),
    "truncated": (bool,),
    "truncated_tokens": (int,),
    "arrival_ms": NUMBER,
    "queue_ms": NUMBER,
    "ttft_ms": NUMBER,
    "tpot_ms": (*NUMBER, type(None)),
    "latency_ms": NUMBER,
    "prefix_cache_hit": (bool,),
    "prefix_cached_blocks": (int,),
    "prefix_key": (str,),
    "needle_spans": (list,),
    "metadata": (dict,),
}
REQUEST_OPTIONAL: Fields = {
    "prefix_owners": (list,),
    "forced": (bool,),
    "cached_tokens": (int,),
    "kv_blocks": (list,),
    "score": NUMBER,
    "prompt": (str, type(None)),
    "completion": (str, type(None)),
    "answers": (list,),
    "prompt_token_ids": (list,),
    "completion_token_ids": (list,),
}

DISTRIBUTIONS = (
    "unique_blocks",
    "tokens_per_touched_block",
    "offsets",
    "touched_block_ratio",
    "prefix_intersection_ratio",
)
SUMMARY: Fields = dict.fromkeys(("inputs", *DISTRIBUTIONS, "prefix_hot_blocks"), (dict,))
SUMMARY_OPTIONAL: Fields = {"serving": (dict,), "kv_tiers": (dict,)}
KV_TIERS: Fields = {"records": (dict,)}
KV_TIERS_OPTIONAL: Fields = dict.fromkeys(("transfers", "decode"), (dict,))
_RATE = (*NUMBER, type(None))
TRANSFER: Fields = {
    "hits": (int,),
    "cold": (int,),
    "reads": (int,),
    "read_ops": (int,),
    "bytes_read": (int,),
    "read_ms": NUMBER,
    "read_gb_s": _RATE,
    "writes": (int,),
    "write_ops": (int,),
    "bytes_written": (int,),
    "write_ms": NUMBER,
    "write_gb_s": _RATE,
    "retries": (int,),
    "staged_blocks": (int,),
}
HIT_RATES: Fields = dict.fromkeys(("hit_rate", "hit_rate_without_cold"), _RATE)


def record(options: Mapping[str, Any]) -> Fields:
    """Fields of a record written with these trace options."""
    fields = dict(RECORD)
    fields["scores_topk" if options["store_scores"] else "scores_stats"] = (list if options["store_scores"] else dict,)
    if options["store_block_ids"]:
        fields["selected_block_ids"] = (list,)
    if options["store_token_pos"]:
        fields["selected_token_pos"] = (list,)
    return fields


def parse(place: str, text: bytes, required: Fields, optional: Fields | None = None) -> dict[str, Any]:
    """The JSON object in ``text``.

    Raises:
        InputError: no JSON object, or not one with these fields.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(f"{place}: no JSON: {error}", HINT) from None
    check(place, found, required, optional)
    return dict(found)


def check(place: str, found: Any, required: Fields, optional: Fields | None = None) -> None:
    """All of ``required``, some of ``optional`` and nothing else must be there, of the right type and finite.

    Raises:
        InputError: what is wrong, at ``place``.
    """
    if not isinstance(found, dict):
        raise InputError(f"{place}: not an object", HINT)
    if missing := [name for name in required if name not in found]:
        raise InputError(f"{place}: {', '.join(missing)} missing", HINT)
    known = {**required, **(optional or {})}
    for name, value in found.items():
        if name not in known:
            raise InputError(f"{place}: {name} is not a field", HINT)
        if type(value) not in known[name] or (type(value) is float and not math.isfinite(value)):
            raise InputError(f"{place}: {name} is {value!r}", HINT)
