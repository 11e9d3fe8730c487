"""The Redis pool against a real server: what it keeps there, what it refuses, and values that were spoilt."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from dsakv.errors import DsakvError, InputError
from dsakv.kv.tiers import redis_pool
from dsakv.kv.tiers.contract import Counted, open_remote
from dsakv.kv.tiers.redis_pool import RedisPool
from tests.kv.tiers.servers import RedisServer

SIZE = 1000


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
    "url",
    [
        "redis://:s3cret@",
        "redis://:s3cret@/0",
        "redis://user:s3cret@host:port/0",
        "redis://user:s3cret@host:99999/0",
        "redis://user:s3cret@host:0/0",
        "redis://user:s3cret@host/zero",
        "redis://user:s3cret@host/-1",
        "redis://user:s3cret@host/1/2",
        "redis://user:s3cret@host/0?protocol=3",
        "redis://user:s3cret@[::1/0",
        "redis://user:pass/s3cret@host:6379/0",
        "redis://user:#s3cret@host:6379/0",
        "redis://user:s3cret@" + "x" * 80 + ".example/0",
        "redis://user:s3cret@ho\0st/0",
    ],
)
def test_urls_that_name_no_server(url: str) -> None:
    with pytest.raises(InputError, match="URL of the Redis pool") as caught:
        open_remote(url, n_blocks=1, block_bytes=1, timeout_s=0.2)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert "s3cret" not in caught.value.message + caught.value.hint


def test_password_opens_and_is_never_shown(tmp_path: Path) -> None:
    with server_with(tmp_path, "--requirepass", "s3/cret@#") as server:
        address = f"127.0.0.1:{server.port}"
        with pool_at(f"redis://:s3%2Fcret%40%23@{address}") as pool:
            pool.put(np.array([0]), random_blocks(1))
            assert repr(pool) == f"RedisPool(redis://{address}/0, 64 blocks of 1000 bytes)"
            assert "s3" not in repr(pool._link)
        for login in ("", "default@", ":wr0ng@", "default:wr0ng@", "nobody:s3%2Fcret%40%23@"):
            with pytest.raises(DsakvError, match=f"redis://{address}/0 does not let this user in") as caught:
                open_remote(f"redis://{login}{address}/0", n_blocks=1, block_bytes=1, timeout_s=10)
            assert type(caught.value) is DsakvError
            assert not {"wr0ng", "s3"} & set(re.split(r"\W+", repr(caught.value) + caught.value.hint))


def test_server_without_memory(tmp_path: Path) -> None:
    with (
        server_with(tmp_path, "--maxmemory", "3mb", "--maxmemory-policy", "noeviction") as server,
        pool_at(server.url, block_bytes=300_000) as pool,
    ):
        blocks = random_blocks(30, 300_000)
        pool.put(np.array([0]), blocks[:1])
        with pytest.raises(DsakvError, match="is out of memory") as caught:
            pool.put(np.arange(30), blocks)
        assert "maxmemory" in caught.value.hint
        assert pool.counted == Counted(write_ops=1, bytes_written=300_000, writes=1)
        for number in (0, 29):
            with pytest.raises(DsakvError, match=f"of block {number}: its last write failed"):
                pool.get(np.array([number]), np.empty((1, 300_000), np.uint8))
        with server.client() as client:
            client.config_set("maxmemory", 0)
        pool.put(np.array([0]), blocks[:1])
        out = np.empty((1, 300_000), np.uint8)
        pool.get(np.array([0]), out)
        assert np.array_equal(out, blocks[:1])
        pool.close()
        with server.client() as client:
            assert not client.dbsize()


def test_tiny_server_without_memory(tmp_path: Path) -> None:
    with (
        server_with(tmp_path, "--maxmemory", "1mb", "--maxmemory-policy", "noeviction") as server,
        pool_at(server.url, block_bytes=300_000) as pool,
        pytest.raises(DsakvError, match="is out of memory"),
    ):
        pool.put(np.arange(8), random_blocks(8, 300_000))


def test_server_that_evicts(tmp_path: Path) -> None:
    with (
        server_with(tmp_path, "--maxmemory", "3mb", "--maxmemory-policy", "allkeys-lru") as server,
        pool_at(server.url, block_bytes=100_000) as pool,
    ):
        pool.put(np.arange(60), random_blocks(60, 100_000))
        with pytest.raises(DsakvError, match=r"no longer has block \d+") as caught:
            pool.get(np.arange(60), np.empty((60, 100_000), np.uint8))
        assert "noeviction" in caught.value.hint


def test_replica_takes_no_writes(tmp_path: Path) -> None:
    with server_with(tmp_path) as server, pool_at(server.url) as pool, server.client() as client:
        client.replicaof("127.0.0.1", 1)
        with pytest.raises(DsakvError, match="is a replica"):
            pool.put(np.array([0]), random_blocks(1))
        client.replicaof("NO", "ONE")


def test_node_of_a_cluster(tmp_path: Path) -> None:
    with (
        server_with(tmp_path, "--cluster-enabled", "yes") as server,
        pool_at(server.url) as pool,
    ):
        with pytest.raises(DsakvError, match="is a node of a cluster, which is not supported"):
            pool.put(np.array([0]), random_blocks(1))
        pool._sent[:] = False  # a cluster's node takes no UNLINK either


def test_user_without_rights(tmp_path: Path) -> None:
    with server_with(tmp_path) as server, server.client() as client:
        client.execute_command("ACL", "SETUSER", "reader", "on", ">pw", "~dsakv:*", "+get", "+ping", "+unlink")
        with (
            pool_at(f"redis://reader:pw@127.0.0.1:{server.port}") as pool,
            pytest.raises(DsakvError, match="does not let this user do") as caught,
        ):
            pool.put(np.array([0]), random_blocks(1))
        assert "PING, SET, GET and UNLINK" in caught.value.hint


def test_database_that_is_not_there(redis_server: RedisServer) -> None:
    with pytest.raises(DsakvError, match=f"redis://127.0.0.1:{redis_server.port}/99 says: DB index"):
        open_remote(f"redis://127.0.0.1:{redis_server.port}/99", n_blocks=1, block_bytes=1, timeout_s=10)


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
