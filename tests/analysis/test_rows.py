"""Rows of what has ended are used again, and what comes back after all is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsakv.analysis import part
from dsakv.analysis.rows import Grid, IdleClock, LayerRows, ReappearedError, Rows
from dsakv.config import AnalyzeConfig
from tests.analysis.traces import Record, record, run, write_shard


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams are taken for ended after a few idle records."""
    monkeypatch.setattr(IdleClock, "PATIENCE", 1)
    monkeypatch.setattr(IdleClock, "ROUNDS", 1)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether rows are released, for each pass over a part."""
    seen: list[bool] = []
    counted = part._analyze

    def watched(*given: Any, release: bool) -> part.PartFigures:
        seen.append(release)
        return counted(*given, release=release)

    monkeypatch.setattr(part, "_analyze", watched)
    return seen


def test_a_free_row_goes_to_the_next_key() -> None:
    rows = Rows()
    assert [rows.row("a"), rows.row("b"), rows.row("a")] == [0, 1, 0]
    rows.release(0)
    assert rows.row("c") == 0
    assert (len(rows), rows.live, rows.key(0)) == (2, 2, "c")
    with pytest.raises(ReappearedError):
        rows.row("a")


def test_layers_keep_their_rows_however_many_and_large_they_are() -> None:
    layers = LayerRows()
    known: dict[int, int] = {}
    for ids in ([3, -1, 3], [0, 5, 70], [2**31 - 1, 3, 4096], [5, 4095], [-1, 2]):
        rows = layers.rows(np.array(ids)).tolist()
        for layer, row in zip(ids, rows, strict=True):
            assert known.setdefault(layer, row) == row
    assert sorted(known.values()) == list(range(len(known))) == list(range(len(layers)))
    assert dict(layers) == known


def test_an_idle_row_ends_once(hasty: None) -> None:
    clock = IdleClock()
    clock.seen(np.array([0, 1]), 2)
    clock.seen(np.array([1]), 6)
    assert clock.ended(4) == []
    assert clock.ended(6) == [0]
    assert clock.ended(6) == []
    assert clock.ended(100) == [1]


def test_a_grid_keeps_what_it_holds_and_is_zero_elsewhere() -> None:
    grid = Grid(x=np.int32)
    assert grid.reserve(1, 3)
    grid["x"][0, :3] = [1, 2, 3]
    assert grid.reserve(5, 200)
    assert not grid.reserve(2, 100)
    assert grid["x"].sum() == 6
    grid.clear(0)
    assert grid["x"].sum() == 0


def batches(requests: int, steps: int) -> list[Record]:
    """Two requests at a time, three layers each, one pair after the other."""
    rng = np.random.default_rng(2)
    return [
        record(2 * pair + r, layer, step, sorted(rng.choice(60, 5, replace=False).tolist()), 64)
        for pair in range(requests // 2)
        for step in range(steps)
        for r in range(2)
        for layer in range(3)
    ]


def test_many_requests_in_turn_are_not_taken_for_ended(tmp_path: Path, passes: list[bool]) -> None:
    """A round of 300 requests x 8 layers is longer than the patience; requests come back all the same."""
    records = [record(r, layer, s, [r % 50, 50 + layer]) for s in range(4) for r in range(300) for layer in range(8)]
    write_shard(tmp_path / "trace_steps.jsonl", records)
    run(tmp_path, AnalyzeConfig(block_size=4))
    assert passes == [True]


CHANGES: list[dict[str, Any]] = [
    {},
    {"step_union": True},
    {"key_mode": "request"},
    {"cache_scope": "request"},
    {"max_steps_per_stream": 2},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_released_streams_leave_the_same_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[bool], change: dict[str, Any]
) -> None:
    write_shard(tmp_path / "trace_steps.jsonl", batches(12, 5))
    config = msgspec.structs.replace(AnalyzeConfig(block_sizes=(4, 8), lru_caps=(3, 8), policies=("all",)), **change)
    kept = run(tmp_path, config)
    monkeypatch.setattr("dsakv.trace.jsonl_reader.BATCH_RECORDS", 7)
    monkeypatch.setattr(IdleClock, "PATIENCE", 6)
    monkeypatch.setattr(IdleClock, "ROUNDS", 2)
    ended: list[int] = []
    release = Rows.release

    def watched(self: Rows, row: int) -> None:
        ended.append(row)
        release(self, row)

    monkeypatch.setattr(Rows, "release", watched)
    assert orjson.dumps(run(tmp_path, config)) == orjson.dumps(kept)
    assert ended
    assert passes == [True, True]


@pytest.mark.parametrize("change", CHANGES[:4], ids=str)
def test_a_stream_that_comes_back_is_counted_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hasty: None, passes: list[bool], change: dict[str, Any]
) -> None:
    records = batches(8, 4)
    back = [record(0, layer, 9, [layer, 30, 50], 64) for layer in range(3)]
    write_shard(tmp_path / "trace_steps.jsonl", records + back)
    config = msgspec.structs.replace(AnalyzeConfig(block_sizes=(4,), lru_caps=(3, 8)), **change)
    monkeypatch.setattr("dsakv.trace.jsonl_reader.BATCH_RECORDS", 7)
    released = run(tmp_path, config)
    assert passes == [True, False]
    monkeypatch.setattr(IdleClock, "PATIENCE", 10**6)
    assert orjson.dumps(run(tmp_path, config)) == orjson.dumps(released)


def test_memory_follows_the_live_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hasty: None) -> None:
    write_shard(tmp_path / "trace_steps.jsonl", batches(40, 6))
    monkeypatch.setattr("dsakv.trace.jsonl_reader.BATCH_RECORDS", 7)
    used: list[int] = []
    reserve = Grid.reserve

    def watched(self: Grid, rows: int, width: int) -> bool:
        used.append(rows)
        return reserve(self, rows, width)

    monkeypatch.setattr(Grid, "reserve", watched)
    run(tmp_path, AnalyzeConfig(block_size=4))
    assert max(used) <= 24  # of 120 streams, 6 of them live at a time


@settings(max_examples=40)
@given(st.data())
def test_relabelling_and_splitting_change_no_bit(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Requests under other numbers, in another order, in other shards: the same distributions, curves and hits."""
    records = batches(6, data.draw(st.integers(1, 4)))
    config = AnalyzeConfig(block_sizes=(4, 16), lru_caps=(2, 9), policies=("all",))
    folder = tmp_path_factory.mktemp("t")
    write_shard(folder / "whole" / "trace_steps.jsonl", records)
    names = data.draw(st.permutations(range(6)))
    places = data.draw(st.lists(st.integers(0, 2), min_size=6, max_size=6))
    for shard in set(places):
        mine = [r | {"request_id": names[r["request_id"]]} for r in records if places[r["request_id"]] == shard]
        write_shard(folder / "split" / f"trace_steps_{shard}_{shard + 1}.jsonl", mine)
    for whole, split in zip(run(folder / "whole", config), run(folder / "split", config), strict=True):
        for result in (whole, split):
            for key in ("trace_dir", "input"):
                del result[key]
        assert orjson.dumps(whole) == orjson.dumps(split)
