"""Where the blocks of each record were found and what reading them cost: the columns of ``kv_fetch``, by tier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dsakv.request import TIERS
from dsakv.trace.batch import Floats, Ints, TraceBatch


@dataclass(frozen=True, slots=True)
class FetchColumns:
    """What ``R`` records found in one tier and what reading it cost. Where a record found nothing all is 0."""

    hit_blocks: Ints  # [R], touched blocks found in this tier
    read_ops: Ints  # [R], what was read one by one: rows of tokens on the device, whole blocks in a pool
    bytes_read: Ints  # [R], payload bytes
    latency_us: Floats  # [R], of the one batch that read for this record, in units of 0.1; NaN where there was none
    batch_size: Ints  # [R], queries that this batch read for
    first_block: Ints  # [R + 1], where the record's blocks begin in block_ids
    block_ids: Ints  # [first_block[-1]], the blocks found, ascending within a record


def fetch_columns(
    batch: TraceBatch, block_size: int, starts: Ints, first_block: Ints, block_record: Ints, block_ids: Ints
) -> Mapping[str, FetchColumns]:
    """The columns of every tier that the records may have used, by its name; none where ``batch`` does not tell.

    ``starts`` [T] is the first position (an index into ``batch.positions``) of each touched block; for the others see
    :class:`~dsakv.trace.records.Derived`.

    Raises:
        ValueError: the engine's facts contradict each other: positions of a block in different tiers, or blocks found
            where no batch read for the record.
    """
    if batch.fetch_us is None or batch.fetch_batch is None or batch.row_bytes is None:
        return {}
    rows = np.diff(batch.offsets)
    bounds = np.append(first_block, len(block_ids))
    if batch.found is None:
        hits = {"hbm": (np.diff(bounds), rows, rows * batch.row_bytes, bounds, block_ids)}
    else:
        tier = batch.found[starts]  # [T]
        tokens = np.diff(starts, append=len(batch.found))
        if (tier >= len(TIERS)).any() or not np.array_equal(np.repeat(tier, tokens), batch.found):
            raise ValueError("a block was found in several tiers at once, or in an unknown one")
        hits = {}
        for i, name in enumerate(TIERS):
            here = np.flatnonzero(tier == i)
            blocks = np.bincount(block_record[here], minlength=len(batch))
            if name == "hbm":
                ops = np.add.reduceat(np.where(tier == i, tokens, 0), first_block)
                size = ops * batch.row_bytes
            else:
                ops, size = blocks, blocks * (block_size * batch.row_bytes)
            hits[name] = blocks, ops, size, np.append(0, np.cumsum(blocks)), block_ids[here]
    columns = {}
    for name, (blocks, ops, size, first, ids) in hits.items():
        us, queries = batch.fetch_us[TIERS.index(name)], batch.fetch_batch[TIERS.index(name)]
        used = blocks > 0
        if (bad := np.flatnonzero(used & (np.isnan(us) | (queries <= 0)))).size:
            r = int(bad[0])
            raise ValueError(
                f"request {batch.request_id[r]}, layer {batch.layer_id[r]}, step {batch.step_idx[r]}: blocks were "
                f"found in {name}, but no batch read them"
            )
        latency = np.where(used, np.round(us, 1), np.nan)
        columns[name] = FetchColumns(blocks, ops, size, latency, np.where(used, queries, 0), first, ids)
    return columns
