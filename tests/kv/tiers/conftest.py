"""One server for the tests that leave it as it is, and file pools of both kinds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dsakv.kv.tiers.file_pool import FilePool
from tests.kv.tiers.helpers import SIZE
from tests.kv.tiers.servers import RedisServer


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FilePool]:
    pool = FilePool(str(tmp_path), 64, SIZE, direct=request.param)
    yield pool
    pool.close()
