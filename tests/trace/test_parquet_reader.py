"""The Parquet reader against the reader of JSON lines, on files of our own, of others, and damaged ones."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsakv.config import TraceConfig
from dsakv.errors import DsakvError, InputError
from dsakv.trace import selfcheck as sample
from dsakv.trace.batch import TraceBatch
from dsakv.trace.formats import shard_paths
from dsakv.trace.intake import Intake, ReadCounts
from dsakv.trace.jsonl_reader import read_jsonl
from dsakv.trace.parquet_reader import BATCH_RECORDS, read_parquet
from dsakv.trace.run_dir import RunDir

GOOD: dict[str, Any] = {
    "event": "dsa_topk",
    "request_id": 0,
    "layer_id": 0,
    "step_idx": 0,
    "seq_len_current": 10,
    "selected_token_pos": [1, 4, 9],
}
Rows = list[tuple[int, int, int, int, list[int]]]


def rows(batches: Sequence[TraceBatch]) -> Rows:
    return [
        (
            int(b.request_id[r]),
            int(b.layer_id[r]),
            int(b.step_idx[r]),
            int(b.seq_len[r]),
            b.positions[b.offsets[r] : b.offsets[r + 1]].tolist(),
        )
        for b in batches
        for r in range(len(b))
    ]


def write(path: Path, records: list[dict[str, Any]], **types: pa.DataType) -> Path:
    table = pa.Table.from_pylist(records)
    for name, type in types.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, pa.array([record[name] for record in records], type=type))
    pq.write_table(table, path, row_group_size=7)
    return path


def read(path: Path, **options: Any) -> tuple[Rows, Intake]:
    intake = Intake(options.pop("on_error", "strict"), **options)
    return rows(list(read_parquet(path, None, intake))), intake


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    """The same run in both formats."""
    requests = sample.sample_requests()
    runs = {}
    for name in ("jsonl", "parquet"):
        options = TraceConfig(format=name, requests_per_shard=2, prefill_tail=2)
        run = RunDir.create(
            tmp_path_factory.mktemp(name) / "run", "test", sample.BLOCK_SIZE, sample.sample_config(options)
        )
        sample.write_sample(run, options, requests, sample.sample_steps(requests, 2))
        runs[name] = run
    return runs


def test_a_traced_run_reads_the_same_in_both_formats(traced: dict[str, RunDir]) -> None:
    options = {"request_order": True, "block_sizes": True, "engine_steps": True}
    lines, columns = Intake("strict", **options), Intake("strict", **options)
    for a, b in zip(*(shard_paths(traced[name].trace_dir) for name in ("jsonl", "parquet")), strict=True):
        expected, found = list(read_jsonl(a, lines)), list(read_parquet(b, None, columns))
        assert rows(found) == rows(expected)
        for name in ("request_id", "layer_id", "step_idx", "seq_len", "offsets", "positions", "engine_step"):
            wanted, given = getattr(expected[0], name), getattr(found[0], name)
            assert given.dtype == wanted.dtype
            assert np.array_equal(given, wanted)
    assert columns.counts.accepted == lines.counts.accepted > 0
    assert columns.counts.block_sizes == lines.counts.block_sizes == {sample.BLOCK_SIZE}
    assert columns.counts.files == 4
    assert columns.counts.bytes == sum(p.stat().st_size for p in shard_paths(traced["parquet"].trace_dir))
    assert columns.requests == lines.requests


def test_batches_are_bounded(tmp_path: Path) -> None:
    steps = [{**GOOD, "step_idx": step} for step in range(2 * BATCH_RECORDS + 1)]
    pq.write_table(pa.Table.from_pylist(steps), tmp_path / "t.parquet")
    batches = list(read_parquet(tmp_path / "t.parquet", None, Intake("strict")))
    assert [len(batch) for batch in batches] == [BATCH_RECORDS, BATCH_RECORDS, 1]
    assert [row[2] for row in rows(batches)] == list(range(len(steps)))


# The same rules as for JSON lines

BIG = [0, 1, 5, 9, 10, -1, -7, 2**31 - 1, 2**31, 2**31 - 1, -(2**31) - 1, 2**53, -(2**53) - 1, 2**63 - 1]
SMALL = st.integers(0, 3)
ODD = st.one_of(SMALL, SMALL, SMALL, SMALL, st.sampled_from(BIG), st.none())
POSITIONS = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 9), st.sampled_from(BIG)), max_size=5, unique=True)


@st.composite
def some_records(draw: st.DrawFn) -> list[dict[str, Any]]:
    names = draw(st.booleans())
    records = []
    for _ in range(draw(st.integers(1, 20))):
        record = {
            "request_id": draw(st.sampled_from(["a", "b", None] if names else [0, 1, 0, 1, None, 2**62])),
            "layer_id": draw(ODD),
            "step_idx": draw(ODD),
            "seq_len_current": draw(st.one_of(st.just(10), st.just(10), ODD)),
            "selected_token_pos": draw(st.one_of(POSITIONS, POSITIONS.map(sorted), st.lists(ODD, max_size=4))),
            "event": draw(st.sampled_from(["dsa_topk", "dsa_topk", "dsa_topk", "dsa", None])),
            "block_size_tokens": draw(st.sampled_from([16, 16, 16, 32, 0, None, 2**31])),
            "engine_step": draw(st.one_of(SMALL, SMALL, SMALL, ODD)),
        }
        records.append(record)
    return records


SCHEMA = {
    "layer_id": pa.int64(),
    "step_idx": pa.int64(),
    "seq_len_current": pa.int64(),
    "selected_token_pos": pa.list_(pa.int64()),
    "event": pa.string(),
    "block_size_tokens": pa.int64(),
    "engine_step": pa.int64(),
}


@settings(max_examples=150)
@given(
    records=some_records(),
    block_sizes=st.booleans(),
    engine_steps=st.booleans(),
    request_order=st.booleans(),
    large=st.booleans(),
)
def test_the_readers_agree_on_every_record(
    records: list[dict[str, Any]], block_sizes: bool, engine_steps: bool, request_order: bool, large: bool
) -> None:
    options = {"block_sizes": block_sizes, "engine_steps": engine_steps, "request_order": request_order}
    optional = ("event", "block_size_tokens", "engine_step")
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "t.jsonl")
        lines.write_text(
            "".join(
                json.dumps({k: v for k, v in record.items() if v is not None or k not in optional}) + "\n"
                for record in records
            )
        )
        ids = pa.string() if any(type(record["request_id"]) is str for record in records) else pa.int64()
        schema = {**SCHEMA, "request_id": ids}
        if large:
            schema["selected_token_pos"] = pa.large_list(pa.int64())
        table = pa.table({name: pa.array([r[name] for r in records], type=type) for name, type in schema.items()})
        columns = Path(folder, "t.parquet")
        pq.write_table(table, columns, row_group_size=3)
        outcomes = []
        for path, reader in ((lines, read_jsonl), (columns, lambda p, i: read_parquet(p, None, i))):
            intake = Intake("skip", **options)
            found = [*reader(path, intake)]
            engine = [int(step) for batch in found if batch.engine_step is not None for step in batch.engine_step]
            counts = intake.counts
            counts.bytes = 0
            for rejected in counts.rejected.values():
                rejected.places = [place.replace("parquet", "jsonl") for place in rejected.places]
            try:
                list(reader(path, Intake("strict", **options)))
                says = ""
            except InputError as error:
                says = error.message.replace(str(path), "")
            outcomes.append((rows(found), engine, counts, intake.requests, says))
        assert outcomes[0] == outcomes[1]


# Files of others


def foreign(path: Path, how: str, records: list[dict[str, Any]]) -> Path:
    if how == "pandas":
        pd.DataFrame(records).to_parquet(path)
    elif how == "polars":
        pl.DataFrame(records).with_columns(pl.col("event").cast(pl.Categorical)).write_parquet(path)
    elif how == "duckdb":
        duckdb.from_arrow(pa.Table.from_pylist(records)).write_parquet(str(path))
    elif how == "large_list":
        write(path, records, selected_token_pos=pa.large_list(pa.int64()), request_id=pa.uint64())
    elif how == "fixed_size_list":
        write(path, records, selected_token_pos=pa.list_(pa.int16(), 3), layer_id=pa.uint8(), step_idx=pa.int16())
    elif how == "unsigned":
        write(path, records, selected_token_pos=pa.list_(pa.uint32()), seq_len_current=pa.uint32())
    elif how == "list_view":
        write(path, records, selected_token_pos=pa.list_view(pa.uint64()))
    elif how == "dictionary":
        table = pa.Table.from_pylist(records)
        for name in ("request_id", "event"):
            table = table.set_column(table.schema.get_field_index(name), name, table[name].dictionary_encode())
        pq.write_table(table, path)
    return path


@pytest.mark.parametrize("strings", [False, True])
@pytest.mark.parametrize(
    "how", ["pandas", "polars", "duckdb", "large_list", "fixed_size_list", "unsigned", "list_view", "dictionary"]
)
def test_files_of_other_writers_are_read(tmp_path: Path, how: str, strings: bool) -> None:
    if strings and how == "large_list":
        how = "polars"
    records = [
        {**GOOD, "request_id": f"r{i % 2}" if strings else i % 2, "step_idx": i // 2, "selected_token_pos": [9, 0, 4]}
        for i in range(20)
    ]
    found, intake = read(foreign(tmp_path / "t.parquet", how, records))
    assert found == [(i % 2, 0, i // 2, 10, [0, 4, 9]) for i in range(20)]
    assert intake.requests == ({"r0", "r1"} if strings else {0, 1})


@pytest.mark.parametrize("item", [pa.int8(), pa.uint8(), pa.uint16(), pa.int32(), pa.uint32(), pa.int64(), pa.uint64()])
def test_a_null_is_never_a_position(tmp_path: Path, item: pa.DataType) -> None:
    record = {**GOOD, "seq_len_current": 2**31 - 1, "selected_token_pos": [1, None, 9]}
    path = write(tmp_path / "t.parquet", [record], selected_token_pos=pa.list_(item))
    with pytest.raises(InputError, match=r't\.parquet:1: bad record: "selected_token_pos" holds null, not an integer'):
        read(path)


def test_our_files_are_read_by_others(traced: dict[str, RunDir]) -> None:
    for a, b in zip(*(shard_paths(traced[name].trace_dir) for name in ("jsonl", "parquet")), strict=True):
        lines = [json.loads(line) for line in a.read_text().splitlines()]
        wanted = [
            (r["request_id"], r["kv_fetch"]["hbm"]["latency_us"], r["prefix"]["prefix_key"], r["selected_token_pos"])
            for r in lines
        ]
        frame = pd.read_parquet(b)
        assert wanted == [
            (q, f["hbm"]["latency_us"], p["prefix_key"], s.tolist())
            for q, f, p, s in zip(
                frame["request_id"], frame["kv_fetch"], frame["prefix"], frame["selected_token_pos"], strict=True
            )
        ]
        table = pl.read_parquet(b)
        assert wanted == [
            (q, f["hbm"]["latency_us"], p["prefix_key"], s)
            for q, f, p, s in table.select("request_id", "kv_fetch", "prefix", "selected_token_pos").iter_rows()
        ]
        query = "select request_id, kv_fetch.hbm.latency_us, prefix.prefix_key, selected_token_pos from read_parquet(?)"
        assert wanted == duckdb.execute(query, [str(b)]).fetchall()
        assert [r["scores_stats"]["max"] for r in lines] == pytest.approx(
            [r["scores_stats"]["max"] for r in table.to_dicts()]
        )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        *[
            ((lambda t, name=name: t.drop_columns([name])), f'"{name}" is missing')
            for name in ("request_id", "layer_id", "step_idx", "seq_len_current")
        ],
        *[
            ((lambda t, name=name: cast(t, name, pa.float64())), f'"{name}" is a column of double')
            for name in ("request_id", "layer_id", "step_idx", "seq_len_current", "event")
        ],
        (lambda t: cast(t, "layer_id", pa.bool_()), '"layer_id" is a column of bool'),
        (lambda t: cast(t, "layer_id", pa.string()), '"layer_id" is a column of string'),
        (lambda t: cast(t, "selected_token_pos", pa.list_(pa.float32())), "not of lists of integers"),
        (lambda t: cast(t, "selected_token_pos", pa.int64()), '"selected_token_pos" is a column of int64'),
    ],
)
def test_columns_that_cannot_be_are_refused(tmp_path: Path, change: Callable[[pa.Table], pa.Table], says: str) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(change(pa.Table.from_pylist([GOOD])), path)
    for on_error in ("strict", "skip"):
        with pytest.raises(InputError) as caught:
            read(path, on_error=on_error)
        assert caught.value.message.startswith(f"{path}: ")
        assert says in caught.value.message


def cast(table: pa.Table, name: str, type: pa.DataType) -> pa.Table:
    value = [[1, 2]] if pa.types.is_list(type) else [1]
    at = table.schema.get_field_index(name)
    return table.set_column(at, name, pa.array(value).cast(type))


def test_files_with_other_columns_make_one_trace(tmp_path: Path) -> None:
    intake = Intake("strict", block_sizes=True)
    first = write(tmp_path / "a.parquet", [{**GOOD, "block_size_tokens": 16, "note": "x"}])
    second = write(tmp_path / "b.parquet", [{"step_idx": 1, **{k: GOOD[k] for k in GOOD if k not in ("step_idx",)}}])
    third = write(tmp_path / "c.parquet", [{k: v for k, v in GOOD.items() if k != "selected_token_pos"}] * 1)
    found = [row for path in (first, second) for row in rows(list(read_parquet(path, None, intake)))]
    assert [row[2] for row in found] == [0, 1]
    assert intake.counts.block_sizes == {16}
    found, other = read(third)
    assert found == []
    assert other.counts == ReadCounts(files=1, bytes=third.stat().st_size, without_positions=1)


def test_an_engine_step_that_is_asked_for_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match='"engine_step" is missing'):
        read(write(tmp_path / "t.parquet", [GOOD]), engine_steps=True)


def test_a_file_without_rows_holds_no_records(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD]).slice(0, 0), path)
    found, intake = read(path)
    assert found == []
    assert intake.counts == ReadCounts(files=1, bytes=path.stat().st_size)


# Damage


def small(path: Path, sealed: bool, traced: dict[str, RunDir]) -> Path:
    """A file with several row groups and pages, of our own or of another writer, with page checksums."""
    if sealed:
        path.write_bytes(shard_paths(traced["parquet"].trace_dir)[2].read_bytes())
        return path
    records = [{**GOOD, "step_idx": i, "selected_token_pos": [i % 3, 4, 5 + i % 4]} for i in range(40)]
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=20, write_page_checksum=True, compression="none")
    return path


def test_no_flipped_byte_goes_unnoticed(tmp_path: Path, traced: dict[str, RunDir]) -> None:
    """A file of our own: anywhere in it. What may go by is the name of a checksum, which changes no record."""
    path = small(tmp_path / "t.parquet", True, traced)
    content = path.read_bytes()
    expected, _ = read(path, engine_steps=True, block_sizes=True)
    passed = 0
    for at in range(0, len(content), 5):
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        try:
            found, _ = read(path, engine_steps=True, block_sizes=True)
        except InputError as error:
            assert str(path) in error.message  # noqa: PT017
        else:
            assert found == expected
            passed += 1
    assert passed < 10


@pytest.mark.parametrize("how", ["pyarrow", "pandas", "polars"])
def test_a_table_of_ours_can_be_written_anew(tmp_path: Path, traced: dict[str, RunDir], how: str) -> None:
    """No tool copies the checksums of the file that it read, which would be wrong for the one that it writes."""
    path = small(tmp_path / "t.parquet", True, traced)
    expected, _ = read(path)
    if how == "pyarrow":
        pq.write_table(pq.read_table(path), path)
    elif how == "pandas":
        pd.read_parquet(path).to_parquet(path)
    else:
        pl.read_parquet(path).write_parquet(path)
    assert read(path, engine_steps=True, block_sizes=True)[0] == expected


def test_no_flipped_byte_in_a_page_of_another_writer_goes_unnoticed(tmp_path: Path, traced: dict[str, RunDir]) -> None:
    """Parquet's own checksums: the contents of pages, not their headers and the footer."""
    path = small(tmp_path / "t.parquet", False, traced)
    content = path.read_bytes()
    expected, _ = read(path)
    metadata = pq.ParquetFile(path).metadata
    for group in range(metadata.num_row_groups):
        for column in map(metadata.row_group(group).column, range(metadata.num_columns)):
            end = column.dictionary_page_offset + column.total_compressed_size
            for at in range(end - 5, end):  # the last bytes of a column are its last page's
                path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
                with pytest.raises(InputError, match="damaged"):
                    read(path)
    path.write_bytes(content)
    assert read(path)[0] == expected


@pytest.mark.parametrize("sealed", [True, False])
def test_a_file_that_was_cut_off_is_an_error(tmp_path: Path, traced: dict[str, RunDir], sealed: bool) -> None:
    path = small(tmp_path / "t.parquet", sealed, traced)
    content = path.read_bytes()
    for length in {0, 1, 4, 8, 11, 12, *range(0, len(content), 97), len(content) - 1, len(content) - 8}:
        path.write_bytes(content[:length])
        with pytest.raises(InputError) as caught:
            read(path, on_error="skip")
        assert str(path) in caught.value.message


def test_a_missing_file_is_an_error_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(DsakvError, match=r"cannot read .*gone\.parquet: No such file") as caught:
        read(tmp_path / "gone.parquet")
    assert caught.value.exit_code == 1
