"""Chained block hashes of token ids: which leading blocks two prompts share.

The hash of a block covers its parent's hash and its own tokens, so equal hashes mean equal prompts up to the end
of the block. Hashes are the same in every process and on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

DIGEST_BYTES = 16
TOKEN_BYTES = 4


def block_hashes(ids: Sequence[int], block_size: int) -> list[bytes]:
    """Hashes of the full blocks of ``ids``, in order; an unfinished last block has none.

    Raises ValueError for a block size below 1.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    tokens = _token_bytes(ids)
    step = block_size * TOKEN_BYTES
    hashes: list[bytes] = []
    parent = b""
    for begin in range(0, len(tokens) // step * step, step):
        parent = blake2b(parent + tokens[begin : begin + step], digest_size=DIGEST_BYTES).digest()
        hashes.append(parent)
    return hashes


def prefix_key(ids: Sequence[int], n: int) -> str:
    """Hash, in hex, of the first ``n`` tokens; of all of them where there are fewer."""
    return blake2b(_token_bytes(ids[:n]), digest_size=DIGEST_BYTES).hexdigest()


class PrefixIndex:
    """The blocks of all requests so far."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._seen: set[bytes] = set()

    def lookup(self, ids: Sequence[int]) -> int:
        """Leading full blocks of this prompt seen in an earlier request.

        At most ``(n - 1) // block_size`` of n tokens: the last token is always computed, as its logits are needed.
        """
        blocks = 0
        for block in block_hashes(ids[:-1], self.block_size):
            if block not in self._seen:
                break
            blocks += 1
        return blocks

    def add(self, ids: Sequence[int]) -> None:
        """Take all full blocks of this prompt into the index."""
        self._seen.update(block_hashes(ids, self.block_size))


def _token_bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, dtype="<u4").tobytes()
