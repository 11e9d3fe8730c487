"""What the Redis pool says of URLs that name no server, and of servers that refuse."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from dsakv.errors import DsakvError, InputError
from dsakv.kv.tiers.contract import Counted, open_remote
from tests.kv.tiers.helpers import (
    pool_at,
    random_blocks,
    server_with,
)
from tests.kv.tiers.servers import RedisServer


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


def test_a_server_that_repeats_what_it_was_sent_shows_no_password(tmp_path: Path) -> None:
    """One that knows no AUTH names its arguments."""
    with server_with(tmp_path, "--rename-command", "AUTH", "") as server:
        with pytest.raises(DsakvError, match="unknown command") as caught:
            open_remote(f"redis://s3user:s3cret@127.0.0.1:{server.port}", n_blocks=1, block_bytes=1, timeout_s=10)
        assert "s3" not in str(caught.value) + repr(caught.value) + caught.value.hint


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
