"""What reading whole blocks costs: tokens moved for each token that is used, and what chance would make of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsakv.analysis.blocks import BlockRecords
from dsakv.analysis.locality import Columns
from dsakv.analysis.records import MERGED_LAYER
from dsakv.compiled import compiled

AMPLIFICATION = ("read_amplification", "uniform_read_amplification")


def amplification(batch: BlockRecords) -> Columns:
    """Tokens in the touched blocks over distinct tokens selected, [2, R]: as measured, and as it would be on average if
    as many tokens were drawn at random.

    The newest block holds the tokens that it has so far. Of ``n`` tokens, ``k`` selected, a block with ``m`` is
    touched with probability ``1 - C(n - m, k) / C(n, k)`` (hypergeometric).
    """
    out = np.empty((len(AMPLIFICATION), len(batch)))
    records = batch.records
    _amplify(
        records.positions,
        records.offsets,
        records.seq_len,
        batch.blocks,
        batch.offsets,
        batch.current,
        batch.block_size,
        bool(records.layer[0] == MERGED_LAYER),
        out,
    )
    return out


@compiled
def _amplify(
    positions: NDArray[np.int32],  # [N]
    token_offsets: NDArray[np.int64],  # [R + 1]
    seq_len: NDArray[np.int64],  # [R]
    blocks: NDArray[np.int32],  # [T]
    offsets: NDArray[np.int64],  # [R + 1]
    current: NDArray[np.int64],  # [R]
    block_size: int,
    merged: bool,
    out: Columns,  # [2, R]
) -> None:
    known_tokens, known_length, chance = -1, -1, 0.0
    for r in range(len(seq_len)):
        length, newest = seq_len[r], seq_len[r] - current[r] * block_size  # tokens in all, and in the newest block
        tokens = token_offsets[r + 1] - token_offsets[r]
        if merged:  # a token stands there once for each layer that selected it
            tokens = _distinct(positions[token_offsets[r] : token_offsets[r + 1]])
        moved = (offsets[r + 1] - offsets[r]) * block_size
        if blocks[offsets[r + 1] - 1] == current[r]:
            moved -= block_size - newest
        if tokens != known_tokens or length != known_length:  # layers of a step share them
            whole = (1 - _missed(length, block_size, tokens)) * current[r] * block_size if current[r] else 0.0
            chance = (whole + (1 - _missed(length, newest, tokens)) * newest) / tokens
            known_tokens, known_length = tokens, length
        out[0, r] = moved / tokens
        out[1, r] = chance


@compiled
def _distinct(positions: NDArray[np.int32]) -> int:
    count = 0
    before = -1
    for position in positions:
        count += position != before
        before = position
    return count


@compiled
def _missed(length: int, block: int, tokens: int) -> float:
    """Probability that ``tokens`` of ``length``, drawn at random, all lie outside ``block`` of them."""
    if tokens > length - block:
        return 0.0
    missed = 1.0
    for i in range(min(block, tokens)):  # C(n - m, k) / C(n, k), which is the same with m and k exchanged
        missed *= (length - max(block, tokens) - i) / (length - i)
    return missed
