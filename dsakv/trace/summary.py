"""Distributions over a whole trace: exact, in memory that does not grow with it.

Every figure is an integer or a whole number of ratio bins, so a histogram holds all of them. What the tracer
counts while it writes and what :func:`summarize` counts from the shards is therefore the same to the last digit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from dsakv.errors import InputError
from dsakv.request import TIERS
from dsakv.trace.batch import Ints, TraceBatch
from dsakv.trace.formats import read_records, shard_paths
from dsakv.trace.records import RATIO_BINS, Derived, derive
from dsakv.trace.serving import serving
from dsakv.trace.tiers import RECORD_FIGURES, RecordTotals, Traffic, decode_hit_rates

HOT_BLOCKS = 20
_BATCH = 256
_FIELDS = ("request_id", "layer_id", "step_idx", "seq_len_current", "prefix", "kv_fetch", "selected_token_pos")


class Histogram:
    """How often each non-negative integer occurred."""

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def add(self, values: Ints) -> None:
        """Count each of ``values``."""
        if len(values) == 0:
            return
        self._grow(int(values.max()) + 1)
        if len(values) * 8 < len(self.counts):  # few values over a wide range: do not touch the whole range
            np.add.at(self.counts, values, 1)
        else:
            found = np.bincount(values)
            self.counts[: len(found)] += found

    def distribution(self, scale: int = 1) -> dict[str, Any]:
        """``count, min, p50, p95, max, mean`` of the values divided by ``scale``; nearest-rank percentiles."""
        n = int(self.counts.sum())
        if n == 0:
            return {"count": 0, "min": None, "p50": None, "p95": None, "max": None, "mean": None}
        values = np.flatnonzero(self.counts)
        upto = np.cumsum(self.counts[values])

        def at(rank: int) -> float | int:
            value = int(values[np.searchsorted(upto, rank, side="right")])
            return value if scale == 1 else value / scale

        total = int(values @ self.counts[values])
        return {
            "count": n,
            "min": at(0),
            "p50": at(round((n - 1) * 0.5)),
            "p95": at(round((n - 1) * 0.95)),
            "max": at(n - 1),
            "mean": total / (n * scale),
        }

    def _grow(self, size: int) -> None:
        if size > len(self.counts):
            grown = np.zeros(max(size, 2 * len(self.counts)), dtype=np.int64)
            grown[: len(self.counts)] = self.counts
            self.counts = grown


class Summary:
    """What ``summary.json`` says of the records that it was given."""

    def __init__(self) -> None:
        self.tiers = RecordTotals()
        self.traffic = Traffic()
        """Of all steps, recorded or not."""
        self.resumed = False
        """Whether ``traffic`` lacks what was before an interruption."""
        self.unique_blocks = Histogram()
        self.tokens_per_touched_block = Histogram()
        self.offsets = Histogram()
        self.touched_block_ratio = Histogram()
        self.prefix_intersection_ratio = Histogram()
        self._touches: dict[int, Histogram] = {}  # requests that may have more records to come
        self._hot: dict[int, list[dict[str, int]]] = {}

    def add(self, batch: TraceBatch, derived: Derived) -> None:
        """Count the records of ``batch``; what they found in the tiers as far as ``derived`` has it."""
        self.tiers.add(derived.fetch)
        self.unique_blocks.add(derived.unique_blocks)
        self.tokens_per_touched_block.add(derived.block_tokens)
        self.offsets.add(np.repeat(batch.seq_len - 1, np.diff(batch.offsets)) - batch.positions)
        self.touched_block_ratio.add(derived.touched_bins)
        self.prefix_intersection_ratio.add(derived.shared_bins)
        shared_ids = derived.block_ids[derived.shared]
        shared_request = batch.request_id[derived.block_record[derived.shared]]
        for request_id in np.unique(batch.request_id).tolist():
            touches = self._touches.setdefault(request_id, Histogram())
            touches.add(shared_ids[shared_request == request_id])

    def finish(self, request_id: int) -> None:
        """Reduce the touches of a request that has no more records to its hottest blocks."""
        if request_id in self._touches:
            self._hot[request_id] = _hottest(self._touches.pop(request_id))

    def to_dict(self, inputs: dict[str, Any], tiered: bool = False) -> dict[str, Any]:
        """``summary.json``. ``inputs`` counts what the workload offered: kept, truncated, dropped by reason.

        ``kv_tiers`` is there where tiers were in use: ``tiered`` tells, or what was counted. ``records`` of it are
        :meth:`RecordTotals.to_dict`, of all records; where steps told what they moved, ``transfers`` are
        :meth:`Traffic.transfers` of them, with ``"since_resume": true`` where other steps came before them, and
        ``decode`` is :func:`~dsakv.trace.tiers.decode_hit_rates`.
        """
        hot = {**self._hot, **{request_id: _hottest(touches) for request_id, touches in self._touches.items()}}
        facts: dict[str, Any] = {
            "inputs": inputs,
            "unique_blocks": self.unique_blocks.distribution(),
            "tokens_per_touched_block": self.tokens_per_touched_block.distribution(),
            "offsets": self.offsets.distribution(),
            "touched_block_ratio": self.touched_block_ratio.distribution(RATIO_BINS),
            "prefix_intersection_ratio": self.prefix_intersection_ratio.distribution(RATIO_BINS),
            "prefix_hot_blocks": {str(request_id): hot[request_id] for request_id in sorted(hot)},
        }
        if tiered or self.traffic or self.tiers.pooled:
            facts["kv_tiers"] = {"records": self.tiers.to_dict()}
        if self.traffic:
            transfers = self.traffic.transfers()
            since = {"since_resume": True} if self.resumed else {}
            facts["kv_tiers"] |= {"transfers": transfers | since, "decode": decode_hit_rates(transfers)}
        return facts


def _hottest(touches: Histogram) -> list[dict[str, int]]:
    """The most touched blocks, the lower id first where two are touched equally often."""
    order = np.argsort(-touches.counts, kind="stable")[:HOT_BLOCKS]
    return [{"block_id": int(b), "touches": int(touches.counts[b])} for b in order if touches.counts[b]]


def summarize(trace_dir: Path) -> dict[str, Any]:
    """What ``summary.json`` of this trace must say, from its shards, ``run_meta.json`` and ``requests.jsonl``.

    Of the tiers it is what the records found; what was moved they do not tell.

    Raises:
        InputError: no ``run_meta.json``, a bad record, or records without positions.
    """
    path = trace_dir / "run_meta.json"
    try:
        meta = orjson.loads(path.read_bytes())
        block_size, inputs = meta["block_size_tokens"], meta["inputs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is missing or not this program's: {error}", "name the block folder of a run, where its shards lie"
        ) from None
    served = serving(trace_dir.parent / "requests.jsonl")
    return from_shards(trace_dir, block_size).to_dict(inputs, "kv_tiers" in meta) | {"serving": served}


def from_shards(trace_dir: Path, block_size: int) -> Summary:
    """Count all records on disk.

    Raises:
        InputError: a bad record, or one without positions.
    """
    summary = Summary()
    for shard in shard_paths(trace_dir):
        seen = set()
        for batch, prefix_blocks, tiers in _batches(shard):
            try:
                derived = derive(batch, block_size, prefix_blocks)
            except ValueError as error:
                raise InputError(f"{shard}: {error}", "the file is damaged") from None
            summary.add(batch, derived)
            for name, figures in zip(TIERS, tiers.tolist(), strict=True):
                summary.tiers.count(name, *figures)
            seen.update(batch.request_id.tolist())
        for request_id in seen:  # a shard holds all records of its requests
            summary.finish(request_id)
    return summary


def _batches(shard: Path) -> Iterator[tuple[TraceBatch, Ints, Ints]]:
    """The positions of a shard's records, the ``prefix_cached_blocks`` of each, and by tier what all found, [3, 3]."""
    rows: list[list[int]] = []
    positions: list[NDArray[np.int32]] = []
    for place, record in read_records(shard, _FIELDS):
        try:
            selected = record.get("selected_token_pos")
            if selected is None:
                raise InputError(
                    f"{place}: the record holds no positions",
                    "summary.json of a trace without positions cannot be made again",
                )
            ids = (record["request_id"], record["layer_id"], record["step_idx"], record["seq_len_current"])
            tiers = [record["kv_fetch"][name][figure] for name in TIERS for figure in RECORD_FIGURES]
            rows.append([*ids, record["prefix"]["prefix_cached_blocks"], *tiers])
            positions.append(np.array(selected, dtype=np.int32))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{place}: not a record of a trace: {error!r}", "the file is damaged") from None
        if len(rows) == _BATCH:
            yield _batch(rows, positions)
            rows, positions = [], []
    if rows:
        yield _batch(rows, positions)


def _batch(rows: list[list[int]], positions: list[NDArray[np.int32]]) -> tuple[TraceBatch, Ints, Ints]:
    request_id, layer_id, step_idx, seq_len, prefix_blocks, *tiers = np.array(rows, dtype=np.int64).T
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(p) for p in positions], out=offsets[1:])
    batch = TraceBatch(request_id, layer_id, step_idx, seq_len, offsets, np.concatenate(positions))
    return batch, prefix_blocks, np.sum(tiers, axis=1).reshape(len(TIERS), -1)
