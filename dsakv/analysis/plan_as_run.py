"""The tiers that a traced run had itself: what links say that its reads took, beside what they took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsakv.analysis.links import TIERS, LinkProfile


def as_run(
    run_meta: Mapping[str, Any], kv_tiers: Mapping[str, Any] | None, links: LinkProfile, steps: int
) -> dict[str, Any] | None:
    """Figures of a decode step, mean over ``steps``; None where the run had no tiers, or they cannot be replayed.

    ``kv_tiers`` is what :func:`~dsakv.analysis.kv_check.check_tiers` found. Batches and blocks are those of the
    replay, so that the prediction rests on the trace's selections and the links alone. A link's time is linear in
    both, so their sums are enough.
    """
    if kv_tiers is None or kv_tiers["replayed"] is None:
        return None
    had, size = run_meta["kv_tiers"], run_meta["block_size_tokens"]
    tiers = {}
    for tier in TIERS:
        counted = kv_tiers["replayed"].get(tier)
        if not counted or not counted["reads"]:
            continue
        pool, measured = links.pool(tier), (kv_tiers["measured"] or {}).get(tier, {}).get("read_ms")
        predicted = None
        if pool is not None:
            predicted = counted["reads"] * pool.read.batch_us + counted["read_ops"] * pool.read.block_us(
                had["block_bytes"]
            )
        tiers[tier] = {
            "batches_per_step": counted["reads"] / steps,
            "blocks_per_step": counted["read_ops"] / steps,
            "bytes_per_step": counted["bytes_read"] / steps,
            "predicted_ms": None if predicted is None else predicted / steps / 1e3,
            "measured_ms": None if measured is None else measured / steps,
        }
    names = ("policy", "scope", "hot_blocks", "local_blocks", "home", "start", "write")
    return {"block_size_tokens": size, **{name: had[name] for name in names}, "tiers": tiers}
