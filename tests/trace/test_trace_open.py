from __future__ import annotations

import os
from pathlib import Path

import pytest

from dsakv.errors import InputError
from dsakv.trace.open import find_traces, newest_run


def touch(path: Path, content: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def test_shards_stand_in_numeric_order(tmp_path: Path) -> None:
    for start in (8, 0, 96, 4, 100):
        touch(tmp_path / f"trace_steps_{start}_{start + 4}.jsonl")
    touch(tmp_path / ".trace_steps_104_108.jsonl.tmp")
    touch(tmp_path / "requests.jsonl")
    (trace,) = find_traces(tmp_path)
    assert [path.name.split("_")[2] for path in trace.shards] == ["0", "4", "8", "96", "100"]
    assert trace.run_meta is None


def test_compressed_shards_stand_among_the_others(tmp_path: Path) -> None:
    names = [
        "trace_steps.jsonl.zst",
        "trace_steps_0_4.jsonl.zst",
        "trace_steps_4_8.jsonl",
        "trace_steps_96_100.jsonl.zst",
    ]
    for name in reversed(names):
        touch(tmp_path / name)
    (trace,) = find_traces(tmp_path)
    assert [path.name for path in trace.shards] == names


@pytest.mark.parametrize("stem", ["trace_steps", "trace_steps_0_4"])
def test_a_shard_that_is_there_twice_is_an_error(tmp_path: Path, stem: str) -> None:
    touch(tmp_path / f"{stem}.jsonl")
    touch(tmp_path / f"{stem}.jsonl.zst")
    with pytest.raises(InputError, match=rf"holds one shard twice: {stem}\.jsonl and {stem}\.jsonl\.zst"):
        find_traces(tmp_path)


def test_traces_are_found_from_the_trace_the_run_and_the_directory_of_runs(tmp_path: Path) -> None:
    for name in ("run_a/block64", "run_a/block16", "run_b/block64"):
        touch(tmp_path / name / "trace_steps.jsonl")
        touch(tmp_path / name / "run_meta.json", '{"dataset": "ruler"}')
    names = ["run_a/block16", "run_a/block64", "run_b/block64"]
    assert [trace.path for trace in find_traces(tmp_path)] == [tmp_path / name for name in names]
    assert [trace.path.name for trace in find_traces(tmp_path / "run_a")] == ["block16", "block64"]
    (trace,) = find_traces(tmp_path / "run_b" / "block64")
    assert trace.shards == (tmp_path / "run_b" / "block64" / "trace_steps.jsonl",)
    assert trace.run_meta == {"dataset": "ruler"}


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        find_traces(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no trace in"):
        find_traces(tmp_path)
    shard = touch(tmp_path / "run" / "trace_steps.jsonl")
    with pytest.raises(InputError, match="is a file"):
        find_traces(shard)
    for text, says in (("{", "is not JSON"), ("[]", "holds no JSON object")):
        touch(tmp_path / "run" / "run_meta.json", text)
        with pytest.raises(InputError, match=says):
            find_traces(tmp_path)
    (tmp_path / "run" / "run_meta.json").unlink()
    touch(tmp_path / "run" / "trace_steps_0_4.jsonl.gz")
    with pytest.raises(InputError, match="this trace format cannot be read"):
        find_traces(tmp_path)


def test_shards_of_all_formats_stand_in_numeric_order(tmp_path: Path) -> None:
    for name in ("trace_steps_4_8.parquet", "trace_steps_0_4.jsonl", "trace_steps_100_104.parquet"):
        touch(tmp_path / name)
    (trace,) = find_traces(tmp_path)
    assert [path.name.split("_")[2] for path in trace.shards] == ["0", "4", "100"]
    touch(tmp_path / "trace_steps_4_8.jsonl")
    with pytest.raises(InputError, match=r"holds one shard twice: trace_steps_4_8\.jsonl and trace_steps_4_8\.parquet"):
        find_traces(tmp_path)


def test_the_newest_run_is_the_one_written_to_last(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="to take the newest run from"):
        newest_run(tmp_path / "outputs")
    with pytest.raises(InputError, match="no run in"):
        newest_run(tmp_path)
    for name, time in (("b", 30), ("a", 40), ("c", 20)):
        shard = touch(tmp_path / name / "block64" / "trace_steps_0_4.jsonl")
        os.utime(shard, (time, time))
    touch(tmp_path / "d" / "notes.txt")
    assert newest_run(tmp_path) == tmp_path / "a"
