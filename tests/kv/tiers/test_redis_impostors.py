"""The Redis pool where nothing answers, or what answers is no Redis or not ready: a named error, in time."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import numpy as np
import pytest

from dsakv.errors import DsakvError
from dsakv.kv.tiers.contract import open_remote
from dsakv.kv.tiers.redis_pool import ServerLostError
from tests.kv.tiers.helpers import (
    TIMEOUT,
    in_time,
    pool_at,
    random_blocks,
)
from tests.kv.tiers.servers import RedisServer, free_port, impostor


def test_port_where_nothing_listens() -> None:
    port = free_port()
    with in_time(), pytest.raises(ServerLostError, match=f"redis://127.0.0.1:{port}/0 failed 3 times: .*refused"):
        open_remote(f"redis://u:s3cret@127.0.0.1:{port}", n_blocks=1, block_bytes=1, timeout_s=TIMEOUT)


def test_address_of_ipv6_is_shown_in_brackets() -> None:
    with in_time(), pytest.raises(ServerLostError, match=r"redis://\[::1\]:1/2 failed 3 times"):
        open_remote("redis://[::1]:1/2", n_blocks=1, block_bytes=1, timeout_s=TIMEOUT)


def test_server_that_takes_no_connection_any_more() -> None:
    with socket.socket() as listener, ExitStack() as waiting:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        for _ in range(8):  # fill what the system keeps for a server that is busy
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(address)
        with in_time(), pytest.raises(ServerLostError, match="failed 3 times: Timeout connecting to server"):
            open_remote(f"redis://127.0.0.1:{address[1]}", n_blocks=1, block_bytes=1, timeout_s=TIMEOUT)


def test_tls_where_the_server_speaks_none(redis_server: RedisServer) -> None:
    url = redis_server.url.replace("redis", "rediss")
    with in_time(), pytest.raises(ServerLostError, match=f"{url} failed 3 times: "):
        open_remote(url, n_blocks=1, block_bytes=1, timeout_s=TIMEOUT)


def test_opening_asks_for_a_pong_and_nothing_else() -> None:
    heard = []

    def reply(data: bytes) -> bytes:
        heard.append(data)
        return b"+PONG\r\n"

    with impostor(reply) as url, pool_at(url):
        pass
    assert heard == [b"*1\r\n$4\r\nPING\r\n"]


def test_name_that_no_resolver_knows() -> None:
    with pytest.raises(ServerLostError, match=r"redis://nowhere\.invalid:6379/0 failed 3 times"):
        open_remote("redis://nowhere.invalid", n_blocks=1, block_bytes=1, timeout_s=TIMEOUT)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"$abc\r\nabc\r\n",
        b"*1\r\n+PONG\r\n",
        b"*-1\r\n",
        b":7\r\n",
        b"+WRONG\r\n",
        bytes(range(128, 256)) + b"\r\n",
    ],
)
def test_what_answers_is_no_redis(answer: bytes) -> None:
    message = r"what answers at redis://.* does not keep to Redis' protocol"
    with impostor(lambda data: answer) as url, in_time(), pytest.raises(ServerLostError, match=message):
        open_remote(url, n_blocks=1, block_bytes=1, timeout_s=TIMEOUT)


@pytest.mark.parametrize("answer", [b"", b"$-7\r\n\r\n", b"$99999999\r\nx", b"+PON", b"no line end " * 100])
def test_what_answers_never_ends(answer: bytes) -> None:
    with impostor(lambda data: answer) as url, in_time(), pytest.raises(ServerLostError):
        open_remote(url, n_blocks=1, block_bytes=1, timeout_s=TIMEOUT)


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (b"-LOADING Redis is loading the dataset in memory\r\n", ServerLostError, "is still loading its data"),
        (b"-MOVED 3999 127.0.0.1:6381\r\n", DsakvError, "is a node of a cluster"),
        (b"-READONLY You can't write against a read only replica.\r\n", DsakvError, "is a replica"),
        (b"-MASTERDOWN Link with MASTER is down.\r\n", DsakvError, "is a replica"),
        (b"-NOAUTH Authentication required.\r\n", DsakvError, "does not let this user in"),
        (b"-MISCONF Errors writing to the disk.\r\n", DsakvError, "says: MISCONF Errors writing to the disk."),
        (b"-ERR max number of clients reached\r\n", ServerLostError, "failed 3 times: max number of clients reached"),
        (b"$3\r\nabc\r\n", ServerLostError, "does not keep to Redis' protocol"),
    ],
)
def test_what_a_server_says_no_to(answer: bytes, kind: type[DsakvError], message: str) -> None:
    def reply(data: bytes) -> bytes:
        return b"+PONG\r\n" if b"PING" in data else b":0\r\n" if b"UNLINK" in data else answer

    with impostor(reply) as url, in_time(exchanges=2), pool_at(url, timeout_s=TIMEOUT) as pool:
        with pytest.raises(DsakvError) as caught:
            pool.put(np.array([0]), random_blocks(1))
        assert type(caught.value) is kind
        assert message in caught.value.message
        assert pool.counted.retries == (2 if kind is ServerLostError else 0)


def test_loading_is_waited_for() -> None:
    answers = iter([b"+PONG\r\n", b"-LOADING wait\r\n", b"-LOADING wait\r\n", b"+OK\r\n", b":1\r\n"])
    with impostor(lambda data: next(answers)) as url, pool_at(url, timeout_s=TIMEOUT) as pool:
        pool.put(np.array([0]), random_blocks(1))
        assert pool.counted.retries == 2
