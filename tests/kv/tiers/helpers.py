"""What the tests of the pools share: sizes, pools that are closed, disks that fail, and a bound on time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dsakv.kv.tiers.contract import open_remote
from dsakv.kv.tiers.file_pool import FilePool
from dsakv.kv.tiers.redis_pool import SLOWEST_BYTES_S, TRIES, RedisPool
from tests.kv.tiers.servers import RedisServer

SIZE = 1000
"""Bytes of a block."""
N = 12
ALL = np.arange(N)
TIMEOUT = 0.2
PONG, OK, VALUE = len(b"+PONG\r\n"), len(b"+OK\r\n"), len(b"$1000\r\n\r\n") + SIZE
PUT = PONG + N * OK
"""Bytes that come from the server until all of a put is acknowledged."""


@contextmanager
def pool_at(url: str, n_blocks: int = 64, block_bytes: int = SIZE, timeout_s: float = 10) -> Iterator[RedisPool]:
    pool = open_remote(url, n_blocks=n_blocks, block_bytes=block_bytes, timeout_s=timeout_s)
    assert isinstance(pool, RedisPool)
    try:
        yield pool
    finally:
        pool.close()


@contextmanager
def server_with(directory: Path, *options: str) -> Iterator[RedisServer]:
    server = RedisServer(directory, *options)
    try:
        yield server
    finally:
        server.kill()


def random_blocks(n: int, block_bytes: int = SIZE) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(n).integers(0, 256, (n, block_bytes), dtype=np.uint8)


@contextmanager
def in_time(timeout_s: float = TIMEOUT, exchanges: int = 1) -> Iterator[None]:
    """What the tries may last, and as much for a busy machine."""
    start = time.monotonic()
    yield
    each = TRIES * (timeout_s + N * SIZE / SLOWEST_BYTES_S) + timeout_s
    assert time.monotonic() - start < exchanges * each + 3


def check(pool: FilePool, blocks: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """Put ``blocks`` and read them, in another order."""
    pool.put(np.arange(len(blocks)), blocks)
    out = np.empty_like(blocks)
    pool.get(np.arange(len(blocks))[::-1].copy(), out)
    assert np.array_equal(out, blocks[::-1])


def failing(call: Callable[..., Any], code: int, when: Callable[..., bool] = lambda *_: True) -> Callable[..., Any]:
    """``call``, but for arguments that fail."""

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if when(*arguments):
            raise OSError(code, os.strerror(code))
        return call(*arguments, **named)

    return wrapped
