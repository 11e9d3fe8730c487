"""The Redis pool when connections break and servers die: errors in time, no wrong block."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dsakv.errors import DsakvError
from dsakv.kv.tiers.contract import open_remote
from dsakv.kv.tiers.redis_pool import TRIES, ServerLostError
from tests.kv.tiers.helpers import (
    ALL,
    OK,
    PONG,
    PUT,
    SIZE,
    TIMEOUT,
    VALUE,
    N,
    in_time,
    pool_at,
    random_blocks,
    server_with,
)
from tests.kv.tiers.servers import Fault, RedisServer, proxy


@pytest.mark.parametrize("end", ["close", "reset", "stall"])
@pytest.mark.parametrize("upward", [False, True], ids=["replies", "commands"])
def test_one_broken_connection_is_mended(redis_server: RedisServer, end: str, upward: bool) -> None:
    blocks = random_blocks(N)
    for after in (PUT - PONG, PUT - 1) if not upward else (3000, 5555):  # while blocks are put
        with proxy(redis_server.port, Fault(after, end, upward)) as between, in_time(exchanges=2):
            with pool_at(between.url, timeout_s=TIMEOUT) as pool:
                pool.put(ALL, blocks)
                assert 0 < pool.counted.retries <= N
                out = np.empty_like(blocks)
                pool.get(ALL, out)
                assert np.array_equal(out, blocks)
                assert (pool.counted.write_ops, pool.counted.read_ops) == (N, N)
            assert between.accepted == 2


@pytest.mark.parametrize("end", ["close", "reset", "stall"])
def test_reading_goes_on_where_it_broke(redis_server: RedisServer, end: str) -> None:
    blocks = random_blocks(N)
    with (
        proxy(redis_server.port, Fault(PUT + 5 * VALUE + 17, end)) as between,
        in_time(exchanges=2),
        pool_at(between.url, timeout_s=TIMEOUT) as pool,
    ):
        pool.put(ALL, blocks)
        out = np.empty_like(blocks)
        pool.get(ALL, out)
        assert np.array_equal(out, blocks)
        # A reset may overtake blocks that were not read yet; otherwise five had come.
        assert pool.counted.retries == N - 5 or (end == "reset" and N - 5 < pool.counted.retries <= N)
        assert (pool.counted.read_ops, pool.counted.reads) == (N, 1)


@pytest.mark.parametrize("end", ["close", "reset", "stall", "drip"])
def test_connections_that_break_again_and_again(redis_server: RedisServer, end: str) -> None:
    faults = [Fault(PUT + 17, end), *[Fault(3, end)] * 20]
    with (
        proxy(redis_server.port, *faults) as between,
        in_time(exchanges=4),
        pool_at(between.url, timeout_s=TIMEOUT) as pool,
    ):
        pool.put(ALL, random_blocks(N))
        with pytest.raises(ServerLostError, match=rf"{between.url} failed {TRIES} times: ") as caught:
            pool.get(ALL, np.empty((N, SIZE), np.uint8))
        assert "\n" not in caught.value.message
        assert "longer --kv-timeout" in caught.value.hint
        assert pool.counted.retries == 2 * N
        assert between.accepted == TRIES
        assert not pool.counted.read_ops


def test_cut_anywhere_gives_the_blocks_or_an_error(redis_server: RedisServer) -> None:
    rng = np.random.default_rng(4)
    outcomes = []
    for _ in range(30):
        faults = [
            Fault(int(rng.integers(PONG, PUT + N * VALUE)), str(rng.choice(["close", "reset"]))) for _ in range(3)
        ]
        with (
            proxy(redis_server.port, *faults) as between,
            pool_at(between.url, timeout_s=TIMEOUT) as pool,
        ):
            kept: dict[int, bytes] = {}
            for step in range(4):
                blocks = rng.integers(0, 256, (N, SIZE), dtype=np.uint8)
                numbers = rng.permutation(N)
                try:
                    if step % 2 == 0:
                        pool.put(numbers, blocks)
                        kept = {number: row.tobytes() for number, row in zip(numbers.tolist(), blocks, strict=True)}
                    elif kept:
                        pool.get(numbers, blocks)
                        assert [row.tobytes() for row in blocks] == [kept[number] for number in numbers.tolist()]
                except DsakvError as error:
                    outcomes.append(type(error).__name__)
                    if step % 2 == 0:
                        kept = {}
                else:
                    outcomes.append("done")
    assert set(outcomes) == {"done", "ServerLostError"}


@pytest.mark.parametrize("kind", ["cut", "flipped", "of another block"])
def test_values_garbled_on_the_way_are_read_again(redis_server: RedisServer, kind: str) -> None:
    blocks = random_blocks(N)
    value = blocks[4].tobytes()
    rewrite = {
        "cut": (b"$1000\r\n" + value, b"$500\r\n" + value[:500]),
        "flipped": (value, value[:-1] + bytes([value[-1] ^ 128])),
        "of another block": (value, blocks[5].tobytes()),
    }[kind]
    out = np.empty_like(blocks)
    with proxy(redis_server.port, Fault(rewrite=rewrite)) as between, pool_at(between.url) as pool:
        pool.put(ALL, blocks)
        pool.get(ALL, out)
        assert np.array_equal(out, blocks)
        assert pool.counted.retries == 1
    with proxy(redis_server.port, *[Fault(rewrite=rewrite)] * 9) as between, pool_at(between.url) as pool:
        pool.put(ALL, blocks)
        with pytest.raises(DsakvError, match="block 4 came back from"):
            pool.get(ALL, out)
        assert pool.counted.retries == 1


def test_values_garbled_on_the_way_there_are_told(redis_server: RedisServer) -> None:
    blocks = random_blocks(N)
    value = blocks[4].tobytes()
    fault = Fault(rewrite=(value, value[::-1]), upward=True)
    with proxy(redis_server.port, fault) as between, pool_at(between.url) as pool:
        pool.put(ALL, blocks)
        with pytest.raises(DsakvError, match="block 4 came back from"):
            pool.get(ALL, np.empty_like(blocks))


def test_replies_that_slipped_are_read_again(redis_server: RedisServer) -> None:
    """A reply too many, and every block is another's."""
    blocks = random_blocks(N)
    extra = (b"$1000\r\n" + blocks[2].tobytes(), b"$1000\r\n" + bytes(SIZE) + b"\r\n$1000\r\n" + blocks[2].tobytes())
    with proxy(redis_server.port, Fault(rewrite=extra)) as between, pool_at(between.url) as pool:
        pool.put(ALL, blocks)
        out = np.empty_like(blocks)
        pool.get(ALL, out)
        assert np.array_equal(out, blocks)
        assert pool.counted.retries == N - 2


def test_server_killed_before_a_read(tmp_path: Path) -> None:
    with server_with(tmp_path) as server, in_time(exchanges=3), pool_at(server.url, timeout_s=TIMEOUT) as pool:
        pool.put(ALL, random_blocks(N))
        server.kill()
        with pytest.raises(ServerLostError, match=rf"127.0.0.1:{server.port}/0 failed 3 times: .*refused"):
            pool.get(ALL, np.empty((N, SIZE), np.uint8))
        with pytest.raises(ServerLostError, match="refused"):
            pool.put(ALL, random_blocks(N))


@pytest.mark.parametrize("after", [PUT - 2 * OK, PUT, PUT + 5 * VALUE + 17], ids=["put", "get", "within a block"])
def test_server_killed_during_an_exchange(tmp_path: Path, after: int) -> None:
    with (
        server_with(tmp_path) as server,
        proxy(server.port, Fault(after, at=server.kill)) as between,
        in_time(exchanges=3),
        pool_at(between.url, timeout_s=TIMEOUT) as pool,
    ):
        if after >= PUT:
            pool.put(ALL, random_blocks(N))
        with pytest.raises(ServerLostError, match="failed 3 times"):
            (pool.get if after >= PUT else pool.put)(ALL, random_blocks(N))
        assert pool.counted.retries > 0


def test_server_restarted_empty(tmp_path: Path) -> None:
    with server_with(tmp_path) as server, pool_at(server.url, timeout_s=2) as pool:
        pool.put(ALL, random_blocks(N))
        server.restart()
        with pytest.raises(DsakvError, match="no longer has block 0") as caught:
            pool.get(ALL, np.empty((N, SIZE), np.uint8))
        assert type(caught.value) is DsakvError
        assert pool.counted.retries == N
        blocks = random_blocks(N + 1)[:N]
        pool.put(ALL, blocks)
        out = np.empty_like(blocks)
        pool.get(ALL, out)
        assert np.array_equal(out, blocks)


def test_server_restarted_during_a_put(tmp_path: Path) -> None:
    """The rest is sent again; blocks that the first server had acknowledged are gone, and said to be."""
    blocks = random_blocks(N)
    with (
        server_with(tmp_path) as server,
        proxy(server.port, Fault(PUT - 4 * OK, at=server.restart)) as between,
        pool_at(between.url, timeout_s=2) as pool,
    ):
        pool.put(ALL, blocks)
        assert pool.counted.retries == 4
        assert pool.counted.write_ops == N
        out = np.empty((4, SIZE), np.uint8)
        pool.get(ALL[-4:], out)
        assert np.array_equal(out, blocks[-4:])
        with pytest.raises(DsakvError, match="no longer has block 7"):
            pool.get(ALL[::-1].copy(), np.empty_like(blocks))


def test_close_of_a_server_that_is_gone(tmp_path: Path) -> None:
    with server_with(tmp_path) as server:
        with in_time(exchanges=3), pool_at(server.url, timeout_s=TIMEOUT) as pool:
            pool.put(ALL, random_blocks(N))
            server.kill()
        assert server.started()
        with pool_at(server.url, timeout_s=2) as pool:
            pool.put(ALL, random_blocks(N))
            server.restart()  # the connection is broken, the server is not gone
        with server.client() as client:
            assert not client.dbsize()


def test_close_removes_what_a_failed_put_left(redis_server: RedisServer) -> None:
    faults = [Fault(PUT - 3 * OK, "close"), Fault(3), Fault(3)]
    with redis_server.client() as client, proxy(redis_server.port, *faults) as between:
        before = client.dbsize()
        with pool_at(between.url, timeout_s=TIMEOUT) as pool:
            with pytest.raises(ServerLostError):
                pool.put(ALL, random_blocks(N))
            assert client.dbsize() == before + N
        assert client.dbsize() == before


def test_server_that_stops_reading(redis_server: RedisServer) -> None:
    """Until no buffer on the way takes any more."""
    faults = [Fault(1_000_000, "stall", upward=True)] * 9
    with proxy(redis_server.port, *faults) as between, in_time(2 * TIMEOUT + 12, exchanges=1):
        pool = open_remote(between.url, n_blocks=40, block_bytes=300_000, timeout_s=TIMEOUT)
        with pytest.raises(ServerLostError, match="failed 3 times: Timeout writing to socket"):
            pool.put(np.arange(40), random_blocks(40, 300_000))
        pool.close()
