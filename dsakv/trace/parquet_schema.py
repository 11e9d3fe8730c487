"""The columns of a Parquet shard: the fields of the JSON record by the same names, nested as they are there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from dsakv.config import TraceConfig
from dsakv.request import TIERS
from dsakv.trace.batch import TraceBatch
from dsakv.trace.fetch import FetchColumns
from dsakv.trace.jsonl_writer import score_stats
from dsakv.trace.records import RATIO_BINS, Derived, PrefixFacts
from dsakv.trace.schema import SCHEMA_VERSION

VERSION_KEY = "dsakv.schema_version"


def record_schema(options: TraceConfig) -> pa.Schema:
    """The columns that records have with these trace options. Nothing but an unused tier's latency is ever null."""
    left_out = {
        "scores_stats" if options.store_scores else "scores_topk",
        *(() if options.store_block_ids else ("selected_block_ids", "hit_block_ids")),
        *(() if options.store_token_pos else ("selected_token_pos",)),
    }
    return pa.schema(
        [_without(field, left_out) for field in all_fields() if field.name not in left_out],
        metadata={VERSION_KEY: str(SCHEMA_VERSION)},
    )


def all_fields() -> list[pa.Field]:
    """Every field that a record may have, in the order of the JSON record."""
    integers, floats = _list(pa.int32()), _list(pa.float32())
    tier = _struct(
        hit_blocks=pa.int64(),
        bytes_read=pa.int64(),
        read_ops=pa.int64(),
        latency_us=pa.float64(),
        batch_size=pa.int64(),
        hit_block_ids=integers,
    )
    types = {
        "event": pa.string(),
        "request_id": pa.int64(),
        "layer_id": pa.int32(),
        "index_layer_id": pa.int32(),
        "step_idx": pa.int64(),
        "engine_step": pa.int64(),
        "step_wall_us": pa.int64(),
        "seq_len_current": pa.int64(),
        "unique_token_pos_count": pa.int64(),
        "offset_min": pa.int64(),
        "offset_p50": pa.int64(),
        "offset_max": pa.int64(),
        "block_size_tokens": pa.int32(),
        "unique_blocks": pa.int64(),
        "touched_block_ratio": pa.float64(),
        "tokens_per_touched_block": _struct(mean=pa.float64(), p50=pa.int64(), p95=pa.int64()),
        "kv_fetch": _struct(**dict.fromkeys(TIERS, tier)),
        "prefix": _struct(
            prefix_cache_hit=pa.bool_(),
            prefix_cached_blocks=pa.int64(),
            prefix_key=pa.string(),
            intersection_ratio=pa.float64(),
            intersection_blocks=pa.int64(),
        ),
        "scores_stats": _struct(min=pa.float32(), mean=pa.float32(), max=pa.float32()),
        "selected_block_ids": integers,
        "selected_token_pos": integers,
        "scores_topk": floats,
    }
    return [pa.field(name, type, nullable=False) for name, type in types.items()]


def writer_options(schema: pa.Schema) -> dict[str, Any]:
    """How ``pyarrow.parquet.ParquetWriter`` is to write these columns.

    The bytes of a list's numbers go into four streams, where a selection much like the one before compresses best;
    polars and DuckDB read this too. Large pages let a layer find its last selection behind those of other layers.
    """
    leaves = list(_leaves(schema))
    lists = [leaf for leaf in leaves if leaf.endswith(".list.element")]
    return {
        "compression": "zstd",
        "compression_level": 3,
        "use_dictionary": [leaf for leaf in leaves if leaf not in lists],
        "column_encoding": dict.fromkeys(lists, "BYTE_STREAM_SPLIT"),
        "write_statistics": ["request_id", "layer_id", "step_idx", "seq_len_current"],
        "write_page_checksum": True,
        "data_page_size": 8 << 20,
    }


def to_arrow(
    batch: TraceBatch, derived: Derived, block_size: int, prefix: list[PrefixFacts], options: TraceConfig
) -> pa.RecordBatch:
    """The records of ``batch`` as columns; ``prefix`` [R] holds the facts of each one's request."""
    if batch.scores is None:
        raise ValueError("a batch without scores cannot be written")
    rows, counts, unique = len(batch), np.diff(batch.offsets), derived.unique_blocks
    cached = np.array([facts.prefix_cached_blocks for facts in prefix])
    low, mean, high = score_stats(batch.scores, batch.offsets)
    columns: dict[str, Any] = {
        "event": np.full(rows, "dsa_topk", dtype=object),
        "request_id": batch.request_id,
        "layer_id": batch.layer_id,
        "index_layer_id": batch.index_layer_id,
        "step_idx": batch.step_idx,
        "engine_step": batch.engine_step,
        "step_wall_us": batch.step_wall_us,
        "seq_len_current": batch.seq_len,
        "unique_token_pos_count": counts,
        "offset_min": derived.offset_min,
        "offset_p50": derived.offset_p50,
        "offset_max": derived.offset_max,
        "block_size_tokens": np.full(rows, block_size),
        "unique_blocks": unique,
        "touched_block_ratio": derived.touched_bins / RATIO_BINS,
        "tokens_per_touched_block": {"mean": counts / unique, "p50": derived.tokens_p50, "p95": derived.tokens_p95},
        "kv_fetch": {tier: _fetched(derived.fetch.get(tier), rows) for tier in TIERS},
        "prefix": {
            "prefix_cache_hit": cached > 0,
            "prefix_cached_blocks": cached,
            "prefix_key": np.array([facts.prefix_key for facts in prefix], dtype=object),
            "intersection_ratio": derived.shared_bins / RATIO_BINS,
            "intersection_blocks": derived.shared_blocks,
        },
        "scores_stats": {"min": low, "mean": mean, "max": high},
        "selected_block_ids": (np.append(derived.first_block, len(derived.block_ids)), derived.block_ids),
        "selected_token_pos": (batch.offsets, batch.positions),
        "scores_topk": (batch.offsets, batch.scores),
    }
    schema = record_schema(options)
    return pa.record_batch([_array(columns[field.name], field.type) for field in schema], schema=schema)


def _fetched(tier: FetchColumns | None, rows: int) -> dict[str, Any]:
    """The facts of one tier, None of one that no record used."""
    if tier is None:
        names = ("hit_blocks", "bytes_read", "read_ops", "batch_size")
        no_ids = (np.zeros(rows + 1, dtype=np.int64), np.zeros(0, dtype=np.int32))
        none = np.zeros(rows, dtype=np.int64)
        return {**dict.fromkeys(names, none), "latency_us": np.full(rows, np.nan), "hit_block_ids": no_ids}
    return {
        "hit_blocks": tier.hit_blocks,
        "bytes_read": tier.bytes_read,
        "read_ops": tier.read_ops,
        "latency_us": tier.latency_us,
        "batch_size": tier.batch_size,
        "hit_block_ids": (tier.first_block, tier.block_ids),
    }


def _array(values: Any, type: pa.DataType) -> pa.Array:
    if pa.types.is_struct(type):
        arrays = [_array(values[field.name], field.type) for field in type]
        return pa.StructArray.from_arrays(arrays, fields=list(type))
    if pa.types.is_list(type):
        offsets, flat = values
        item = pa.array(np.ascontiguousarray(flat), type=type.value_type)
        return pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), item, type=type)
    return pa.array(values, type=type, from_pandas=pa.types.is_floating(type))  # NaN is null: an unused tier


def _without(field: pa.Field, names: set[str]) -> pa.Field:
    if not pa.types.is_struct(field.type):
        return field
    return field.with_type(pa.struct([_without(inner, names) for inner in field.type if inner.name not in names]))


def _struct(**types: pa.DataType) -> pa.StructType:
    return pa.struct([pa.field(name, type, nullable=name == "latency_us") for name, type in types.items()])


def _list(item: pa.DataType) -> pa.ListType:
    return pa.list_(pa.field("element", item, nullable=False))


def _leaves(fields: Any, path: str = "") -> Iterator[str]:
    """Names of the Parquet columns that the fields are stored in."""
    for field in fields:
        name = path + field.name
        if pa.types.is_struct(field.type):
            yield from _leaves(field.type, f"{name}.")
        else:
            yield f"{name}.list.element" if pa.types.is_list(field.type) else name
