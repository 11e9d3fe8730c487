"""A remote pool in Redis, Valkey or what speaks their protocol: one connection, one pipelined command a block."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

import numpy as np
import redis
from numpy.typing import NDArray
from redis import exceptions
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection
from redis.retry import Retry

from dsakv.errors import DsakvError, InputError
from dsakv.kv.tiers.checked import CheckedPool
from dsakv.kv.tiers.deadline import Deadline, DeadlineSocket
from dsakv.kv.tiers.resp import Command, command, joined, set_command

TRIES = 3
LAST_WAIT = 1.0
"""Seconds to wait at most for a server to remove what a run left there."""
PIPELINE_BYTES = 32 << 20
PIPELINE_COMMANDS = 8192
"""What one pipeline holds at most: replies wait in the server's memory, payload and replies in this process'."""
SLOWEST_BYTES_S = 1e6
"""A pipeline may take its payload at this rate longer than the timeout. What is slower is given up."""
READ_BYTES = 1 << 18

AGAIN = (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.InvalidResponse)
"""What another connection may mend."""
REFUSALS: tuple[tuple[tuple[type[Exception], ...], str, str], ...] = (
    (
        (exceptions.AuthenticationError, exceptions.AuthorizationError),
        "does not let this user in",
        "name user and password in the URL, percent-encoded: redis://user:password@host:port/db",
    ),
    (
        (exceptions.NoPermissionError,),
        "does not let this user do what the pool needs",
        "allow PING, SET, GET and UNLINK on keys that start with dsakv:",
    ),
    ((exceptions.OutOfMemoryError,), "is out of memory", "raise its maxmemory, or keep fewer blocks there"),
    ((exceptions.ReadOnlyError, exceptions.MasterDownError), "is a replica", "give the address of its primary"),
    (
        (exceptions.AskError, exceptions.ClusterError, exceptions.ClusterCrossSlotError),
        "is a node of a cluster, which is not supported",
        "give the address of a single server",
    ),
)


class ServerLostError(DsakvError):
    """The server does not answer, or not in its protocol, try after try."""


def open_pool(url: str, *, n_blocks: int, block_bytes: int, timeout_s: float) -> RedisPool:
    """The pool at ``redis://[user:password@]host[:port][/db]``; ``rediss://`` checks the server's certificate."""
    help_ = "write redis://host:6379/0; characters such as / ? # @ of a password are percent-encoded"
    try:
        parts = urlsplit(url)
        host, port, db = parts.hostname or "", 6379 if parts.port is None else parts.port, _database(parts)
        host.encode("idna")  # what the resolver would stumble over
    except ValueError:
        # Not chained: what urllib says may quote the password.
        raise InputError("the host, port or database in the URL of the Redis pool cannot be read", help_) from None
    if not host.strip() or not host.isprintable() or not port or parts.query or parts.fragment:
        raise InputError("the URL of the Redis pool names no host, or more than host, port and database", help_)
    tls = parts.scheme == "rediss"
    shown = f"[{host}]" if ":" in host else host
    link: _Link | _TlsLink = (_TlsLink if tls else _Link)(
        host=host,
        port=port,
        db=db,
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        socket_read_size=READ_BYTES,
        protocol=2,
        driver_info=None,
        retry=Retry(NoBackoff(), 0),  # tries are made, and counted, here
    )
    link.deadline = Deadline(timeout_s)
    return RedisPool(link, link.deadline, f"{parts.scheme}://{shown}:{port}/{db}", n_blocks, block_bytes)


class _Link(redis.Connection):
    deadline: Deadline

    def _connect(self) -> Any:
        connect: Callable[[], Any] = super()._connect
        return DeadlineSocket(connect(), self.deadline)


class _TlsLink(redis.SSLConnection):
    deadline: Deadline

    def _connect(self) -> Any:
        connect: Callable[[], Any] = super()._connect
        return DeadlineSocket(connect(), self.deadline)


class RedisPool(CheckedPool):
    """Values are the payload, keys ``dsakv:<random run>:<number>``. Opening asks the server for a PONG.

    A process that is killed leaves its keys: nothing but the server's eviction or a scan for ``dsakv:*`` ends them.
    """

    def __init__(
        self, link: AbstractConnection, deadline: Deadline, name: str, n_blocks: int, block_bytes: int
    ) -> None:
        super().__init__(name, n_blocks, block_bytes)
        self._link, self._deadline = link, deadline
        self._prefix = b"dsakv:%s:" % secrets.token_hex(8).encode()
        self._sent = np.zeros(n_blocks, bool)
        """Blocks whose key may be there."""
        self._commands = max(1, min(PIPELINE_COMMANDS, PIPELINE_BYTES // block_bytes))
        """Blocks of one pipeline."""
        self._exchange([[command(b"PING")]], 0, _expect(b"PONG"))

    def _write(self, numbers: NDArray[np.int64], payload: memoryview) -> None:
        size, done = self.block_bytes, _expect(b"OK")
        self._sent[numbers] = True
        for start, keys in self._pipelines(numbers):
            commands: list[Command] = []
            for row, key in enumerate(keys, start):
                commands.append(set_command(key, payload[row * size : (row + 1) * size]))
            self._exchange(commands, len(keys) * size, done)

    def _read(self, numbers: NDArray[np.int64], payload: memoryview, again: bool = False) -> list[int]:
        if again:
            self._link.disconnect()  # replies may have slipped by one
        size = self.block_bytes
        cut: list[int] = []
        for start, keys in self._pipelines(numbers):

            def keep(i: int, value: object, start: int = start) -> None:
                row = start + i
                if value is None:
                    raise DsakvError(
                        f"{self.name} no longer has block {numbers[row]}",
                        "it restarted without its data or evicts keys: set maxmemory-policy noeviction, then run again",
                    )
                if not isinstance(value, bytes):
                    raise exceptions.InvalidResponse(f"{type(value).__name__} for a value")
                if len(value) == size:
                    payload[row * size : (row + 1) * size] = value
                else:
                    cut.append(row)

            self._exchange([[command(b"GET", key)] for key in keys], len(keys) * size, keep)
        return cut

    def _remove(self) -> None:
        self._deadline.step_s = min(self._deadline.step_s, LAST_WAIT)  # the user may be waiting for the end
        try:
            for _, keys in self._pipelines(np.flatnonzero(self._sent)):
                self._exchange([[command(b"UNLINK", *keys)]], 0, lambda i, reply: None)
        except ServerLostError:
            pass  # nobody is left who could be told
        finally:
            self._link.disconnect()

    def _pipelines(self, numbers: NDArray[np.int64]) -> Iterator[tuple[int, list[bytes]]]:
        """First row and keys of each pipeline."""
        for start in range(0, numbers.size, self._commands):
            part = numbers[start : start + self._commands].tolist()
            yield start, [b"%b%d" % (self._prefix, number) for number in part]

    def _exchange(self, commands: Sequence[Command], payload_bytes: int, take: Callable[[int, object], None]) -> None:
        """Send ``commands``, give each reply to ``take``; after a fault go on from the first that had none."""
        done = 0
        why: Exception | None = None
        for attempt in range(TRIES):
            if attempt:
                time.sleep(self._deadline.step_s / 10 * 2 ** (attempt - 1))
                self.counted.retries += len(commands) - done
            self._deadline.start(self._deadline.step_s + payload_bytes / SLOWEST_BYTES_S)
            try:
                self._link.send_packed_command(joined(commands[done:]))
                while done < len(commands):
                    take(done, self._reply())
                    done += 1
            except BaseException as error:
                self._link.disconnect()  # replies to come belong to commands that nobody waits for any more
                refusal = self._refusal(error)
                if refusal is not None:
                    raise refusal from None
                if not isinstance(error, AGAIN):
                    raise
                why = error
            else:
                return
        raise self._lost(why)

    def _reply(self) -> object:
        try:
            return self._link.read_response(disable_decoding=True)
        except ValueError as error:  # so says the parser in Python of a length that is no number
            raise exceptions.InvalidResponse("length") from error

    def _refusal(self, error: BaseException) -> DsakvError | None:
        """What the server says no to, for good."""
        for kinds, what, hint in REFUSALS:
            if isinstance(error, kinds):
                return DsakvError(f"{self.name} {what}", hint)
        if isinstance(error, exceptions.ResponseError):
            said = _line(error).partition(", with args")[0]  # a server that knows no AUTH repeats the password
            return DsakvError(f"{self.name} says: {said}", "see the server's log and configuration")
        return None

    def _lost(self, why: Exception | None) -> ServerLostError:
        if isinstance(why, exceptions.BusyLoadingError):
            return ServerLostError(f"{self.name} is still loading its data", "run again when it has")
        if isinstance(why, exceptions.InvalidResponse):
            return ServerLostError(
                f"what answers at {self.name} does not keep to Redis' protocol",
                "give the address of a Redis or Valkey server, rediss:// where it wants TLS",
            )
        return ServerLostError(
            f"{self.name} failed {TRIES} times: {_line(why)}",
            "see that it runs and can be reached, then run again; a slow one needs a longer --kv-timeout",
        )


def _database(parts: SplitResult) -> int:
    """Raises ValueError for what is no number."""
    text = parts.path.removeprefix("/")
    if text and not (text.isascii() and text.isdigit()):
        raise ValueError
    return int(text or 0)


def _expect(reply: bytes) -> Callable[[int, object], None]:
    def take(_: int, got: object) -> None:
        if got != reply:
            raise exceptions.InvalidResponse(f"not {reply.decode()}")

    return take


def _line(error: Exception | None) -> str:
    """What an error says, as one line of readable length."""
    text = "".join(c if c.isprintable() else " " for c in str(error))
    return " ".join(text.split())[:200] or type(error).__name__
