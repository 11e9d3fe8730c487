from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsakv.hub.client import Hub
from tests.hub.server import Server, serving


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither tokens, caches and proxies of the machine nor its dsakv variables."""
    for name in os.environ:
        if name.startswith(("DSAKV_", "HF_", "HUGGINGFACE_")) or name.lower().endswith("_proxy") or name == "LIMIT":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def hub(server: Server, tmp_path: Path) -> Hub:
    """The server, a cache of its own, and no patience."""
    return Hub(server.address, tmp_path / "cache", waits=(0.0,))
