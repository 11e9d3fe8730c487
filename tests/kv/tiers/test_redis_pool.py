"""The Redis pool against a real server: what it keeps there, and values that were spoilt."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import redis

from dsakv.errors import DsakvError
from dsakv.kv.tiers import redis_pool
from dsakv.kv.tiers.contract import Counted
from tests.kv.tiers.helpers import (
    SIZE,
    pool_at,
    random_blocks,
)
from tests.kv.tiers.servers import RedisServer


def calls(client: redis.Redis) -> dict[str, int]:
    """How often the server has been asked for what, by its own count."""
    stats: Any = client.info("commandstats")
    return {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in stats.items()}


@pytest.mark.parametrize("pipeline_bytes", [32 << 20, 3 * SIZE])
def test_server_counts_what_the_pool_counts(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, pipeline_bytes: int
) -> None:
    monkeypatch.setattr(redis_pool, "PIPELINE_BYTES", pipeline_bytes)
    with redis_server.client(db=3) as client, pool_at(f"redis://127.0.0.1:{redis_server.port}/3") as pool:
        client.config_resetstat()
        blocks = random_blocks(20)
        pool.put(np.arange(20), blocks)
        pool.put(np.arange(5), blocks[:5])
        pool.get(np.arange(19, -1, -1), np.empty_like(blocks))
        served = calls(client)
        assert served["set"] == pool.counted.write_ops == 25
        assert served["get"] == pool.counted.read_ops == 20
        assert pool.counted == Counted(20, 20 * SIZE, 1, 25, 25 * SIZE, 2)
        keys = list(client.scan_iter("dsakv:*"))
        assert len(keys) == 20
        assert all(re.fullmatch(rb"dsakv:[0-9a-f]{16}:\d+", key) for key in keys)
        assert {client.strlen(key) for key in keys} == {SIZE}
        pool.close()
        assert not client.dbsize()
        assert set(calls(client)) <= {"set", "get", "unlink", "scan", "strlen", "dbsize", "info", "config|resetstat"}


def test_pools_of_one_server_do_not_see_each_other(redis_server: RedisServer) -> None:
    with pool_at(redis_server.url) as first, pool_at(redis_server.url) as second:
        blocks = random_blocks(2)
        first.put(np.array([7]), blocks[:1])
        with pytest.raises(KeyError):
            second.get(np.array([7]), np.empty((1, SIZE), np.uint8))
        second.put(np.array([7]), blocks[1:])
        second.close()
        out = np.empty((1, SIZE), np.uint8)
        first.get(np.array([7]), out)
        assert np.array_equal(out, blocks[:1])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda value, other: value[:-1],
        lambda value, other: b"",
        lambda value, other: value + b"\0",
        lambda value, other: value[:500] + bytes([value[500] ^ 1]) + value[501:],
        lambda value, other: other,
        lambda value, other: bytes(SIZE),
    ],
    ids=["cut", "empty", "longer", "flipped", "of another block", "zeros"],
)
def test_spoilt_values_are_told(redis_server: RedisServer, spoil: Any) -> None:
    with pool_at(redis_server.url) as pool, redis_server.client() as client:
        blocks = random_blocks(10)
        pool.put(np.arange(10), blocks)
        client.set(pool._prefix + b"4", spoil(blocks[4].tobytes(), blocks[5].tobytes()))
        out = blocks.copy()  # what was there before must not pass for what was read
        with pytest.raises(DsakvError, match=r"block 4 came back from redis://.* as something else than was written$"):
            pool.get(np.arange(10), out)
        assert pool.counted.retries == 1
        assert not pool.counted.read_ops
        rest = np.array([0, 9, 3])
        pool.get(rest, out[:3])
        assert np.array_equal(out[:3], blocks[rest])


def test_a_stale_value_is_told(redis_server: RedisServer) -> None:
    with pool_at(redis_server.url) as pool, redis_server.client() as client:
        old, new = random_blocks(2)[:, None, :]
        pool.put(np.array([4]), old)
        pool.put(np.array([4]), new)
        client.set(pool._prefix + b"4", old.tobytes())
        with pytest.raises(DsakvError, match="block 4 came back"):
            pool.get(np.array([4]), np.empty_like(new))


def test_values_swapped_among_blocks_are_told_even_where_sizes_agree(redis_server: RedisServer) -> None:
    with pool_at(redis_server.url) as pool, redis_server.client() as client:
        pool.put(np.arange(3), np.repeat(random_blocks(1), 3, axis=0))
        for number in (0, 1):
            client.set(pool._prefix + b"%d" % number, b"x" * SIZE)
        with pytest.raises(DsakvError, match=r"block 0 came back .*, and so did 1 other"):
            pool.get(np.arange(3), np.empty((3, SIZE), np.uint8))


def test_a_value_of_another_type_is_told(redis_server: RedisServer) -> None:
    with pool_at(redis_server.url) as pool, redis_server.client() as client:
        pool.put(np.array([4]), random_blocks(1))
        client.delete(pool._prefix + b"4")
        client.lpush(pool._prefix + b"4", b"x")
        with pytest.raises(DsakvError, match="says: WRONGTYPE"):
            pool.get(np.array([4]), np.empty((1, SIZE), np.uint8))


def test_an_interrupt_leaves_no_reply_behind(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pool_at(redis_server.url) as pool:
        blocks = random_blocks(8)
        pool.put(np.arange(8), blocks)
        out = np.empty_like(blocks)
        replies, reply = iter(range(99)), pool._reply

        def interrupted() -> object:
            if next(replies) == 3:
                raise KeyboardInterrupt
            return reply()

        with monkeypatch.context() as patch:
            patch.setattr(pool, "_reply", interrupted)
            with pytest.raises(KeyboardInterrupt):
                pool.get(np.arange(8), out)
        pool.get(np.arange(7, -1, -1), out)
        assert np.array_equal(out, blocks[::-1])
        assert not pool.counted.retries
