"""Figures of single records: how many blocks, how far apart, how evenly used, how recent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsakv.analysis.blocks import BlockRecords
from dsakv.analysis.records import MERGED_LAYER
from dsakv.compiled import compiled

Columns = NDArray[np.float64]
"""[M, R]: a row a figure, a column a record; NaN where a record has no value."""

EXTENT = ("unique_blocks", "block_span", "block_density", "tokens_per_block_mean", "mean_block_distance")
CONCENTRATION = ("normalized_entropy", "gini")


@dataclass(frozen=True, slots=True)
class Locality:
    """``record_stats``. ``token_windows`` in tokens, ``block_windows`` in blocks."""

    token_windows: tuple[int, ...]
    block_windows: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Rows of the columns."""
        tokens = tuple(f"recent_token_ratio[{window}]" for window in self.token_windows)
        blocks = tuple(f"recent_block_ratio[{window}]" for window in self.block_windows)
        return (*EXTENT, *CONCENTRATION, *tokens, *blocks)

    def columns(self, batch: BlockRecords) -> Columns:
        records = batch.records
        extent, concentration = np.empty((len(EXTENT), len(batch))), np.empty((len(CONCENTRATION), len(batch)))
        _extent(batch.blocks, batch.offsets, records.offsets, batch.current, extent)
        most = int(np.diff(records.offsets).max())  # tokens in a block: no more than its record has
        if records.layer[0] != MERGED_LAYER:
            most = min(most, batch.block_size)
        _concentration(batch.ends, batch.offsets, records.offsets, np.zeros(most + 1, dtype=np.int64), concentration)
        tokens = _recent(
            records.positions, records.offsets, records.seq_len - 1, np.array(self.token_windows, dtype=np.int64)
        )
        blocks = _recent(batch.blocks, batch.offsets, batch.current, np.array(self.block_windows, dtype=np.int64))
        return np.concatenate([extent, concentration, tokens, blocks])

    def result(self, figures: dict[str, Any]) -> dict[str, Any]:
        """``record_stats`` from the distribution of each row."""
        return {
            **{name: figures[name] for name in EXTENT[:-1]},
            "block_concentration": {name: figures[name] for name in CONCENTRATION},
            "recent_locality": {
                "recent_token_ratio": {str(w): figures[f"recent_token_ratio[{w}]"] for w in self.token_windows},
                "recent_block_ratio": {str(w): figures[f"recent_block_ratio[{w}]"] for w in self.block_windows},
                "mean_block_distance": figures["mean_block_distance"],
            },
        }


@compiled
def _extent(
    blocks: NDArray[np.int32],  # [T]
    offsets: NDArray[np.int64],  # [R + 1]
    token_offsets: NDArray[np.int64],  # [R + 1]
    current: NDArray[np.int64],  # [R]
    out: Columns,  # [5, R]
) -> None:
    for r in range(len(current)):
        begin, end = offsets[r], offsets[r + 1]
        unique, span = end - begin, blocks[end - 1] - blocks[begin] + 1
        total = 0
        for t in range(begin, end):
            total += blocks[t]
        out[0, r] = unique
        out[1, r] = span
        out[2, r] = unique / span
        out[3, r] = (token_offsets[r + 1] - token_offsets[r]) / unique
        out[4, r] = (current[r] * unique - total) / unique


@compiled
def _concentration(
    ends: NDArray[np.int32],  # [T]
    offsets: NDArray[np.int64],  # [R + 1]
    token_offsets: NDArray[np.int64],  # [R + 1]
    blocks_of: NDArray[np.int64],  # [most tokens in a block + 1], zeros: blocks with so many tokens
    out: Columns,  # [2, R]
) -> None:
    """Shannon entropy of the tokens over the touched blocks divided by that of an even spread (0 for one block), and
    Gini coefficient ``2 * sum(i * x_i) / (n * sum(x)) - (n + 1) / n``, ``x`` ascending and ``i`` from 1.

    Both depend on how many blocks have how many tokens alone, which also sorts the counts.
    """
    for r in range(len(offsets) - 1):
        unique, tokens = offsets[r + 1] - offsets[r], token_offsets[r + 1] - token_offsets[r]
        before, most = token_offsets[r], 0
        for end in ends[offsets[r] : offsets[r + 1]]:
            count = end - before
            blocks_of[np.uint64(count)] += 1  # numba looks for negative indices but in unsigned ones
            most = max(most, count)
            before = end
        below, ranked, surprise = 0, 0, 0.0
        for count in range(1, most + 1):
            n = blocks_of[count]
            blocks_of[count] = 0
            if n:
                ranked += count * (n * (2 * below + n + 1) // 2)  # times the sum of their ranks
                below += n
                surprise += n * count * math.log(count)
        entropy = math.log(tokens) - surprise / tokens
        out[0, r] = min(max(entropy / math.log(unique), 0.0), 1.0) if unique > 1 else 0.0  # past them by rounding
        # Over one denominator, so that an even spread gives exactly 0.
        out[1, r] = (2 * ranked - (unique + 1) * tokens) / (unique * tokens)


@compiled
def _recent(
    values: NDArray[np.int32],  # [V], ascending within a record
    offsets: NDArray[np.int64],  # [R + 1]
    newest: NDArray[np.int64],  # [R]
    windows: NDArray[np.int64],  # [W]
) -> Columns:
    """Share of a record's values that are at most a window below the newest, [W, R]."""
    out = np.empty((len(windows), len(newest)))
    for r in range(len(newest)):
        own = values[offsets[r] : offsets[r + 1]]
        for w in range(len(windows)):
            far = np.searchsorted(own, newest[r] - windows[w])
            out[w, r] = (len(own) - far) / len(own)
    return out
