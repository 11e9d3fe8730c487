"""The run's folder: refusals that leave nothing behind, and interrupted runs that end as if they had not been."""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsakv.config import Config, EngineConfig, TraceConfig
from dsakv.errors import DsakvError, InputError
from dsakv.trace import selfcheck as sample
from dsakv.trace.files import locked
from dsakv.trace.run_dir import RunDir
from dsakv.trace.summary import summarize
from dsakv.trace.validate import validate
from dsakv.trace.writer import TraceWriter

OPTIONS = TraceConfig(requests_per_shard=2)
CONFIG = sample.sample_config(OPTIONS)
REQUESTS = sample.sample_requests()


def trace(run: RunDir) -> RunDir:
    unfinished = [request for request in REQUESTS if request.request_id not in run.finished]
    sample.write_sample(run, OPTIONS, REQUESTS, sample.sample_steps(unfinished))
    return run


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(run: RunDir) -> tuple[dict[int, list[Any]], dict[int, Any], Any]:
    """Records and log by request, without what depends on the requests that ran beside it, and the summary."""
    records: dict[int, list[Any]] = defaultdict(list)
    for shard in run.trace_dir.glob("trace_steps_*.jsonl"):
        for record in lines(shard):
            del record["engine_step"]
            for tier in record["kv_fetch"].values():
                del tier["batch_size"]
            records[record["request_id"]].append((shard.name, record))
    log = lines(run.requests_path)
    summary = json.loads((run.trace_dir / "summary.json").read_text())
    summary["kv_tiers"] = {"records": summary["kv_tiers"]["records"]}  # what moved depends on the steps run
    assert len({entry["request_id"] for entry in log}) == len(log)
    return records, {entry["request_id"]: entry for entry in log}, summary


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return trace(RunDir.create(tmp_path_factory.mktemp("whole"), "test", sample.BLOCK_SIZE, CONFIG))


def copy(run: RunDir, path: Path) -> RunDir:
    other = RunDir(path, run.block_size)
    other.trace_dir.mkdir(parents=True)
    for file in (*run.path.iterdir(), *run.trace_dir.iterdir()):
        if file.is_file():
            (path / file.relative_to(run.path)).write_bytes(file.read_bytes())
    return other


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_killed_run_ends_like_one_that_was_not(
    whole: RunDir, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Every file may end anywhere: also the log after records that are lost, as after a power failure."""
    path = tmp_path_factory.mktemp("killed") / "run"
    run = copy(whole, path)
    (run.trace_dir / "summary.json").unlink()
    for file in (run.requests_path, *sorted(run.trace_dir.glob("trace_steps_*.jsonl"))):
        size = file.stat().st_size
        keep = data.draw(st.one_of(st.just(size), st.just(0), st.integers(0, size)))
        file.write_bytes(file.read_bytes()[:keep])
        if keep == 0 and data.draw(st.booleans()):
            file.unlink()
    (run.trace_dir / ".summary.json.1.dsakv-tmp").write_bytes(b"{")

    resumed = RunDir.resume(path, sample.BLOCK_SIZE, CONFIG)
    assert not list(run.trace_dir.glob(".*"))
    again = RunDir.resume(path, sample.BLOCK_SIZE, CONFIG)
    assert again == resumed  # nothing is left to repair
    trace(resumed)
    assert contents(resumed) == contents(whole)
    validate(resumed.trace_dir)
    assert summarize(resumed.trace_dir) == contents(whole)[2]


def test_engine_steps_are_numbered_on(whole: RunDir, tmp_path: Path) -> None:
    run = copy(whole, tmp_path / "run")
    (run.trace_dir / "trace_steps_4_6.jsonl").unlink()
    resumed = RunDir.resume(run.path, sample.BLOCK_SIZE, CONFIG)
    assert resumed.finished == {0, 1, 2, 3, 6}
    kept = {r["engine_step"] for r in lines(run.trace_dir / "trace_steps_2_4.jsonl")}
    assert resumed.engine_steps > max(kept)
    trace(resumed)
    kv_tiers = json.loads((run.trace_dir / "summary.json").read_text())["kv_tiers"]
    assert kv_tiers["transfers"]["since_resume"] is True
    validate(run.trace_dir)
    new = [r["engine_step"] for r in lines(run.trace_dir / "trace_steps_4_6.jsonl")]
    assert min(new) >= resumed.engine_steps


def test_a_complete_run_is_left_as_it_is(whole: RunDir, tmp_path: Path) -> None:
    run = copy(whole, tmp_path / "run")
    shards = {path: path.stat().st_ino for path in (run.requests_path, *run.trace_dir.glob("trace_steps_*"))}
    resumed = RunDir.resume(run.path, sample.BLOCK_SIZE, CONFIG)
    assert resumed.finished == {request.request_id for request in REQUESTS}
    assert {path: path.stat().st_ino for path in shards} == shards
    trace(resumed)
    assert contents(resumed) == contents(whole)


def test_a_folder_that_holds_a_run_is_refused(whole: RunDir, tmp_path: Path) -> None:
    with pytest.raises(DsakvError, match="holds a run already") as error:
        RunDir.create(whole.path, "test", sample.BLOCK_SIZE, CONFIG)
    assert error.value.exit_code == 1
    assert "--resume" in error.value.hint
    assert "--trace-out" in error.value.hint
    only_shards = tmp_path / "run" / "block16"
    only_shards.mkdir(parents=True)
    (only_shards / "trace_steps_0_4.jsonl").touch()
    with pytest.raises(DsakvError, match="holds a run already"):
        RunDir.create(tmp_path / "run", "test", 64, CONFIG)


def test_a_folder_with_other_things_is_taken(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    run = RunDir.create(tmp_path, "test", 32, CONFIG)
    assert run.trace_dir == tmp_path / "block32"
    assert (tmp_path / "config.json").read_bytes() == CONFIG


def test_a_folder_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DsakvError, match=r"cannot write .*file") as error:
        RunDir.create(tmp_path / "file", "test", 64, CONFIG)
    assert error.value.exit_code == 1
    with pytest.raises(DsakvError, match=r"cannot write .*file/run"):
        RunDir.create(tmp_path / "file" / "run", "test", 64, CONFIG)
    with pytest.raises(DsakvError, match="cannot write"):
        RunDir.create("/proc/run", "test", 64, CONFIG)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f".config.json.{os.getpid()}.dsakv-tmp").symlink_to("/dev/full")
    with pytest.raises(DsakvError, match="the disk is full"):
        RunDir.create(tmp_path / "run", "test", 64, CONFIG)
    assert not list((tmp_path / "run").iterdir())


def test_the_default_folder_is_named_after_workload_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [RunDir.create(None, "ruler", 64, CONFIG) for _ in range(3)]
    assert len({run.path for run in runs}) == 3
    assert all(run.path.match("outputs/ruler_????????T??????*") for run in runs)


def test_another_configuration_names_the_keys(whole: RunDir, tmp_path: Path) -> None:
    run = copy(whole, tmp_path / "run")
    other = Config(
        trace=TraceConfig(requests_per_shard=2, resume=True, out=str(run.path), sample_rate=0.5),
        engine=EngineConfig(kv_block_size=sample.BLOCK_SIZE, batch_size=sample.BATCH_SIZE, seed=7),
    )
    with pytest.raises(InputError, match=r"another configuration: engine\.seed, trace\.sample_rate$"):
        RunDir.resume(run.path, sample.BLOCK_SIZE, msgspec.json.encode(other))
    same = TraceConfig(requests_per_shard=2, resume=True, out=str(run.path))
    assert RunDir.resume(run.path, sample.BLOCK_SIZE, sample.sample_config(same)).finished


def test_what_cannot_be_resumed(whole: RunDir, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not know which run"):
        RunDir.resume(None, 64, CONFIG)
    with pytest.raises(InputError, match="holds no run to go on with"):
        RunDir.resume(tmp_path / "missing", 64, CONFIG)
    config = sample.sample_config(TraceConfig(store_token_pos=False))
    RunDir.create(tmp_path / "bare", "test", 64, config)
    with pytest.raises(InputError, match="keeps no positions"):
        RunDir.resume(tmp_path / "bare", 64, config)
    run = copy(whole, tmp_path / "run")
    run.requests_path.write_bytes(b"\0\0\0\n" + run.requests_path.read_bytes())
    with pytest.raises(InputError, match=r"requests\.jsonl:1: the line is damaged"):
        RunDir.resume(run.path, sample.BLOCK_SIZE, CONFIG)


def test_run_meta_is_written_once(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", "test", 64, CONFIG)
    model = {"name": "tiny", "layers": 2}
    for seed in (1, 2):
        run.write_meta(dataset="ruler", model=model, seed=seed, options=OPTIONS, inputs={"kept": 1})
    meta = json.loads((run.trace_dir / "run_meta.json").read_bytes())
    created, version = meta.pop("created"), meta.pop("dsakv_version")
    assert created
    assert version
    assert meta == {
        "schema_version": 1,
        "dataset": "ruler",
        "model": model,
        "block_size_tokens": 64,
        "rank": 0,
        "world_size": 1,
        "seed": 1,
        "trace": msgspec.to_builtins(OPTIONS),
        "inputs": {"kept": 1},
    }


def test_a_run_is_written_by_one_process_at_a_time(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", "test", 64, CONFIG)
    with locked(run.path), pytest.raises(DsakvError, match="another process is writing"):
        RunDir.resume(run.path, 64, CONFIG)
    with (
        locked(run.path),
        pytest.raises(DsakvError, match="another process is writing"),
        TraceWriter(run, TraceConfig(), seed=0, requests=[], prefix={}, inputs={}),
    ):
        pass
    assert not run.requests_path.exists()
    RunDir.resume(run.path, 64, CONFIG)


def test_what_has_no_part_in_a_trace_may_differ(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", "test", 64, CONFIG)
    other = json.loads(CONFIG)
    other["analyze"] = {"workers": 9}
    RunDir.check_resumable(run.path, json.dumps(other).encode())


def test_asking_whether_a_run_can_go_on_changes_nothing(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", "test", 64, CONFIG)
    (run.trace_dir / "summary.json").write_text("{}")
    assert RunDir.check_resumable(run.path, CONFIG) == run.path
    assert (run.trace_dir / "summary.json").exists()


def test_a_run_goes_on_only_with_the_model_and_the_data_it_began_with(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", "test", 64, CONFIG)
    facts: dict[str, Any] = {"dataset": "test", "model": {"name": "a"}, "inputs": {"kept": 1}}
    run.write_meta(seed=0, options=OPTIONS, **facts)
    RunDir.check_resumable(run.path, CONFIG, **facts)
    for name in facts:
        with pytest.raises(InputError, match=f"has another {name}"):
            RunDir.resume(run.path, 64, CONFIG, **facts | {name: {"name": "b"}})
