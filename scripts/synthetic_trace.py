"""A made-up trace that looks like one of a DSA model, for benchmarks.

A stream is one layer of a request with a context of ``tokens``. Each token has a score: that of its passage of 64
tokens (normal, spread 0.72), which drifts from step to step (AR(1), correlation 0.99875), plus one of its own that
stays (spread 0.9), plus noise that is new at each step (spread 0.1). A step selects the ``topk`` tokens of highest
score; the first 4 and the last 128 are always among them. With 64K tokens and top-k 2048 this touches about 500 blocks
of 64 tokens a step, of which 95% are those of the step before.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

PASSAGE = 64
DRIFT = 0.05


def selections(seed: int, tokens: int, topk: int) -> Iterator[NDArray[np.int32]]:
    """What a stream selects, step after step: positions [topk], ascending."""
    rng = np.random.default_rng(seed)
    passages = -(-tokens // PASSAGE)
    own = rng.standard_normal(tokens, dtype=np.float32) * np.float32(0.9)
    weight = rng.standard_normal(passages, dtype=np.float32)
    while True:
        noise = rng.standard_normal(tokens, dtype=np.float32)
        score = np.repeat(weight * np.float32(0.72), PASSAGE)[:tokens] + own + noise * np.float32(0.1)
        score[:4] = score[-128:] = np.inf
        yield np.sort(np.argpartition(score, -topk)[-topk:]).astype(np.int32)
        weight = weight * np.float32((1 - DRIFT**2) ** 0.5) + rng.standard_normal(
            passages, dtype=np.float32
        ) * np.float32(DRIFT)


def draw(streams: int, steps: int, tokens: int, topk: int) -> NDArray[np.int32]:
    """Selections [streams, steps, topk]."""
    made = np.empty((streams, steps, topk), dtype=np.int32)
    for stream in range(streams):
        source = selections(stream, tokens, topk)
        for step in range(steps):
            made[stream, step] = next(source)
    return made


def write_jsonl(
    folder: Path,
    drawn: NDArray[np.int32],
    tokens: int,
    *,
    requests: int,
    layers: int,
    shards: int,
    repeats: int = 1,
    one_file: bool = False,
) -> int:
    """Write a trace of ``shards`` files of ``requests`` x ``layers`` streams each; returns the number of records.

    The fields are those of the tracer, the ones that need a model being constant. Streams take turns in ``drawn``;
    ``repeats`` runs through its steps as often, so that a stream is longer than what was drawn. ``one_file`` puts the
    shards into a single one.
    """
    folder.mkdir(parents=True)
    meta = {"schema_version": 1, "dataset": "synthetic", "block_size_tokens": 64, "model": {"name": "synthetic"}}
    (folder / "run_meta.json").write_bytes(orjson.dumps(meta))
    steps, topk = drawn.shape[1:]
    for shard in range(shards):
        name = "trace_steps" if one_file else f"trace_steps_{shard * requests}_{(shard + 1) * requests}"
        with open(folder / f"{name}.jsonl", "ab") as file:
            for step in range(steps * repeats):
                for stream in range(requests * layers):
                    positions = drawn[(shard * requests * layers + stream) % len(drawn), step % steps]
                    line = _record(shard * requests + stream // layers, stream % layers, step, tokens, topk)
                    file.write(orjson.dumps(line | {"selected_token_pos": positions}, option=_LINE))
    return int(shards * requests * layers * steps * repeats)


_LINE = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE


def _record(request: int, layer: int, step: int, tokens: int, topk: int) -> dict[str, object]:
    unused = {"hit_blocks": 0, "bytes_read": 0, "read_ops": 0, "latency_us": None, "batch_size": 0}
    used = {"hit_blocks": 500, "bytes_read": topk * 1152, "read_ops": topk, "latency_us": 81.3, "batch_size": 4}
    return {
        "event": "dsa_topk",
        "request_id": request,
        "layer_id": layer,
        "index_layer_id": layer,
        "step_idx": step,
        "engine_step": step,
        "step_wall_us": 41234,
        "seq_len_current": tokens,
        "unique_token_pos_count": topk,
        "offset_min": 0,
        "offset_p50": tokens // 2,
        "offset_max": tokens - 1,
        "block_size_tokens": 64,
        "unique_blocks": 500,
        "touched_block_ratio": 0.488281,
        "tokens_per_touched_block": {"mean": 4.096, "p50": 3, "p95": 11},
        "kv_fetch": {"hbm": used, "local_pool": unused, "remote_pool": unused},
        "prefix": {
            "prefix_cache_hit": False,
            "prefix_cached_blocks": 0,
            "prefix_key": "9f86d081884c7d659a2feaa0c55ad015",
            "intersection_ratio": 0.0,
            "intersection_blocks": 0,
        },
        "scores_stats": {"min": -0.0123, "mean": 1.8734, "max": 9.125},
    }
