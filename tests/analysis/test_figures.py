"""Single figures where the answer is known without computing, or where one figure implies another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsakv.analysis.records import StreamSplitter
from dsakv.config import AnalyzeConfig
from dsakv.errors import InputError
from dsakv.trace.intake import Intake
from dsakv.trace.jsonl_reader import read_jsonl
from tests.analysis.traces import Record, record, run, write_shard


def result_of(tmp_path: Path, records: list[Record], **options: Any) -> dict[str, Any]:
    write_shard(tmp_path / "trace_steps.jsonl", records)
    (result,) = run(tmp_path, AnalyzeConfig(**{"block_size": 1, **options}))
    return result


def test_one_token_is_one_block_of_no_entropy(tmp_path: Path) -> None:
    stats = result_of(tmp_path, [record(0, 0, 0, [5])], block_size=64)["record_stats"]
    for name, value in (("unique_blocks", 1), ("block_span", 1), ("block_density", 1), ("tokens_per_block_mean", 1)):
        assert stats[name] == {"count": 1, "min": value, "max": value, "mean": value, "std": 0}
    assert stats["block_concentration"]["normalized_entropy"]["mean"] == 0
    assert stats["block_concentration"]["gini"]["mean"] == 0


def test_an_even_spread_has_full_entropy_and_no_gini(tmp_path: Path) -> None:
    spread = result_of(tmp_path, [record(0, 0, 0, [0, 1, 2, 6, 7, 8, 30, 31, 32])], block_size=3)["record_stats"]
    assert spread["block_concentration"]["normalized_entropy"]["mean"] == pytest.approx(1.0)
    assert spread["block_concentration"]["gini"]["mean"] == 0


def test_below_the_step_s_set_only_counting_by_access_thrashes(tmp_path: Path) -> None:
    records = [record(0, 0, step, list(range(8)), 40) for step in range(5)]
    by_step = result_of(tmp_path, records, lru_caps=(4, 8))["cache_sim"]
    by_access = result_of(tmp_path, records, lru_caps=(4, 8), lru_mode="sequential")["cache_sim"]
    assert by_step["4"] == {"capacity_blocks": 4, "hits": 16, "misses": 24, "hit_rate": 0.4, "below_step_set_p95": True}
    assert by_access["4"]["hits"] == 0
    assert by_step["8"]["hits"] == by_access["8"]["hits"] == 32


def test_distance_counts_steps_and_working_set_counts_records(tmp_path: Path) -> None:
    records = [record(0, 0, 0, [1]), record(0, 0, 7, [2]), record(0, 0, 10, [1])]
    result = result_of(tmp_path, records, ws_windows=(1, 2, 3))
    assert result["temporal_locality"]["reuse_distance_hist_steps"] == {"10": 1}
    assert [result["working_set"][w]["max"] for w in "123"] == [1, 2, 2]
    clipped = result_of(tmp_path, records, reuse_cap_steps=4)["temporal_locality"]
    assert clipped["reuse_distance_hist_steps"] == {"4": 1}
    assert clipped["reuse_cap_steps"] == 4


def test_a_sequence_that_gets_shorter_keeps_its_working_set(tmp_path: Path) -> None:
    result = result_of(tmp_path, [record(0, 0, 0, [60]), record(0, 0, 1, [1], 10)], ws_windows=(2,))
    assert result["working_set"]["2"]["max"] == 2


def test_step_union_joins_what_interleaving_requests_tear_apart(tmp_path: Path) -> None:
    records = [record(r, layer, step, [r, layer + 2]) for step in range(2) for layer in range(3) for r in range(2)]
    stats = result_of(tmp_path, records, step_union=True)["record_stats"]
    assert stats["unique_blocks"] == {"count": 4, "min": 4, "max": 4, "mean": 4, "std": 0}
    assert stats["tokens_per_block_mean"]["mean"] == 6 / 4


@settings(deadline=None)
@given(st.lists(st.sets(st.integers(0, 15), min_size=1), min_size=1, max_size=12))
def test_figures_that_imply_each_other(tmp_path_factory: pytest.TempPathFactory, steps: list[set[int]]) -> None:
    records = [record(0, 0, step, list(chosen)) for step, chosen in enumerate(steps)]
    result = result_of(tmp_path_factory.mktemp("t"), records, ws_windows=(1, 100), lru_caps=(3, 16))
    temporal, unbounded = result["temporal_locality"], result["cache_sim"]["16"]
    accesses = sum(map(len, steps))
    assert temporal["first_touch_blocks"] + temporal["reuse_samples"] == accesses
    assert unbounded["hits"] == temporal["reuse_samples"]
    assert result["cache_sim"]["3"]["hits"] <= unbounded["hits"]
    assert result["working_set"]["1"] == result["record_stats"]["unique_blocks"]
    assert result["working_set"]["100"]["max"] == temporal["first_touch_blocks"] == len(set().union(*steps))


def test_dense_records_are_counted_and_can_be_left_out(tmp_path: Path) -> None:
    records = [record(0, 0, step, list(range(3)), 3 + step) for step in range(3)]
    everything = result_of(tmp_path, records)
    assert (everything["input"]["dense_records"], everything["input"]["dense_records_left_out"]) == (1, 0)
    sparse = result_of(tmp_path, records, skip_dense=True)
    assert (sparse["input"]["dense_records"], sparse["input"]["dense_records_left_out"]) == (1, 1)
    assert sparse["input"]["records"] == sparse["record_stats"]["unique_blocks"]["count"] == 2
    with pytest.raises(InputError, match="selects all tokens of its sequence"):
        result_of(tmp_path, records[:1], skip_dense=True)


def test_needles_are_looked_for_by_layer(tmp_path: Path) -> None:
    (tmp_path / "requests.jsonl").write_text('{"request_id": 0, "needle_spans": [[4, 8], [20, 22]]}\n')
    trace = tmp_path / "block4"
    records = [record(0, 0, 0, [4, 5, 9]), record(0, 1, 0, [4, 5, 6, 7, 20, 21]), record(1, 0, 0, [4])]
    result = result_of(trace, records)
    assert result["needle_recall"]["tokens"]["mean"] == pytest.approx((2 / 6 + 1) / 2)
    assert result["needle_recall"]["needles"]["mean"] == pytest.approx((1 / 2 + 1) / 2)
    assert [result["layers"][layer]["needle_recall"]["needles"]["mean"] for layer in "01"] == [0.5, 1.0]
    (tmp_path / "requests.jsonl").write_text('{"request_id": 0, "needle_spans": [[4]]}\n')
    with pytest.raises(InputError, match=r"requests\.jsonl:1: the line is damaged"):
        result_of(trace, records)


def test_layers_add_up_to_the_whole(tmp_path: Path) -> None:
    records = [record(0, layer, step, [step, 8 + 7 * layer, 30]) for step in range(6) for layer in range(3)]
    result = result_of(tmp_path, records, policies=("all",), lru_caps=(2, 4))
    layers = result["layers"].values()
    assert list(result["layers"]) == ["0", "1", "2"]
    assert sum(layer["records"] for layer in layers) == result["records"]
    for key in ("first_touch_blocks", "single_touch_blocks", "reuse_samples"):
        assert sum(layer["temporal_locality"][key] for layer in layers) == result["temporal_locality"][key]
    for capacity in ("2", "4"):
        for key in ("hits", "misses"):
            assert sum(layer["cache_sim"][capacity][key] for layer in layers) == result["cache_sim"][capacity][key]


@pytest.mark.parametrize("scope", ["stream", "request", "layer", "run"])
@pytest.mark.parametrize("names", [(0, 1), ("b", "a")])
def test_each_cache_has_a_curve_of_its_own(tmp_path: Path, scope: Any, names: tuple[Any, Any]) -> None:
    records = [
        record(name, layer, step, [step + layer, 9 * at + 8, 40]) | {"engine_step": step}
        for step in range(6)
        for at, name in enumerate(names)
        for layer in range(2)
    ]
    whole = result_of(tmp_path, records, cache_scope=scope, cache_curves=True)
    assert result_of(tmp_path, records, cache_scope=scope)["caches"] is None
    requests, layers = sorted(names), [0, 1]
    expected = {
        "stream": [(request, layer) for request in requests for layer in layers],
        "request": [(request, None) for request in requests],
        "layer": [(None, layer) for layer in layers],
        "run": [(None, None)],
    }[scope]
    assert [(cache["request_id"], cache["layer_id"]) for cache in whole["caches"]] == expected
    total = whole["lru_curve"]
    for mode in ("step", "sequential"):
        for capacity, hits in zip(total[mode]["capacity_blocks"], total[mode]["hits"], strict=True):
            own = [
                max(
                    (
                        h
                        for c, h in zip(*map(cache[mode].get, ("capacity_blocks", "hits")), strict=True)
                        if c <= capacity
                    ),
                    default=0,
                )
                for cache in whole["caches"]
            ]
            assert sum(own) == hits
    for key in ("accesses", "first_accesses"):
        assert sum(cache[key] for cache in whole["caches"]) == total[key]


def test_capacities_are_blocks_or_fractions_and_nothing_between(tmp_path: Path) -> None:
    records = [record(0, 0, step, [8, 16, 24, 30, step]) for step in range(4)]
    simulated = result_of(tmp_path, records, lru_caps=(0.5, 3, 3), policies=("all",))
    assert {key: entry["capacity_blocks"] for key, entry in simulated["cache_sim"].items()} == {"0.5": 4, "3": 3}
    assert simulated["policies"]["lru"]["0.5"]["hits"] == simulated["cache_sim"]["0.5"]["hits"]
    with pytest.raises(InputError, match=r"1\.5 is neither"):
        result_of(tmp_path, records, lru_caps=(1.5,))
    with pytest.raises(InputError, match="there is no policy arc"):
        result_of(tmp_path, records, policies=("arc",))
    assert result_of(tmp_path, records, policies=("none",))["policies"] == {}


def test_what_is_held_back_does_not_keep_its_batch_alive(tmp_path: Path) -> None:
    write_shard(tmp_path / "t.jsonl", [record(request, 0, 0, [1, 2]) for request in range(3)])
    splitter = StreamSplitter(AnalyzeConfig(step_union=True), release=True)
    (batch,) = read_jsonl(tmp_path / "t.jsonl", Intake("strict"))
    assert list(splitter.split(batch)) == []
    assert all(held.positions.base is None for step in splitter._open.values() for held in step)
    (records,) = splitter.flush()
    assert records.positions.tolist() == [1, 2] * 3
