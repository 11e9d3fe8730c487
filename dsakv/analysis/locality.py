"""Figures of single records: how many blocks, how far apart, how evenly used, how recent."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsakv.analysis.distribution import Distribution
from dsakv.analysis.history import Accesses
from dsakv.analysis.records import BlockRecords


class RecordStats:
    """``record_stats``: a distribution over records for each figure.

    ``token_windows`` in tokens, ``block_windows`` in blocks.
    """

    def __init__(self, token_windows: tuple[int, ...], block_windows: tuple[int, ...]) -> None:
        self.unique_blocks = Distribution()
        self.block_span = Distribution()
        self.block_density = Distribution()
        self.tokens_per_block = Distribution()
        self.entropy = Distribution()
        self.gini = Distribution()
        self.block_distance = Distribution()
        self.recent_tokens = {window: Distribution() for window in token_windows}
        self.recent_blocks = {window: Distribution() for window in block_windows}

    def add(self, batch: BlockRecords, accesses: Accesses) -> None:
        records = batch.records
        first = batch.offsets[:-1]
        unique = np.diff(batch.offsets)  # [R]
        selected = np.diff(records.offsets)  # [R]
        span = batch.blocks[batch.offsets[1:] - 1] - batch.blocks[first] + 1
        self.unique_blocks.add(unique)
        self.block_span.add(span)
        self.block_density.add(unique / span)
        self.tokens_per_block.add(selected / unique)
        self.entropy.add(normalized_entropy(batch))
        self.gini.add(gini(batch))

        distance = batch.current[batch.row] - batch.blocks  # [T]
        self.block_distance.add(np.add.reduceat(distance, first) / unique)
        for window, distribution in self.recent_blocks.items():
            distribution.add(np.add.reduceat(distance <= window, first, dtype=np.int64) / unique)
        offset = np.repeat(records.seq_len - 1, selected) - records.positions  # [N]
        for window, distribution in self.recent_tokens.items():
            distribution.add(np.add.reduceat(offset <= window, records.offsets[:-1], dtype=np.int64) / selected)

    def merge(self, later: RecordStats) -> None:
        for mine, other in zip(self._distributions(), later._distributions(), strict=True):
            mine.merge(other)

    def result(self) -> dict[str, Any]:
        return {
            "unique_blocks": self.unique_blocks.result(),
            "block_span": self.block_span.result(),
            "block_density": self.block_density.result(),
            "tokens_per_block_mean": self.tokens_per_block.result(),
            "block_concentration": {"normalized_entropy": self.entropy.result(), "gini": self.gini.result()},
            "recent_locality": {
                "recent_token_ratio": {str(window): d.result() for window, d in self.recent_tokens.items()},
                "recent_block_ratio": {str(window): d.result() for window, d in self.recent_blocks.items()},
                "mean_block_distance": self.block_distance.result(),
            },
        }

    def _distributions(self) -> list[Distribution]:
        return [
            self.unique_blocks,
            self.block_span,
            self.block_density,
            self.tokens_per_block,
            self.entropy,
            self.gini,
            self.block_distance,
            *self.recent_tokens.values(),
            *self.recent_blocks.values(),
        ]


def normalized_entropy(batch: BlockRecords) -> NDArray[np.float64]:
    """Shannon entropy of the tokens over the touched blocks, divided by that of an even spread; 0 for one block. [R]"""
    first = batch.offsets[:-1]
    unique = np.diff(batch.offsets)
    share = batch.tokens / np.add.reduceat(batch.tokens, first)[batch.row]  # [T]
    entropy = -np.add.reduceat(share * np.log(share), first)
    ratio = np.zeros(len(batch))
    np.divide(entropy, np.log(unique), out=ratio, where=unique > 1)
    return np.minimum(ratio, 1.0)  # rounding may carry an even spread past 1


def gini(batch: BlockRecords) -> NDArray[np.float64]:
    """Gini coefficient of the tokens over the touched blocks, [R].

    ``2 * sum(i * x_i) / (n * sum(x)) - (n + 1) / n`` with ``x`` ascending and ``i`` from 1, over one denominator so
    that an even spread gives exactly 0.
    """
    first = batch.offsets[:-1]
    unique = np.diff(batch.offsets)
    stride = int(batch.tokens.max()) + 1
    x = np.sort(batch.row * stride + batch.tokens) % stride  # sorts every record's counts at once
    i = np.arange(1, len(x) + 1) - first[batch.row]
    total = np.add.reduceat(x, first)
    ratio: NDArray[np.float64] = (2 * np.add.reduceat(i * x, first) - (unique + 1) * total) / (unique * total)
    return ratio
