from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsakv.errors import DsakvError, InputError
from dsakv.trace.batch import TraceBatch
from dsakv.trace.intake import Intake, ReadCounts, Rejected
from dsakv.trace.jsonl_reader import BATCH_RECORDS, read_jsonl

GOOD: dict[str, Any] = {
    "event": "dsa_topk",
    "request_id": 0,
    "layer_id": 0,
    "step_idx": 0,
    "seq_len_current": 10,
    "selected_token_pos": [1, 4, 9],
}


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != name}


def rows(batches: list[TraceBatch]) -> list[tuple[int, int, int, int, list[int]]]:
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


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_columns_have_the_types_and_order_that_a_batch_promises(tmp_path: Path) -> None:
    second = {**GOOD, "layer_id": 1, "selected_token_pos": [7, 0, 3]}
    intake = Intake("strict")
    (batch,) = read_jsonl(write(tmp_path / "t.jsonl", GOOD, second), intake)
    assert rows([batch]) == [(0, 0, 0, 10, [1, 4, 9]), (0, 1, 0, 10, [0, 3, 7])]
    for column in (batch.request_id, batch.step_idx, batch.seq_len, batch.offsets):
        assert column.dtype == np.dtype(np.int64)
    for column in (batch.layer_id, batch.positions):
        assert column.dtype == np.dtype(np.int32)
    assert intake.counts == ReadCounts(files=1, bytes=(tmp_path / "t.jsonl").stat().st_size, accepted=2)


def test_batches_are_bounded(tmp_path: Path) -> None:
    steps = [{**GOOD, "step_idx": step} for step in range(2 * BATCH_RECORDS + 1)]
    batches = list(read_jsonl(write(tmp_path / "t.jsonl", *steps), Intake("strict")))
    assert [len(batch) for batch in batches] == [BATCH_RECORDS, BATCH_RECORDS, 1]
    assert [row[2] for row in rows(batches)] == list(range(len(steps)))


def test_older_layouts_are_read(tmp_path: Path) -> None:
    old = [{**without("event"), "request_id": name, "unique_blocks": 3} for name in ("req-b", "req-a", "req-b")]
    old[2]["step_idx"] = 1
    intake = Intake("strict")
    assert [row[:3] for row in rows(list(read_jsonl(write(tmp_path / "t.jsonl", *old), intake)))] == [
        (0, 0, 0),
        (1, 0, 0),
        (0, 0, 1),
    ]
    assert intake.requests == {"req-a", "req-b"}


_NOT_SCALARS: tuple[Any, ...] = (True, 2.0, None, {})
BAD: list[tuple[str, str, str]] = [
    ("{nonsense}", "json", "not JSON"),
    ("", "json", "not JSON"),
    ("[1]", "json", "not a JSON object"),
    ("NaN", "json", "not JSON"),
    (json.dumps({**GOOD, "event": "dsa"}), "event", '"event" is "dsa"'),
    (json.dumps({**GOOD, "event": 7}), "event", '"event" is 7'),
    (json.dumps({**GOOD, "event": None}), "event", '"event" is null'),
    *[
        (json.dumps(without(name)), "missing_field", f'"{name}" is missing')
        for name in ("request_id", "layer_id", "step_idx", "seq_len_current")
    ],
    *[
        (json.dumps({**GOOD, name: value}), "wrong_type", f'"{name}" is {json.dumps(value)}')
        for name in ("request_id", "layer_id", "step_idx", "seq_len_current", "selected_token_pos")
        for value in _NOT_SCALARS
    ],
    *[
        (json.dumps({**GOOD, name: "1"}), "wrong_type", f'"{name}" is "1"')
        for name in ("layer_id", "step_idx", "seq_len_current", "selected_token_pos")
    ],
    *[
        (json.dumps({**GOOD, "selected_token_pos": [1, value]}), "wrong_type", "selected_token_pos")
        for value in (True, 2.0, None, "2", [2])
    ],
    (json.dumps({**GOOD, "selected_token_pos": [1, 2**64]}), "wrong_type", "selected_token_pos"),
    (json.dumps({**GOOD, "selected_token_pos": [1, 2**63]}), "out_of_range", "does not fit 64 bits"),
    (json.dumps({**GOOD, "seq_len_current": 2**31}), "out_of_range", "too large"),
    (json.dumps({**GOOD, "seq_len_current": -1}), "out_of_range", "negative"),
    (json.dumps({**GOOD, "layer_id": -1}), "out_of_range", '"layer_id" -1 is negative'),
    (json.dumps({**GOOD, "request_id": 2**63}), "out_of_range", "does not fit 64 bits"),
    (json.dumps({**GOOD, "layer_id": 2**31}), "out_of_range", "too large"),
    (json.dumps({**GOOD, "step_idx": 2**53}), "out_of_range", "too large"),
    (json.dumps({**GOOD, "selected_token_pos": [4, 1, 4]}), "duplicate_position", "position 4 stands there twice"),
    (json.dumps({**GOOD, "selected_token_pos": [3, -1]}), "negative_position", "position -1 is negative"),
    (json.dumps({**GOOD, "selected_token_pos": [10, 3]}), "position_beyond_sequence", "position 10"),
    (json.dumps({**GOOD, "step_idx": 5}), "repeated_step", "request 0, layer 0, step 5 has been there before"),
    (json.dumps({**GOOD, "step_idx": 3}), "backward_step", "request 0, layer 0 goes back from step 5 to step 3"),
    (json.dumps({**GOOD, "request_id": "a"}), "wrong_type", "of another type than before"),
]


@pytest.mark.parametrize(("line", "reason", "says"), BAD, ids=[f"{reason}: {line[:60]}" for line, reason, _ in BAD])
def test_a_bad_line_stops_or_is_counted(tmp_path: Path, line: str, reason: str, says: str) -> None:
    first, last = {**GOOD, "step_idx": 5}, {**GOOD, "step_idx": 6}
    if "step" not in reason and '"a"' not in line:  # whatever else is wrong, it is not the order
        first["layer_id"] = last["layer_id"] = 9
    path = tmp_path / "trace_steps_0_4.jsonl"
    path.write_text(f"{json.dumps(first)}\n{line}\n{json.dumps(last)}\n")
    with pytest.raises(InputError) as caught:
        list(read_jsonl(path, Intake("strict")))
    assert caught.value.message.startswith(f"{path}:2: bad record: ")
    assert says in caught.value.message
    assert "\n" not in caught.value.message

    intake = Intake("skip")
    assert [row[2] for row in rows(list(read_jsonl(path, intake)))] == [5, 6]
    assert intake.counts.accepted == 2
    assert intake.counts.rejected == {reason: Rejected(1, ["trace_steps_0_4.jsonl:2"])}


def test_a_rejected_record_leaves_no_mark_on_what_follows(tmp_path: Path) -> None:
    bad = {**GOOD, "step_idx": 9, "selected_token_pos": [10]}
    other_type = {**bad, "request_id": "a"}
    path = write(tmp_path / "t.jsonl", other_type, bad, GOOD)
    assert [row[2] for row in rows(list(read_jsonl(path, Intake("skip"))))] == [0]


def test_only_the_first_places_are_kept(tmp_path: Path) -> None:
    first, second = Intake("skip"), Intake("skip")
    list(read_jsonl(write(tmp_path / "a.jsonl", *[{}] * 3), first))
    list(read_jsonl(write(tmp_path / "b.jsonl", *[{}] * 9), second))
    first.counts.merge(second.counts)
    places = ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.jsonl:1", "b.jsonl:2"]
    assert first.counts.rejected == {"missing_field": Rejected(12, places)}
    assert (first.counts.files, first.counts.bytes) == (2, 36)


@pytest.mark.parametrize("on_error", ["strict", "skip"])
def test_every_cut_of_the_last_line_is_unfinished_but_the_whole_one_counts(tmp_path: Path, on_error: Any) -> None:
    line = json.dumps(GOOD)
    path = tmp_path / "t.jsonl"
    for length in range(1, len(line)):
        path.write_text(f"{json.dumps({**GOOD, 'layer_id': 1})}\n{line[:length]}")
        intake = Intake(on_error)
        assert len(rows(list(read_jsonl(path, intake)))) == 1
        assert intake.counts.unfinished == ["t.jsonl:2"]
        assert not intake.counts.rejected
    path.write_text(line)
    intake = Intake(on_error)
    assert len(rows(list(read_jsonl(path, intake)))) == 1
    assert not intake.counts.unfinished


def test_a_whole_last_line_without_newline_is_checked_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(without("layer_id")))
    with pytest.raises(InputError, match='"layer_id" is missing'):
        list(read_jsonl(path, Intake("strict")))


def test_a_cut_line_with_a_newline_is_bad(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(GOOD)[:-5] + "\n")
    with pytest.raises(InputError, match="not JSON"):
        list(read_jsonl(path, Intake("strict")))


def test_records_without_positions_are_counted_yet_checked(tmp_path: Path) -> None:
    no_positions = without("selected_token_pos")
    empty = {**GOOD, "layer_id": 1, "selected_token_pos": []}
    intake = Intake("skip")
    path = write(tmp_path / "t.jsonl", no_positions, empty, no_positions, {**GOOD, "layer_id": 2})
    assert [row[1] for row in rows(list(read_jsonl(path, intake)))] == [2]
    assert (intake.counts.accepted, intake.counts.without_positions) == (1, 2)
    assert intake.counts.rejected == {"repeated_step": Rejected(1, ["t.jsonl:3"])}


def test_what_was_seen_in_one_shard_counts_in_the_next(tmp_path: Path) -> None:
    intake = Intake("strict")
    path = write(tmp_path / "t.jsonl", GOOD)
    list(read_jsonl(path, intake))
    with pytest.raises(InputError, match="has been there before"):
        list(read_jsonl(path, intake))


def test_order_within_a_request_is_checked_where_asked(tmp_path: Path) -> None:
    layers = [{**GOOD, "layer_id": layer, "step_idx": step} for layer in (1, 0) for step in (0, 1)]
    path = write(tmp_path / "t.jsonl", *layers)
    assert len(rows(list(read_jsonl(path, Intake("strict"))))) == 4
    with pytest.raises(InputError, match=r"t\.jsonl:3: bad record: request 0, layer 0 goes back from step 1"):
        list(read_jsonl(path, Intake("strict", request_order=True)))


def test_a_missing_file_is_an_error_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(DsakvError, match=r"cannot read .*gone\.jsonl: No such file") as caught:
        list(read_jsonl(tmp_path / "gone.jsonl", Intake("strict")))
    assert caught.value.exit_code == 1


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 12) | st.floats(allow_nan=False, allow_infinity=False) | st.text("a1"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(GOOD)), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(GOOD)), _JSON)
def test_nothing_is_accepted_but_what_the_schema_allows(name: str, value: Any) -> None:
    record = {**GOOD, name: value}
    positions = record["selected_token_pos"]
    allowed = (
        record["event"] == "dsa_topk"
        and type(record["request_id"]) in (int, str)
        and all(type(record[key]) is int for key in ("layer_id", "step_idx", "seq_len_current"))
        and type(positions) is list
        and all(type(p) is int and 0 <= p < record["seq_len_current"] for p in positions)
        and len(set(positions)) == len(positions)
    )
    intake = Intake("skip")
    with tempfile.TemporaryDirectory() as folder:
        list(read_jsonl(write(Path(folder, "t.jsonl"), record), intake))
    assert (intake.counts.accepted + intake.counts.without_positions == 1) is allowed
    assert sum(rejected.count for rejected in intake.counts.rejected.values()) == (not allowed)


def test_a_bad_record_has_no_say_in_the_block_size(tmp_path: Path) -> None:
    path = tmp_path / "trace_steps.jsonl"
    rows = [GOOD | {"block_size_tokens": 16}, GOOD | {"selected_token_pos": [-3], "block_size_tokens": 32}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    intake = Intake("skip", block_sizes=True)
    list(read_jsonl(path, intake))
    assert intake.counts.block_sizes == {16}
