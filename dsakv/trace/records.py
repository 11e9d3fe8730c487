"""From the engine's steps to columns, and what a trace derives from them, for hundreds of records at a time.

A record costs the model's thread what it costs here, since Python runs one thread at a time: hence one numpy
call over many records in place of many calls over one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsakv.errors import DsakvError
from dsakv.request import TIERS, Step, StepRecords
from dsakv.trace.batch import Ints, TraceBatch
from dsakv.trace.fetch import FetchColumns, fetch_columns

RATIO_BINS = 1_000_000
"""Ratios are written as whole multiples of ``1 / RATIO_BINS``."""

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class PrefixFacts:
    """What earlier requests of the run share with the prompt of this one."""

    prefix_key: str
    """Hash of the first tokens."""
    prefix_cached_blocks: int
    """Leading full blocks that an earlier request has had, at most ``(n - 1) // block_size`` of n prompt tokens."""
    prefix_owners: tuple[tuple[int, int], ...] = ()
    """Which request had them first: see :meth:`~dsakv.prefix.PrefixIndex.lookup`."""

    @classmethod
    def of(cls, prefix_key: str, owners: tuple[tuple[int, int], ...], block_size: int) -> PrefixFacts:
        """Facts of a prompt that shares its prefix with ``owners``."""
        return cls(prefix_key, owners[-1][1] // block_size if owners else 0, owners)


@dataclass(frozen=True, slots=True)
class Derived:
    """What follows from the positions of ``R`` records: ``N`` positions in ``T`` touched blocks."""

    first_block: Ints  # [R], where the record's touched blocks begin in the [T] arrays
    block_record: Ints  # [T], the record of each touched block
    block_ids: Ints  # [T], ascending within a record
    block_tokens: Ints  # [T], positions in each touched block
    unique_blocks: Ints  # [R]
    tokens_p50: Ints  # [R], of tokens per touched block
    tokens_p95: Ints  # [R]
    offset_min: Ints  # [R]
    offset_p50: Ints  # [R]
    offset_max: Ints  # [R]
    touched_bins: Ints  # [R], share of the blocks in use, in units of 1 / RATIO_BINS
    shared: NDArray[np.bool_]  # [T], blocks that lie in the cached prefix
    shared_blocks: Ints  # [R], how many they are
    shared_bins: Ints  # [R], their share of the touched blocks, in units of 1 / RATIO_BINS
    fetch: Mapping[str, FetchColumns]  # by tier; absent ones were not used


def nearest_rank(n: Ints, q: float) -> NDArray[np.int64]:
    """Index of the ``q`` quantile in ``n`` sorted values: ``round((n - 1) * q)``, halves to even."""
    rank: NDArray[np.int64] = np.rint((n - 1) * q).astype(np.int64)
    return rank


def ratio_bins(part: Ints, whole: Ints) -> NDArray[np.int64]:
    """``part / whole`` in units of ``1 / RATIO_BINS``, halves to even."""
    bins: NDArray[np.int64] = np.rint(part * RATIO_BINS / whole).astype(np.int64)
    return bins


def sampled(seed: int, request_id: Ints, step_idx: Ints, rate: float) -> NDArray[np.bool_]:
    """Which (request, step) pairs a sampled trace keeps, [B]: the same ones in every layer, run and order of steps."""
    if rate >= 1.0:
        return np.ones(len(request_id), dtype=bool)
    h = np.full(len(request_id), seed & _MASK, dtype=np.uint64)
    for key in (request_id, step_idx):
        h = _mix(h + key.astype(np.uint64))
    return (h >> np.uint64(11)) * 2.0**-53 < rate  # 53 bits fill a float in [0, 1) evenly


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def to_batch(steps: Sequence[Step], seed: int, rate: float = 1.0, first_step: int = 0) -> TraceBatch | None:
    """The sampled records of ``steps``: by step, then request, then layer. None where there are none.

    ``first_step`` is added to the engine's step numbers, which begin anew in a resumed run.

    Raises:
        DsakvError: scores that are not finite, which JSON cannot hold.
    """
    kept: list[tuple[Step, StepRecords, NDArray[np.bool_]]] = []
    for step in steps:
        if step.records is not None:
            keep = sampled(seed, step.records.request_id, step.records.step_idx, rate)
            if keep.any():
                kept.append((step, step.records, keep))
    if not kept:
        return None
    layers = len(kept[0][1].index_layer_id)

    def per_query(values: list[NDArray[Any]]) -> NDArray[Any]:  # [B] each -> [R]
        return np.repeat(np.concatenate(values), layers)

    def per_tier(values: list[NDArray[Any]]) -> NDArray[Any]:  # [3, L, B] each -> [3, R]
        return np.concatenate(values, axis=2).transpose(0, 2, 1).reshape(len(TIERS), -1)

    request_id = per_query([r.request_id[k] for _, r, k in kept])
    queries = [int(k.sum()) for _, _, k in kept]
    counts = per_query([r.counts[k] for _, r, k in kept])
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    scores = np.concatenate([_ragged(r.scores, r.counts, k) for _, r, k in kept])
    layer_id = np.tile(np.arange(layers, dtype=np.int32), sum(queries))
    if not np.isfinite(scores).all():
        bad = int(np.searchsorted(offsets, int(np.argmin(np.isfinite(scores))), side="right")) - 1
        raise DsakvError(
            f"the index scores of request {request_id[bad]} in layer {layer_id[bad]} are not finite",
            "the model's numbers overflow: check the checkpoint, or run it with --dtype float32",
        )
    found = None
    if any(r.found is not None for _, r, _ in kept):
        parts = [np.zeros_like(r.positions, dtype=np.uint8) if r.found is None else r.found for _, r, _ in kept]
        found = np.concatenate([_ragged(part, r.counts, k) for part, (_, r, k) in zip(parts, kept, strict=True)])
    return TraceBatch(
        request_id=request_id,
        layer_id=layer_id,
        step_idx=per_query([r.step_idx[k] for _, r, k in kept]),
        seq_len=per_query([r.seq_len[k] for _, r, k in kept]),
        offsets=offsets,
        positions=np.concatenate([_ragged(r.positions, r.counts, k) for _, r, k in kept]),
        index_layer_id=np.concatenate(
            [np.tile(r.index_layer_id, q) for (_, r, _), q in zip(kept, queries, strict=True)]
        ),
        engine_step=per_query([first_step + s.index + r.step_offset[k] for s, r, k in kept]),
        step_wall_us=np.repeat([s.wall_us for s, _, _ in kept], [q * layers for q in queries]),
        scores=scores,
        found=found,
        fetch_us=per_tier([r.fetch_us[..., k] for _, r, k in kept]),
        fetch_batch=per_tier([r.fetch_batch[..., k] for _, r, k in kept]),
        row_bytes=np.repeat([r.row_bytes for _, r, _ in kept], [q * layers for q in queries]),
    )


def _ragged(values: NDArray[Any], counts: NDArray[np.int64], keep: NDArray[np.bool_]) -> NDArray[Any]:
    """The first ``counts[b]`` of ``values[:, b]``, query by query and layer by layer, flat."""
    rows = values.transpose(1, 0, 2)  # [B, L, K]
    if not keep.all():
        rows, counts = rows[keep], counts[keep]
    if (counts == rows.shape[2]).all():
        return rows.reshape(-1)
    valid = np.arange(rows.shape[2]) < counts[:, None, None]  # [B, 1, K]
    return rows[np.broadcast_to(valid, rows.shape)]


def derive(batch: TraceBatch, block_size: int, prefix_blocks: Ints) -> Derived:
    """Statistics of every record for blocks of ``block_size`` tokens.

    ``prefix_blocks`` [R] is each record's ``prefix_cached_blocks``.

    Raises:
        ValueError: a record without positions, or with positions that are not ascending, unique and below its
            ``seq_len``, which the engine never selects; or as :func:`~dsakv.trace.fetch.fetch_columns`.
    """
    positions, offsets = batch.positions, batch.offsets
    counts = np.diff(offsets)
    if not (counts > 0).all():
        raise ValueError("a record selects nothing")
    first, last = offsets[:-1], offsets[1:] - 1
    ascending = np.empty(len(positions), dtype=bool)
    np.greater(positions[1:], positions[:-1], out=ascending[1:])
    ascending[first] = (positions[first] >= 0) & (positions[last] < batch.seq_len)
    if not ascending.all():
        bad = int(np.searchsorted(offsets, int(np.argmin(ascending)), side="right")) - 1
        raise ValueError(
            f"request {batch.request_id[bad]}, layer {batch.layer_id[bad]}, step {batch.step_idx[bad]}: selected "
            f"positions are not ascending, unique and within [0, {batch.seq_len[bad]})"
        )

    blocks = positions // block_size
    begins = np.empty(len(blocks), dtype=bool)
    np.not_equal(blocks[1:], blocks[:-1], out=begins[1:])
    begins[first] = True
    starts = np.flatnonzero(begins)
    block_ids = blocks[starts]
    block_tokens = np.diff(starts, append=len(blocks))
    first_block = np.searchsorted(starts, first)
    unique = np.diff(first_block, append=len(starts))
    record = np.repeat(np.arange(len(batch)), unique)

    # Sorting record and count as one number sorts the counts of every record in place.
    stride = int(block_tokens.max()) + 1
    ranked = np.sort(record * stride + block_tokens)
    shared = block_ids < prefix_blocks[record]
    shared_blocks = np.add.reduceat(shared, first_block, dtype=np.int64)
    query = batch.seq_len - 1
    return Derived(
        first_block=first_block,
        block_record=record,
        block_ids=block_ids,
        block_tokens=block_tokens,
        unique_blocks=unique,
        tokens_p50=ranked[first_block + nearest_rank(unique, 0.5)] % stride,
        tokens_p95=ranked[first_block + nearest_rank(unique, 0.95)] % stride,
        offset_min=query - positions[last],
        offset_p50=query - positions[last - nearest_rank(counts, 0.5)],
        offset_max=query - positions[first],
        touched_bins=ratio_bins(unique, -(-batch.seq_len // block_size)),
        shared=shared,
        shared_blocks=shared_blocks,
        shared_bins=ratio_bins(shared_blocks, unique),
        fetch=fetch_columns(batch, block_size, starts, first_block, record, block_ids),
    )
