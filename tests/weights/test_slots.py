"""Loads that are under way when something ends."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dsakv.weights.arena import Arena
from dsakv.weights.direct import ALIGN, DirectFiles, Extent
from dsakv.weights.slots import Loader, Slot
from dsakv.weights.units import Unit


def test_what_was_never_begun_is_not_waited_for_after_the_end(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * (4 * ALIGN // 256))
    go, begun = threading.Event(), threading.Event()

    def preadv(fd: int, views: list[memoryview], at: int) -> int:
        begun.set()
        assert go.wait(30)
        return os.preadv(fd, views, at)

    files = DirectFiles([path], request=ALIGN, threads=1, direct=False, preadv=preadv)
    loader = Loader(files, torch.device("cpu"))
    units = [Unit("layer", [], [(Extent(0, i * ALIGN, (i + 2) * ALIGN), 0)], 2 * ALIGN, 0, 0) for i in (0, 2)]
    arena = Arena(4 * ALIGN, pin=False)
    slots = [Slot(arena.take(2 * ALIGN), None) for _ in units]
    first, second = (loader.start(unit, slot, None) for unit, slot in zip(units, slots, strict=True))
    with ThreadPoolExecutor(2) as pool:
        assert begun.wait(30)
        closing = pool.submit(loader.close)
        while not second.staged.cancelled():  # comes before anything else of closing
            pass
        go.set()
        closing.result(30)
        assert first.staged.exception() is None
        assert bytes(first.raw.numpy()) == path.read_bytes()[: 2 * ALIGN]
        after = pool.submit(loader.start, units[1], slots[1], None)
        with pytest.raises(RuntimeError, match="after shutdown"):
            after.result(30)
