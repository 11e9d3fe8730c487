"""Parts counted side by side: whoever counts them, and whoever dies over it, the results are the same bits."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import orjson
import pytest

from dsakv.analysis import work
from dsakv.analysis.part import PartFigures, Task
from dsakv.config import AnalyzeConfig
from dsakv.errors import DsakvError, InputError
from dsakv.trace.units import Unit
from tests.analysis.traces import record, run, write_shard

CONFIG = AnalyzeConfig(block_sizes=(4, 16), lru_caps=(3, 9), policies=("lru", "opt"))
count = work._count


def dies_once(unit: Unit, task: Task) -> PartFigures:
    """Kills its process over the second shard, the first time."""
    mark = unit.path.parent / "died"
    if "_1_" in unit.path.name and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return count(unit, task)


def dies_always(unit: Unit, task: Task) -> PartFigures:
    os.kill(os.getpid(), signal.SIGKILL)
    return count(unit, task)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    rng = np.random.default_rng(8)
    for shard in range(5):
        records = [
            record(shard, layer, step, sorted(rng.choice(60, 7, replace=False).tolist()))
            for step in range(6)
            for layer in range(2)
        ]
        write_shard(tmp_path / f"trace_steps_{shard}_{shard + 1}.jsonl", records)
    return tmp_path


def in_processes(config: AnalyzeConfig) -> AnalyzeConfig:
    return msgspec.structs.replace(config, workers=2)


def test_a_killed_process_costs_time_not_the_result(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = run(trace, CONFIG)
    monkeypatch.setattr(work, "_count", dies_once)
    assert orjson.dumps(run(trace, in_processes(CONFIG))) == orjson.dumps(alone)
    assert (trace / "died").exists()


def test_processes_that_keep_dying_end_the_run(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_count", dies_always)
    with pytest.raises(DsakvError, match="killed 3 times in a row") as caught:
        run(trace, in_processes(CONFIG))
    assert (caught.value.exit_code, "--workers" in caught.value.hint) == (1, True)


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster:
        yield cluster.scheduler_address


@pytest.fixture
def on_cluster(scheduler: str) -> Callable[[AnalyzeConfig], AnalyzeConfig]:
    return lambda config: msgspec.structs.replace(config, scheduler=scheduler)


def test_a_cluster_counts_the_same(
    trace: Path, on_cluster: Callable[[AnalyzeConfig], AnalyzeConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = run(trace, CONFIG)
    assert orjson.dumps(run(trace, on_cluster(CONFIG))) == orjson.dumps(alone)
    monkeypatch.setattr(work, "_count", dies_once)
    assert orjson.dumps(run(trace, on_cluster(CONFIG))) == orjson.dumps(alone)
    assert (trace / "died").exists()


def test_errors_of_a_cluster_s_workers_keep_their_message(
    trace: Path, on_cluster: Callable[[AnalyzeConfig], AnalyzeConfig]
) -> None:
    with (trace / "trace_steps_2_3.jsonl").open("ab") as file:
        file.write(b"{}\n")
    with pytest.raises(InputError, match=r"trace_steps_2_3\.jsonl:13: bad record"):
        run(trace, on_cluster(CONFIG))


def test_no_scheduler_is_no_traceback(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_ANSWER_SECONDS", 1)
    for address in ("tcp://127.0.0.1:9", "nonsense://here"):
        with pytest.raises(DsakvError, match="no Dask scheduler answers") as caught:
            run(trace, msgspec.structs.replace(CONFIG, scheduler=address))
        assert caught.value.exit_code == 1
