"""Copies that are timed are made."""

from __future__ import annotations

import pytest
import torch

from dsakv.kv import copy_bench
from dsakv.kv.copy_bench import CopyBench


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_bench, "COPIED", 1 << 16)


def test_within_host_memory() -> None:
    bench = CopyBench(torch.device("cpu"))
    bench._host[0].fill_(7)
    assert [kind.name for kind in bench.kinds] == ["host_to_host"]
    done: list[int] = []
    bench.round(done.append, keep=False)
    assert done == bench.kinds[0].us == []
    assert all(bool((one == 7).all()) for one in bench._host)
    for _ in range(3):
        bench.round(done.append)
    assert done == [1, 1, 1]
    bench.kinds[0].us[:] = [30.0, 10.0, 20.0]
    assert bench.speeds().host_to_host == (1 << 16) / 20 / 1e3
    assert bench.speeds().host_to_device is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_to_a_device_and_back() -> None:
    bench = CopyBench(torch.device("cuda"))
    assert all(one.is_pinned() for one in bench._host)
    bench._host[0].fill_(7)
    by_name = {kind.name: kind for kind in bench.kinds}
    assert by_name["host_to_device"].once() > 0
    assert by_name["device_to_host"].once() > 0
    assert bool((bench._host[1] == 7).all())
    bench.round()
    assert min(bench.speeds().host_to_device or 0, bench.speeds().device_to_host or 0) > 0
