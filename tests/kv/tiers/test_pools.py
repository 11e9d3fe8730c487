"""What every remote pool does, on each of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsakv.errors import InputError
from dsakv.kv.tiers.checked import CheckedPool
from dsakv.kv.tiers.contract import Counted, RemotePool, open_remote
from dsakv.kv.tiers.file_pool import FilePool
from tests.kv.tiers.servers import RedisServer

Open = Callable[[int, int], CheckedPool]


@pytest.fixture(params=["redis", "direct", "buffered", "one thread"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens a pool of so many blocks of so many bytes."""
    if request.param == "redis":
        url = request.getfixturevalue("redis_server").url

        def from_redis(n_blocks: int, block_bytes: int) -> CheckedPool:
            pool = open_remote(url, n_blocks=n_blocks, block_bytes=block_bytes, timeout_s=10)
            assert isinstance(pool, CheckedPool)
            return pool

        return from_redis
    direct, threads = request.param != "buffered", 1 if request.param == "one thread" else 4
    return lambda n_blocks, block_bytes: FilePool(str(tmp_path), n_blocks, block_bytes, direct=direct, threads=threads)


def blocks_of(seed: int, n: int, block_bytes: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (n, block_bytes), dtype=np.uint8)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    block_bytes=st.sampled_from([1, 7, 1536, 4095, 4096, 4097, 20_000]),
    batches=st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 19), max_size=20, unique=True)), max_size=12),
    seed=st.integers(0, 1000),
)
def test_reads_what_was_put_last(
    opened: Open, block_bytes: int, batches: list[tuple[bool, list[int]]], seed: int
) -> None:
    pool = opened(20, block_bytes)
    kept: dict[int, bytes] = {}
    planned = Counted()
    for i, (is_put, chosen) in enumerate(batches):
        if is_put:
            blocks = blocks_of(seed + i, len(chosen), block_bytes)
            pool.put(np.array(chosen, np.int64), blocks)
            kept.update({number: row.tobytes() for number, row in zip(chosen, blocks, strict=True)})
            planned.writes += bool(chosen)
            planned.write_ops += len(chosen)
            planned.bytes_written += len(chosen) * block_bytes
        else:
            known = [number for number in chosen if number in kept]
            known += known[:2]  # a block may be read twice in a batch
            out = np.empty((len(known), block_bytes), np.uint8)
            pool.get(np.array(known, np.int64), out)
            assert [row.tobytes() for row in out] == [kept[number] for number in known]
            planned.reads += bool(known)
            planned.read_ops += len(known)
            planned.bytes_read += len(known) * block_bytes
    assert pool.counted == planned
    pool.close()


@pytest.mark.parametrize(("n", "block_bytes"), [(3000, 1), (1500, 1536), (40, 300_001), (2, 5 << 20)])
def test_many_and_large_blocks(opened: Open, n: int, block_bytes: int) -> None:
    pool = opened(2 * n, block_bytes)
    blocks = blocks_of(n, n, block_bytes)
    numbers = np.random.default_rng(n).permutation(2 * n)[:n]
    pool.put(numbers, blocks)
    order = np.random.default_rng(1).permutation(n)
    out = np.zeros_like(blocks)
    pool.get(numbers[order], out)
    assert np.array_equal(out, blocks[order])
    assert pool.counted == Counted(n, n * block_bytes, 1, n, n * block_bytes, 1)
    pool.close()


def test_blocks_of_an_array_that_is_read_only_can_be_put(opened: Open) -> None:
    pool = opened(4, 100)
    blocks = blocks_of(0, 4, 100)
    blocks.flags.writeable = False
    pool.put(np.arange(4), blocks)
    out = np.empty_like(blocks)
    pool.get(np.arange(4), out)
    assert np.array_equal(out, blocks)
    with pytest.raises(ValueError, match="read-only"):
        pool.get(np.arange(4), blocks)
    pool.close()


def test_what_only_a_bug_asks_for(opened: Open) -> None:
    pool = opened(4, 8)
    one, row = np.array([1]), np.zeros((1, 8), np.uint8)
    with pytest.raises(KeyError, match="block 1 was never put"):
        pool.get(one, row)
    for number in (-1, 4):
        with pytest.raises(ValueError, match="from 0 to 3"):
            pool.put(np.array([number]), row)
    with pytest.raises(ValueError, match="twice in one batch"):
        pool.put(np.array([1, 1]), np.zeros((2, 8), np.uint8))
    with pytest.raises(ValueError, match="int64"):
        pool.put(one.astype(np.int32), row)
    with pytest.raises(ValueError, match=r"uint8 \[1, 8\]"):
        pool.put(one, np.zeros((2, 8), np.uint8))
    with pytest.raises(ValueError, match="C-contiguous"):
        pool.put(np.arange(2), np.zeros((8, 2), np.uint8).T)
    assert pool.counted == Counted()
    pool.close()
    pool.close()
    with pytest.raises(ValueError, match="closed"):
        pool.put(one, row)


@pytest.mark.parametrize("url", ["nats://host/x", "redis:host", "/tmp", "", "://x", "s3cret"])
def test_urls_of_no_pool(url: str) -> None:
    with pytest.raises(InputError, match="no scheme that is known") as caught:
        open_remote(url, n_blocks=1, block_bytes=1, timeout_s=1)
    assert "redis://" in caught.value.hint
    assert "s3cret" not in caught.value.message + caught.value.hint


def test_sizes_of_no_pool() -> None:
    for n_blocks, block_bytes, timeout_s in ((0, 1, 1.0), (1, 0, 1.0), (1, 1, 0.0), (1, 1, float("nan"))):
        with pytest.raises(ValueError, match="a pool of"):
            open_remote("file:///tmp", n_blocks=n_blocks, block_bytes=block_bytes, timeout_s=timeout_s)


def test_pools_fulfil_the_contract(redis_server: RedisServer, tmp_path: Path) -> None:
    pools: list[RemotePool] = [
        open_remote(url, n_blocks=1, block_bytes=1, timeout_s=10) for url in (redis_server.url, tmp_path.as_uri())
    ]
    assert [type(pool).__name__ for pool in pools] == ["RedisPool", "FilePool"]
    for pool in pools:
        pool.close()


def test_only_a_redis_url_imports_redis(tmp_path: Path) -> None:
    program = (
        "import sys; from dsakv.kv.tiers.contract import open_remote;"
        "open_remote(sys.argv[1], n_blocks=1, block_bytes=1, timeout_s=1).close();"
        "sys.exit('redis' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path.as_uri()], check=True)
