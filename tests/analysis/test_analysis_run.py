from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsakv.config import AnalyzeConfig
from dsakv.errors import DsakvError, InputError
from tests.analysis.oracle import figures
from tests.analysis.traces import Record, assert_close, configs, interleave, record, requests, run, write_shard

ONE_BLOCK = AnalyzeConfig(block_size=4)


FIGURES = (
    "record_stats",
    "read_amplification",
    "temporal_locality",
    "overlap",
    "working_set",
    "needle_recall",
    "cache_sim",
    "step_set_blocks",
    "lru_curve",
)


def only(result: dict[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in FIGURES}


def positioned(records: list[Record], config: AnalyzeConfig) -> list[Record]:
    return [r for r in records if r.get("selected_token_pos") and (config.prefill_tail or r["step_idx"] >= 0)]


@settings(max_examples=150, deadline=None)
@given(st.data(), requests(), configs)
def test_figures_are_those_of_the_definitions(
    data: st.DataObject, made: list[list[Record]], config: AnalyzeConfig
) -> None:
    shards = data.draw(st.lists(st.integers(0, 2), min_size=len(made), max_size=len(made)))
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        for shard in sorted(set(shards)):
            mine = data.draw(st.composite(interleave)([m for m, s in zip(made, shards, strict=True) if s == shard]))
            write_shard(Path(folder, f"trace_steps_{shard * 4}_{shard * 4 + 4}.jsonl"), mine)
            records += mine
        if not positioned(records, config):
            with pytest.raises(InputError):
                run(Path(folder), config)
            return
        results = run(Path(folder), config)
    assert [result["block_size_tokens"] for result in results] == list(config.block_sizes)
    for result in results:
        assert_close(only(result), figures(records, result["block_size_tokens"], config))
        used = positioned(records, config)
        assert result["input"]["records"] == len(used)
        without = sum(not r.get("selected_token_pos") for r in records)
        assert result["input"]["records_without_positions"] == without
        assert result["input"]["prefill_tail_records_left_out"] == len(records) - without - len(used)
        assert result["complete"] is True


@settings(max_examples=60, deadline=None)
@given(st.data(), requests(), configs)
def test_a_request_in_two_files_is_still_one_stream(
    data: st.DataObject, made: list[list[Record]], config: AnalyzeConfig
) -> None:
    records = data.draw(st.composite(interleave)(made))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(records)), max_size=2)))
    if not positioned(records, config):
        return
    with tempfile.TemporaryDirectory() as folder:
        for i, (begin, end) in enumerate(zip([0, *cuts], [*cuts, len(records)], strict=True)):
            write_shard(Path(folder, f"trace_steps_{i}_{i + 1}.jsonl"), records[begin:end])
        results = run(Path(folder), config)
    for result in results:
        assert_close(only(result), figures(records, result["block_size_tokens"], config))


def long_records(rng: np.random.Generator, request: int, steps: int) -> list[Record]:
    return [
        record(request, layer, step, rng.permutation(4000)[: rng.integers(1, 300)].tolist(), 4000)
        for step in range(steps)
        for layer in range(3)
    ]


@pytest.mark.parametrize("change", [{}, {"step_union": True}, {"key_mode": "request", "lru_mode": "sequential"}])
def test_records_beyond_one_batch(tmp_path: Path, change: dict[str, Any]) -> None:
    rng = np.random.default_rng(3)
    records = long_records(rng, 0, 90) + long_records(rng, 1, 40)
    write_shard(tmp_path / "trace_steps.jsonl", records)
    config = msgspec.structs.replace(AnalyzeConfig(block_sizes=(16, 64), lru_caps=(20, 50, 150)), **change)
    for result in run(tmp_path, config):
        assert_close(only(result), figures(records, result["block_size_tokens"], config))


@pytest.mark.parametrize("split", [False, True], ids=["whole requests", "a request in two shards"])
def test_any_number_of_workers_gives_the_same_bits(tmp_path: Path, split: bool) -> None:
    rng = np.random.default_rng(5)
    for shard in range(4):
        records = long_records(rng, shard, 12)
        write_shard(tmp_path / f"trace_steps_{shard}_{shard + 1}.jsonl", records)
    if split:
        write_shard(tmp_path / "trace_steps_4_5.jsonl", [record(2, 0, 50, [1, 2])])
    with (tmp_path / "trace_steps_3_4.jsonl").open("ab") as file:
        file.write(b'{"request_id": 3}\n{"requ')
    config = AnalyzeConfig(block_sizes=(16, 64), on_error="skip")
    alone = run(tmp_path, config)
    assert alone[0]["input"]["rejected"] == {"missing_field": {"count": 1, "places": ["trace_steps_3_4.jsonl:37"]}}
    shared = run(tmp_path, msgspec.structs.replace(config, workers=3))
    assert orjson.dumps(shared) == orjson.dumps(alone)


def test_an_error_in_a_worker_keeps_its_message(tmp_path: Path) -> None:
    for shard in range(3):
        write_shard(tmp_path / f"trace_steps_{shard}_{shard + 1}.jsonl", [record(shard, 0, 0, [1, 1 if shard else 2])])
    with pytest.raises(InputError) as alone:
        run(tmp_path, ONE_BLOCK)
    with pytest.raises(InputError) as shared:
        run(tmp_path, msgspec.structs.replace(ONE_BLOCK, workers=2))
    assert "trace_steps_1_2.jsonl:1: bad record: position 1 stands there twice" in alone.value.message
    assert (shared.value.message, shared.value.hint) == (alone.value.message, alone.value.hint)
    assert type(shared.value) is InputError


def test_a_block_that_comes_back_across_shards_is_seen_before_the_merge(tmp_path: Path) -> None:
    write_shard(tmp_path / "trace_steps_0_1.jsonl", [record(0, 0, 0, [1])])
    write_shard(tmp_path / "trace_steps_1_2.jsonl", [record(0, 0, 0, [1])])
    with pytest.raises(InputError, match=r"trace_steps_1_2\.jsonl:1: bad record: request 0, layer 0, step 0 has been"):
        run(tmp_path, ONE_BLOCK)


def test_steps_of_a_request_may_go_backwards_between_layers_only_where_layers_stay_apart(tmp_path: Path) -> None:
    records = [record(0, layer, step, [layer + step]) for layer in range(2) for step in range(3)]
    write_shard(tmp_path / "trace_steps.jsonl", records)
    (result,) = run(tmp_path, ONE_BLOCK)
    assert_close(only(result), figures(records, 4, ONE_BLOCK))
    for change in ({"step_union": True}, {"key_mode": "request"}):
        with pytest.raises(InputError, match="goes back from step 2 to step 0"):
            run(tmp_path, msgspec.structs.replace(ONE_BLOCK, **change))


def test_bad_records_are_skipped_counted_and_leave_the_rest_as_it_is(tmp_path: Path) -> None:
    good = [record(0, 0, step, [step, step + 9]) for step in range(4)]
    bad = [record(0, 0, 1, [3]), record(0, 0, 9, [64]), {"event": 1}, record(0, 0, 9, [2, 2])]
    write_shard(tmp_path / "trace_steps.jsonl", [good[0], good[1], bad[0], bad[1], good[2], bad[2], good[3], bad[3]])
    (result,) = run(tmp_path, msgspec.structs.replace(ONE_BLOCK, on_error="skip"))
    assert_close(only(result), figures(good, 4, ONE_BLOCK))
    assert result["complete"] is False
    assert result["input"]["rejected"] == {
        "repeated_step": {"count": 1, "places": ["trace_steps.jsonl:3"]},
        "position_beyond_sequence": {"count": 1, "places": ["trace_steps.jsonl:4"]},
        "event": {"count": 1, "places": ["trace_steps.jsonl:6"]},
        "duplicate_position": {"count": 1, "places": ["trace_steps.jsonl:8"]},
    }
    assert result["warnings"] == ["the figures are incomplete: 4 bad records were skipped"]


def test_an_unfinished_last_line_is_dropped_with_a_warning_in_both_modes(tmp_path: Path) -> None:
    good = [record(0, 0, step, [step]) for step in range(3)]
    path = tmp_path / "trace_steps_0_4.jsonl"
    write_shard(path, good)
    path.write_bytes(path.read_bytes()[:-10])
    for on_error in ("strict", "skip"):
        (result,) = run(tmp_path, AnalyzeConfig(block_size=4, on_error=on_error))
        assert_close(only(result), figures(good[:2], 4, ONE_BLOCK))
        assert result["complete"] is True
        assert result["warnings"] == ["trace_steps_0_4.jsonl:3: an unfinished last line was dropped"]
        assert result["input"]["unfinished_last_lines"] == ["trace_steps_0_4.jsonl:3"]


def test_block_size_comes_from_the_flags_then_the_meta_data_then_the_records(tmp_path: Path) -> None:
    path = tmp_path / "trace_steps.jsonl"
    write_shard(path, [record(0, 0, 0, [1]), {**record(0, 0, 1, [1]), "block_size_tokens": 8}])
    assert run(tmp_path, AnalyzeConfig())[0]["block_size_tokens"] == 8
    (tmp_path / "run_meta.json").write_bytes(b'{"block_size_tokens": 32}')
    assert run(tmp_path, AnalyzeConfig())[0]["block_size_tokens"] == 32
    assert run(tmp_path, AnalyzeConfig(block_size=5))[0]["block_size_tokens"] == 5
    sweep = run(tmp_path, AnalyzeConfig(block_sizes=(16, 4)))
    assert [result["block_size_tokens"] for result in sweep] == [16, 4]
    with pytest.raises(InputError, match="both given"):
        run(tmp_path, AnalyzeConfig(block_size=5, block_sizes=(16,)))
    for meta in (b'{"block_size_tokens": true}', b'{"block_size_tokens": 0}', b'{"block_size_tokens": "64"}'):
        (tmp_path / "run_meta.json").write_bytes(meta)
        with pytest.raises(InputError, match="not a positive integer"):
            run(tmp_path, AnalyzeConfig())
    (tmp_path / "run_meta.json").unlink()

    write_shard(path, [{**record(0, 0, s, [1]), "block_size_tokens": 8 << s} for s in range(2)])
    with pytest.raises(InputError, match="several block sizes: 8, 16"):
        run(tmp_path, AnalyzeConfig())
    write_shard(path, [record(0, 0, 0, [1])])
    with pytest.raises(InputError, match=r"nothing in .* tells the block size"):
        run(tmp_path, AnalyzeConfig())
    write_shard(path, [{**record(0, 0, 0, [1]), "block_size_tokens": True}])
    with pytest.raises(InputError, match='"block_size_tokens" is true, not an integer'):
        run(tmp_path, AnalyzeConfig())
    assert run(tmp_path, ONE_BLOCK)[0]["block_size_tokens"] == 4


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no records"),
        (b"{nonsense}\n", r"every record in .* is bad: json \(1\)"),
        (orjson.dumps(record(0, 0, 0, [])) + b"\n", "none of the 1 records in .* has selected_token_pos"),
        (orjson.dumps(record(0, 0, -1, [3])) + b"\n", "the prefill's tail alone"),
    ],
)
def test_a_trace_without_a_record_to_analyze_says_why(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "trace_steps.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        run(tmp_path, AnalyzeConfig(block_size=4, on_error="skip"))
    assert caught.value.hint


def test_results_carry_where_they_come_from(tmp_path: Path) -> None:
    meta = {"block_size_tokens": 4, "model": {"name": "tiny", "random_weights": True}}
    (tmp_path / "run_meta.json").write_bytes(orjson.dumps(meta))
    write_shard(tmp_path / "trace_steps.jsonl", [record("x", 0, 0, [3, 1])])
    (result,) = run(tmp_path, AnalyzeConfig(out="somewhere", workers=4))
    assert result["run_meta"] == meta
    assert result["config"]["lru_caps"] == [128, 256, 512, 1024]
    assert not {"out", "workers", "report", "json"} & set(result["config"])
    assert "locality numbers mean nothing" in result["warnings"][0]
    assert result["input"]["files"] == 1
    assert result["input"]["bytes"] == (tmp_path / "trace_steps.jsonl").stat().st_size


def test_a_file_that_cannot_be_read_is_no_input_error(tmp_path: Path) -> None:
    (tmp_path / "trace_steps.jsonl").mkdir()
    write_shard(tmp_path / "trace_steps_0_4.jsonl", [record(0, 0, 0, [1])])
    assert run(tmp_path, ONE_BLOCK)[0]["input"]["files"] == 1  # a directory is no shard
    (tmp_path / "trace_steps_4_8.jsonl").symlink_to("nowhere")
    with pytest.raises(DsakvError, match=r"cannot read .*trace_steps_4_8\.jsonl") as caught:
        run(tmp_path, ONE_BLOCK)
    assert caught.value.exit_code == 1


def test_a_block_size_gives_the_same_bits_alone_and_derived_from_a_smaller_one(tmp_path: Path) -> None:
    write_shard(tmp_path / "trace_steps.jsonl", long_records(np.random.default_rng(4), 0, 20))
    sizes = (4, 6, 8, 24, 64, 100)
    config = AnalyzeConfig(lru_caps=(9, 40), policies=("all",))
    together = run(tmp_path, msgspec.structs.replace(config, block_sizes=sizes))
    for size, result in zip(sizes, together, strict=True):
        (alone,) = run(tmp_path, msgspec.structs.replace(config, block_size=size))
        for one in (result, alone):
            for key in ("config", "decision"):  # what was asked for, and what is said of the other sizes
                del one[key]
        assert orjson.dumps(result) == orjson.dumps(alone)
