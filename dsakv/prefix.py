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
        parent = _chained(parent, tokens[begin : begin + step])
        hashes.append(parent)
    return hashes


def chained_hash(parent: bytes, ids: Sequence[int]) -> bytes:
    """Hash of the block of ``ids`` behind the block with the hash ``parent``, which is empty for the first one."""
    return _chained(parent, _token_bytes(ids))


def _chained(parent: bytes, tokens: bytes) -> bytes:
    return blake2b(parent + tokens, digest_size=DIGEST_BYTES).digest()


def prefix_key(ids: Sequence[int], n: int) -> str:
    """Hash, in hex, of the first ``n`` tokens; of all of them where there are fewer."""
    return blake2b(_token_bytes(ids[:n]), digest_size=DIGEST_BYTES).hexdigest()


class PrefixIndex:
    """The blocks of all requests so far, and which request had each first."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._first: dict[bytes, int] = {}

    def lookup(self, ids: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Leading full blocks of this prompt seen in an earlier request: (request, tokens) pairs, both ascending.

        Up to so many tokens the prompt is that of this request, which was the first to have the last of these blocks.
        At most ``(n - 1) // block_size`` blocks of n tokens: the last token is always computed, as its logits are
        needed.
        """
        owners: dict[int, int] = {}
        for blocks, block in enumerate(block_hashes(ids[:-1], self.block_size), 1):
            first = self._first.get(block)
            if first is None:
                break
            owners[first] = blocks * self.block_size
        return tuple(owners.items())

    def add(self, ids: Sequence[int], request_id: int) -> None:
        """Take all full blocks of a request's prompt into the index. Ids of requests ascend."""
        for block in block_hashes(ids, self.block_size):
            self._first.setdefault(block, request_id)


def _token_bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, dtype="<u4").tobytes()
