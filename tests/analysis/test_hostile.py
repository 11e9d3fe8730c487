"""Input that is odd, hostile or of two minds: a right figure or an error that says what is wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest

from dsakv.analysis.run import passes
from dsakv.config import AnalyzeConfig
from dsakv.errors import InputError
from dsakv.trace.open import find_traces
from tests.analysis.oracle import figures
from tests.analysis.test_analysis_run import only
from tests.analysis.traces import Record, assert_close, record, run, write_shard

CONFIG = AnalyzeConfig(block_size=4, lru_caps=(2, 9), policies=("all",))


def wide(records: list[Record], step: int = 1) -> list[Record]:
    return [r | {"engine_step": r["step_idx"] * step} for r in records]


@pytest.mark.parametrize("first", [-5000, -(2**31), -(2**53)])
def test_steps_far_below_zero(tmp_path: Path, first: int) -> None:
    records = [record(0, 0, step, [1, 30 + i, 60]) for i, step in enumerate((first, first + 1, 0, 1))]
    write_shard(tmp_path / "trace_steps.jsonl", records)
    config = msgspec.structs.replace(CONFIG, prefill_tail=True)
    (result,) = run(tmp_path, config)
    assert_close(only(result), figures(records, 4, config))


@pytest.mark.parametrize("seq_len", [10**6, 2**31 - 1])
def test_a_sequence_far_longer_than_what_is_read_of_it_costs_nothing(tmp_path: Path, seq_len: int) -> None:
    write_shard(tmp_path / "trace_steps.jsonl", [record(0, 0, step, [1, 70, step + 2], seq_len) for step in range(3)])
    (result,) = run(tmp_path, msgspec.structs.replace(CONFIG, block_size=1))
    assert result["record_stats"]["recent_locality"]["mean_block_distance"]["mean"] > seq_len - 100
    assert result["lru_curve"]["first_accesses"] == 5


def test_a_longer_sequence_than_there_are_positions_is_bad(tmp_path: Path) -> None:
    write_shard(tmp_path / "trace_steps.jsonl", [record(0, 0, 0, [1], 2**31)])
    with pytest.raises(InputError, match='"seq_len_current" 2147483648 is too large'):
        run(tmp_path, CONFIG)


def test_requests_are_numbered_or_named_not_both(tmp_path: Path) -> None:
    write_shard(tmp_path / "trace_steps_0_1.jsonl", [record(0, 0, 0, [1])])
    write_shard(tmp_path / "trace_steps_1_2.jsonl", [record("a", 0, 0, [1])])
    with pytest.raises(InputError, match="some shards number their requests, others name them"):
        run(tmp_path, CONFIG)


@pytest.mark.parametrize("shards", [1, 2])
def test_needles_belong_to_the_request_of_that_name(tmp_path: Path, shards: int) -> None:
    spans = [{"request_id": "b", "needle_spans": [[4, 8]]}, {"request_id": "a", "needle_spans": []}]
    (tmp_path / "requests.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in spans))
    for at, name in enumerate("ab"):
        shard = tmp_path / "block4" / f"trace_steps_{at % shards}_9.jsonl"
        before = shard.read_bytes() if shard.exists() else b""
        write_shard(shard, [record(name, 0, step, [5, 30]) for step in range(3)])
        shard.write_bytes(before + shard.read_bytes())
    (result,) = run(tmp_path / "block4", CONFIG)
    assert result["needle_recall"]["tokens"] == {"count": 3, "min": 0.25, "max": 0.25, "mean": 0.25, "std": 0.0}


@pytest.mark.parametrize(
    "line",
    [
        {"request_id": [1]},
        {"request_id": True},
        {"request_id": 1, "needle_spans": [[8, 4]]},
        {"request_id": 1, "needle_spans": [[0, 2**63 + 5]]},
        {"request_id": 1, "needle_spans": 5},
        {"request_id": 1, "prefix_owners": [[0, 8], [0, 4]]},
        {"request_id": 1, "prefix_owners": [[1, 8]]},
        {"request_id": "a", "prefix_owners": [[0, 8]]},
        [1],
    ],
    ids=str,
)
def test_damaged_facts_of_requests_are_an_error(tmp_path: Path, line: Any) -> None:
    (tmp_path / "requests.jsonl").write_bytes(orjson.dumps(line) + b"\n")
    write_shard(tmp_path / "block4" / "trace_steps.jsonl", [record(0, 0, 0, [1])])
    with pytest.raises(InputError, match=r"requests\.jsonl:1: the line is damaged"):
        run(tmp_path / "block4", CONFIG)


@pytest.mark.parametrize("name", ["block4/trace_steps_4_8.jsonl", "block4/run_meta.json", "requests.jsonl"])
def test_nothing_waits_for_a_pipe(tmp_path: Path, name: str) -> None:
    write_shard(tmp_path / "block4" / "trace_steps_0_4.jsonl", [record(0, 0, 0, [1])])
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="is no regular file"):
        run(tmp_path / "block4", CONFIG)


def test_values_nested_too_deep_to_show_are_named_all_the_same(tmp_path: Path) -> None:
    deep = b"[" * 400 + b"]" * 400
    line = orjson.dumps(record(0, 0, 0, [1])).replace(b'"layer_id":0', b'"layer_id":' + deep)
    (tmp_path / "trace_steps.jsonl").write_bytes(line + b"\n")
    with pytest.raises(InputError, match='"layer_id" is nested too deep to show, not an integer'):
        run(tmp_path, CONFIG)
    write_shard(tmp_path / "trace_steps.jsonl", [record(0, 0, 0, [1])])
    (tmp_path / "run_meta.json").write_bytes(b'{"a":' + deep + b"}")
    with pytest.raises(InputError, match="run_meta"):
        find_traces(tmp_path)


def test_capacities_that_print_alike_are_kept_apart(tmp_path: Path) -> None:
    write_shard(tmp_path / "trace_steps.jsonl", [record(0, 0, step, [1, 9, step + 20]) for step in range(4)])
    for caps in ((0.9999999, 1), (0.12345678, 0.12345679)):
        (result,) = run(tmp_path, msgspec.structs.replace(CONFIG, lru_caps=caps))
        assert len(result["cache_sim"]) == len(result["policies"]["fifo"]) == 2


def test_layers_out_of_order_are_said_to_leave_no_overlap(tmp_path: Path) -> None:
    ascending = [record(0, layer, step, [layer, 30]) for step in range(3) for layer in (0, 1)]
    write_shard(tmp_path / "trace_steps.jsonl", ascending)
    assert run(tmp_path, CONFIG)[0]["warnings"] == []
    write_shard(tmp_path / "trace_steps.jsonl", sorted(ascending, key=lambda r: (r["step_idx"], -r["layer_id"])))
    (result,) = run(tmp_path, CONFIG)
    assert result["overlap"]["layers"]["jaccard"]["count"] == 0
    assert "their overlap was not counted" in result["warnings"][0]


@pytest.mark.parametrize("scope", ["stream", "run"])
@pytest.mark.parametrize("caps", [(4,), (0.5,)])
def test_every_pass_counts_as_progress(tmp_path: Path, scope: Any, caps: tuple[float, ...]) -> None:
    from dsakv.analysis.run import analyze_trace

    for shard in range(3):
        records = wide([record(shard, 0, step, [step, 30]) for step in range(5)])
        write_shard(tmp_path / f"trace_steps_{shard}_{shard + 1}.jsonl", records)
    (trace,) = find_traces(tmp_path)
    config = AnalyzeConfig(block_size=4, cache_scope=scope, lru_caps=caps)
    told: list[int] = []
    analyze_trace(trace, config, told.append)
    assert sum(told) == passes(trace, config) * sum(shard.stat().st_size for shard in trace.shards)
