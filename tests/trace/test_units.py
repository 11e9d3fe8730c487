"""Pieces of Parquet shards: every record once, no request in two of them, the bytes of the file in all."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsakv.analysis.run import analyze_trace
from dsakv.config import AnalyzeConfig, TraceConfig
from dsakv.errors import DsakvError, InputError
from dsakv.trace import parquet_format
from dsakv.trace import selfcheck as sample
from dsakv.trace.formats import shard_paths
from dsakv.trace.intake import Intake
from dsakv.trace.open import find_traces
from dsakv.trace.run_dir import RunDir
from dsakv.trace.units import Unit, read_unit, to_units


def write(path: Path, groups: list[list[Any]], **options: Any) -> Path:
    """A file with the given requests in the rows of each row group."""
    type = pa.string() if any(isinstance(r, str) for group in groups for r in group) else pa.int64()
    schema = pa.schema(
        [("request_id", type), *((name, pa.int64()) for name in ("layer_id", "step_idx", "seq_len_current"))]
    ).append(pa.field("selected_token_pos", pa.list_(pa.int64())))
    step = 0
    with pq.ParquetWriter(path, schema, **options) as writer:
        for group in groups:
            records = []
            for request in group:
                records.append(
                    {
                        "request_id": request,
                        "layer_id": 0,
                        "step_idx": step,
                        "seq_len_current": 99,
                        "selected_token_pos": [step % 9, 50],
                    }
                )
                step += 1
            writer.write_table(pa.Table.from_pylist(records, schema), row_group_size=max(len(records), 1))
    return path


def check(path: Path) -> list[tuple[int, ...] | None]:
    """What every way to cut must hold to; returns the row groups of the units."""
    units = to_units([path])
    assert sum(unit.bytes for unit in units) == path.stat().st_size
    whole = Intake("strict")
    steps = [step for batch in read_unit(Unit(path, 0), whole) for step in batch.step_idx.tolist()]
    found: list[int] = []
    files, bytes = 0, 0
    seen: set[int | str] = set()
    for unit in units:
        intake = Intake("strict")
        found += [step for batch in read_unit(unit, intake) for step in batch.step_idx.tolist()]
        assert not seen & intake.requests
        seen |= intake.requests
        assert intake.counts.bytes == unit.bytes
        files += intake.counts.files
        bytes += intake.counts.bytes
    assert found == steps
    assert seen == whole.requests
    assert (files, bytes) == (1, path.stat().st_size) == (whole.counts.files, whole.counts.bytes)
    return [unit.row_groups for unit in units]


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([[0, 0], [1], [2, 2]], [(0,), (1,), (2,)]),
        ([[0], [0], [1], [1]], [(0, 1), (2, 3)]),
        ([[0], [1], [0], [2]], [(0, 1, 2), (3,)]),
        ([[0, 1], [1, 2], [3]], [(0, 1), (2,)]),
        ([[5], [3], [4]], [(0,), (1,), (2,)]),
        ([[0, 9], [3], [12]], [(0, 1), (2,)]),  # 3 is not in the first, but its statistics do not say so
        ([[0], [1], [0, 1]], [None]),
        ([[0], [], [1]], [(0, 1), (2,)]),
        ([[], [0], [1], []], [(0, 1), (2, 3)]),
        ([["a"], ["b", "b"], ["c"]], [(0,), (1,), (2,)]),
        ([["b"], ["a"], ["b"]], [None]),
        ([[7]], [None]),
        ([[]], [None]),
        ([], [None]),
    ],
)
def test_runs_of_row_groups_that_share_no_request(tmp_path: Path, groups: list[list[Any]], expected: list[Any]) -> None:
    assert check(write(tmp_path / "t.parquet", groups)) == expected


def test_without_statistics_the_file_is_one_unit(tmp_path: Path) -> None:
    assert check(write(tmp_path / "t.parquet", [[0], [1]], write_statistics=["layer_id"])) == [None]


@given(st.lists(st.lists(st.integers(0, 6), max_size=3), max_size=8))
def test_however_requests_lie_nothing_is_split_or_lost(groups: list[list[int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, "t.parquet"), groups)
        cut = check(path)
    runs = [run for run in cut if run is not None]
    assert [group for run in runs for group in run] == (list(range(len(groups))) if runs else [])


def test_a_tracer_that_runs_one_request_after_the_other_begins_a_row_group_with_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_format, "_SMALL", 4)
    options = TraceConfig(format="parquet", requests_per_shard=100)
    run = RunDir.create(tmp_path / "run", "test", sample.BLOCK_SIZE, sample.sample_config(options))
    requests = sample.sample_requests()
    steps = [step for request in requests for step in sample.sample_steps([request])]
    sample.write_sample(run, options, requests, steps)
    (shard,) = shard_paths(run.trace_dir)
    assert len(check(shard)) == sum(request.max_new_tokens > 1 for request in requests)


def test_figures_do_not_depend_on_format_and_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_format, "_SMALL", 4)
    requests = sample.sample_requests()
    steps = [step for request in requests for step in sample.sample_steps([request])]
    results = []
    for options in (TraceConfig(requests_per_shard=3), TraceConfig(requests_per_shard=3, format="parquet")):
        run = RunDir.create(tmp_path / options.format, "test", sample.BLOCK_SIZE, sample.sample_config(options))
        sample.write_sample(run, options, requests, steps)
        (found,) = find_traces(run.path)
        assert len(to_units(found.shards)) == (6 if options.format == "parquet" else 3)
        (result,) = analyze_trace(found, AnalyzeConfig(lru_caps=(3, 4)), lambda done: None)
        for name in ("trace_dir", "run_meta"):
            del result[name]
        del result["input"]["bytes"]
        results.append(result)
    assert results[0] == results[1]


def test_many_small_row_groups_are_taken_together(tmp_path: Path) -> None:
    cut = check(write(tmp_path / "t.parquet", [[request] for request in range(300)]))
    assert [len(run or ()) for run in cut] == [4] * 75


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"t\.parquet: no whole Parquet file"):
        to_units([tmp_path / "t.parquet"])
    with pytest.raises(DsakvError, match=r"cannot read .*gone"):
        to_units([tmp_path / "gone.parquet"])
