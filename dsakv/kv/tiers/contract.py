"""What a remote pool of KV blocks does, and which pools there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dsakv.errors import InputError

POOLS = {"redis": "redis_pool", "rediss": "redis_pool", "file": "file_pool"}
"""URL schemes, and the module of this package whose ``open_pool`` serves them. Imported when a URL asks for it."""


@dataclass(slots=True)
class Counted:
    """What a pool has done so far.

    What had to be repeated counts once here, and each command that was tried again once in ``retries``: while
    nothing fails, the figures are those that a plan of the same batches gives.
    """

    read_ops: int = 0
    """Blocks read."""
    bytes_read: int = 0
    """Payload, without keys, framing and padding."""
    reads: int = 0
    """Batches."""
    write_ops: int = 0
    bytes_written: int = 0
    writes: int = 0
    retries: int = 0


class RemotePool(Protocol):
    """Blocks of one run, kept elsewhere. A block is known by its number, 0 to ``n_blocks - 1``.

    The caller folds layer and block into the number. One thread at a time may use a pool.
    """

    counted: Counted

    def put(self, numbers: NDArray[np.int64], blocks: NDArray[np.uint8]) -> None:
        """Keep ``blocks`` [n, block_bytes], C-contiguous, as ``numbers`` [n], each at most once in a batch.

        Returns when all of them are acknowledged. Raises DsakvError otherwise; blocks of that batch cannot be read
        until they are put again, as nobody knows which of them arrived.
        """
        ...

    def get(self, numbers: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Fill ``out`` [n, block_bytes], C-contiguous, with the blocks ``numbers`` [n].

        Raises DsakvError where a block is gone or is not what was put last (``out`` is then worth nothing), and
        KeyError for a block that was never put.
        """
        ...

    def close(self) -> None:
        """Remove what the run left there. A server that is gone is no error; a second call does nothing."""
        ...


def open_remote(url: str, *, n_blocks: int, block_bytes: int, timeout_s: float) -> RemotePool:
    """The pool that ``url`` names, empty: ``redis://host:port/db``, ``rediss://`` (TLS) or ``file:///folder``.

    ``timeout_s`` bounds each wait for a server. Raises InputError for a URL that names no pool, DsakvError where
    the pool cannot be used. No message shows a user name or password.
    """
    if n_blocks < 1 or block_bytes < 1 or not timeout_s > 0:
        raise ValueError(f"a pool of {n_blocks} blocks of {block_bytes} bytes, with a timeout of {timeout_s} s")
    scheme, separator, _ = url.partition("://")
    name = POOLS.get(scheme.lower()) if separator else None
    if name is None:
        raise InputError(
            "the URL of the remote pool starts with no scheme that is known here",
            f"use one of {', '.join(f'{known}://' for known in POOLS)}",
        )
    opened: Callable[..., RemotePool] = import_module(f"dsakv.kv.tiers.{name}").open_pool
    return opened(url, n_blocks=n_blocks, block_bytes=block_bytes, timeout_s=timeout_s)
