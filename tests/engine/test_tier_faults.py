"""A remote pool that fails under a running model: an error, and no token that a healthy run would not have given."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsakv.engine.engine import Engine
from dsakv.engine.options import EngineOptions
from dsakv.errors import DsakvError
from dsakv.kv.options import Amount, TierOptions
from dsakv.models.contracts import Model
from dsakv.request import Request, Step
from tests.kv.tiers.servers import Fault, RedisServer, proxy

REQUESTS = [Request(i, [(7 * i + 3 * j) % 256 for j in range(60)], 12) for i in range(3)]
PLAIN = EngineOptions(batch_size=2, block_size=4, prefill_chunk=32)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def expected(model: Model) -> list[list[tuple[int, int]]]:
    """New tokens step by step of a run without tiers."""
    return [step.new_tokens for step in Engine(model, PLAIN).run(REQUESTS)]


def engine(model: Model, url: str, local: str | None = None, timeout_s: float = 10) -> Engine:
    tiers = TierOptions(
        Amount.parse("2", ""), local=Amount.parse(local, "") if local else None, remote=url, timeout_s=timeout_s
    )
    return Engine(model, replace(PLAIN, tiers=tiers))


def run_until(steps: Iterator[Step], fault: Callable[[], None], after: int = 6) -> tuple[list[Any], DsakvError | None]:
    """New tokens up to the error that ``fault``, made after some steps, leads to."""
    tokens = []
    try:
        for i, step in enumerate(steps):
            tokens.append(step.new_tokens)
            if i == after:
                fault()
    except DsakvError as error:
        return tokens, error
    return tokens, None


@contextmanager
def own_server(directory: Path) -> Iterator[RedisServer]:
    server = RedisServer(directory)
    try:
        yield server
    finally:
        with suppress(ValueError):
            server.kill()


@pytest.mark.parametrize("local", [None, "3"])
def test_what_redis_served_is_what_was_counted(model: Model, server: RedisServer, expected: Any, local: str) -> None:
    tiered = engine(model, server.url, local)
    tiers = tiered.tiers(REQUESTS)
    assert tiers is not None
    total: Counter[str] = Counter()
    with server.client() as client:
        client.config_resetstat()
        for step, tokens in zip(tiered.run(REQUESTS), expected, strict=True):
            assert step.new_tokens == tokens
            for (_, tier), traffic in step.traffic.items():
                if tier == "remote_pool":
                    total.update(get=traffic.read_ops, set=traffic.write_ops)
                    total.update(read=traffic.bytes_read, written=traffic.bytes_written)
            if step.index == 9:
                assert {client.strlen(key) for key in client.scan_iter("dsakv:*")} == {tiers.block_bytes}
        stats: Any = client.info("commandstats")
        assert not client.dbsize()
    assert total["get"] == stats["cmdstat_get"]["calls"] > 0
    assert total["set"] == stats["cmdstat_set"]["calls"] > 0
    assert total["read"] == total["get"] * tiers.block_bytes
    assert total["written"] == total["set"] * tiers.block_bytes


@pytest.mark.parametrize("fault", ["killed", "restarted", "flushed", "flipped", "cut"])
def test_no_wrong_token(model: Model, expected: Any, tmp_path: Path, fault: str) -> None:
    with own_server(tmp_path) as server, server.client() as client:

        def spoil() -> None:
            if fault == "killed":
                server.kill()
            elif fault == "restarted":
                server.restart()
            elif fault == "flushed":
                client.flushall()
            else:
                for key in client.scan_iter("dsakv:*"):
                    value = bytearray(client.get(key) or b"")  # type: ignore[arg-type]
                    value[len(value) // 2] ^= 4
                    client.set(key, bytes(value if fault == "flipped" else value[:-1]))

        tokens, error = run_until(engine(model, server.url).run(REQUESTS), spoil)
        assert error is not None
        assert server.url.split("/")[2] in error.message
        assert tokens == expected[: len(tokens)]
        assert len(tokens) < len(expected)


@pytest.mark.parametrize("end", ["reset", "close"])
def test_a_connection_that_breaks_once_is_mended(model: Model, server: RedisServer, expected: Any, end: str) -> None:
    with proxy(server.port, Fault(after=30_000, end=end)) as between:
        tokens, error = run_until(engine(model, between.url).run(REQUESTS), lambda: None)
        assert between.accepted == 2
    assert error is None
    assert tokens == expected


def test_a_disk_that_fills_up(model: Model, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    steps = engine(model, f"file://{tmp_path}").run(REQUESTS)
    tokens, error = run_until(steps, lambda: monkeypatch.setattr(os, "pwritev", full), after=3)
    assert error is not None
    assert str(tmp_path) in error.message
    assert tokens == expected[: len(tokens)]
