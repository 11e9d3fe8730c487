"""Caches that several streams share, against sets of (layer, request, block) put together by hand."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsakv.analysis.simulation import NAMES
from dsakv.config import AnalyzeConfig
from dsakv.errors import InputError
from dsakv.policies import POLICIES
from dsakv.settings import keys
from tests.analysis.oracle import caches
from tests.analysis.traces import Record, assert_close, record, run, write_shard

CACHES = ("cache_sim", "step_set_blocks", "lru_curve")
LAYERS = 2


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Record], dict[int, list[tuple[int, int]]]]:
    """Requests that run in overlapping spans of engine steps, and the prefixes that later ones share."""
    records = []
    owners: dict[int, list[tuple[int, int]]] = {}
    for request in range(draw(st.integers(1, 4))):
        begin, steps = draw(st.integers(0, 6)), draw(st.integers(1, 5))
        for step in range(steps):
            for layer in range(LAYERS):
                chosen = draw(st.lists(st.integers(0, 31), min_size=1, max_size=6, unique=True))
                made = record(request, layer, step, chosen, 40)
                records.append(made | {"engine_step": begin + step})
        if request and draw(st.booleans()):
            tokens = sorted(draw(st.lists(st.integers(1, 24), min_size=1, max_size=2, unique=True)))
            who = sorted(draw(st.lists(st.integers(0, request - 1), min_size=len(tokens), max_size=len(tokens))))
            owners[request] = list(zip(who, tokens, strict=True))
    return records, owners


def expected(
    records: list[Record], owners: Mapping[int, list[tuple[int, int]]], scope: str, size: int
) -> list[list[set[Any]]]:
    """Each cache's sets, step after step; a cache numbers its blocks in the order in which it first reads them."""
    numbers: dict[Any, dict[Any, int]] = {}

    def cache(r: Record) -> Any:
        return {"request": r["request_id"], "layer": r["layer_id"], "run": 0}[scope]

    def blocks(r: Record) -> set[Any]:
        known = numbers.setdefault(cache(r), {})
        found = set()
        for block in sorted({position // size for position in r["selected_token_pos"]}):
            shared = [who for who, tokens in owners.get(r["request_id"], []) if (block + 1) * size <= tokens]
            owner = shared[0] if shared and scope != "request" else r["request_id"]
            found.add(known.setdefault((r["layer_id"], owner, block), len(known)))
        return found

    made: dict[Any, list[set[Any]]] = {}
    if scope == "request":
        for r in records:
            made.setdefault(cache(r), []).append(blocks(r))
        return list(made.values())
    ordered = sorted(records, key=lambda r: (r["engine_step"], r["layer_id"], r["request_id"]))
    for _, together in groupby(ordered, key=lambda r: (r["engine_step"], r["layer_id"])):
        passed = list(together)
        made.setdefault(cache(passed[0]), []).append(set().union(*map(blocks, passed)))
    return list(made.values())


@settings(max_examples=120)
@given(batches(), st.sampled_from(["request", "layer", "run"]), st.sampled_from([1, 2, 3]), st.data())
def test_shared_caches_are_those_of_the_sets(
    made: tuple[list[Record], dict[int, list[tuple[int, int]]]], scope: Any, shards: int, data: st.DataObject
) -> None:
    records, owners = made
    sizes = (4, 8)
    config = AnalyzeConfig(cache_scope=scope, block_sizes=sizes, lru_caps=(2, 5, 0.5), policies=("lru", "opt"))
    with tempfile.TemporaryDirectory() as folder:
        lines = [orjson.dumps({"request_id": r, "prefix_owners": owners.get(r, [])}) for r in range(4)]
        Path(folder, "requests.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        for shard in range(shards):
            mine = [r for r in records if r["request_id"] % shards == shard]
            mine.sort(key=lambda r: (r["engine_step"], r["request_id"]))
            write_shard(Path(folder, "block4", f"trace_steps_{shard}_{shard + 1}.jsonl"), mine)
        results = run(Path(folder, "block4"), config)
    for result, size in zip(results, sizes, strict=True):
        ordered = sorted(records, key=lambda r: (r["engine_step"], r["request_id"]))
        found = {key: result[key] for key in CACHES}
        want = caches(expected(ordered, owners, scope, size), config)
        assert_close(found, {key: want[key] for key in CACHES})


def shared_prefix(folder: Path, owners: list[list[int]]) -> Path:
    """Two requests that read the same first two blocks, one after the other."""
    lines = [orjson.dumps({"request_id": 1, "prefix_owners": owners})]
    (folder / "requests.jsonl").write_bytes(lines[0] + b"\n")
    records = [record(r, 0, 0, [0, 5, 9], 12) | {"engine_step": r} for r in range(2)]
    write_shard(folder / "block4" / "trace_steps.jsonl", records)
    return folder / "block4"


def test_a_shared_prefix_hits_where_it_is_known_to_be_shared(tmp_path: Path) -> None:
    for owners, hits in (([], 0), ([[0, 4]], 1), ([[0, 8]], 2)):
        (result,) = run(shared_prefix(tmp_path, owners), AnalyzeConfig(block_size=4, cache_scope="run", lru_caps=(9,)))
        assert result["cache_sim"]["9"]["hits"] == hits


def test_requests_of_one_batch_contend_for_a_cache_of_the_run(tmp_path: Path) -> None:
    records = [record(r, 0, s, [0, 5], 12) | {"engine_step": s} for s in range(5) for r in range(3)]
    write_shard(tmp_path / "trace_steps.jsonl", records)
    hits = {}
    for scope in ("stream", "run"):
        config = AnalyzeConfig(block_size=4, cache_scope=scope, lru_caps=(2, 6))
        (result,) = run(tmp_path, config)
        hits[scope] = [entry["hits"] for entry in result["cache_sim"].values()]
    assert hits == {"stream": [24, 24], "run": [8, 24]}


def test_what_a_shared_cache_needs_is_asked_for(tmp_path: Path) -> None:
    write_shard(tmp_path / "trace_steps.jsonl", [record(0, 0, step, [step]) for step in range(3)])
    with pytest.raises(InputError, match='"engine_step" is missing'):
        run(tmp_path, AnalyzeConfig(block_size=4, cache_scope="run"))
    with pytest.raises(InputError, match="not all records can be put in the order"):
        run(tmp_path, AnalyzeConfig(block_size=4, cache_scope="run", on_error="skip"))
    assert run(tmp_path, AnalyzeConfig(block_size=4, cache_scope="request"))
    with pytest.raises(InputError, match="--step-union merges them"):
        run(tmp_path, AnalyzeConfig(block_size=4, cache_scope="request", step_union=True))
    with pytest.raises(InputError, match="--key-mode request do not go together"):
        run(tmp_path, AnalyzeConfig(block_size=4, cache_scope="run", key_mode="request"))
    backwards = [record(0, 0, s, [s]) | {"engine_step": 5 - s} for s in range(3)]
    write_shard(tmp_path / "trace_steps.jsonl", backwards)
    with pytest.raises(InputError, match="engine_step goes backwards"):
        run(tmp_path, AnalyzeConfig(block_size=4, cache_scope="layer"))
    with pytest.raises(InputError, match="sink_recent goes by positions"):
        run(tmp_path, AnalyzeConfig(block_size=4, cache_scope="request", policies=("sink_recent",)))


@settings(max_examples=60)
@given(batches(), st.sampled_from(["stream", "request", "layer", "run"]))
def test_no_policy_beats_opt_and_more_memory_never_hurts_lru(
    made: tuple[list[Record], dict[int, list[tuple[int, int]]]], scope: Any
) -> None:
    records, _ = made
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder, "trace_steps.jsonl"), sorted(records, key=lambda r: r["engine_step"]))
        config = AnalyzeConfig(block_size=4, cache_scope=scope, lru_caps=(1, 2, 4, 99), policies=("all",))
        (result,) = run(Path(folder), config)
    simulated = result["policies"]
    assert set(simulated) == {*NAMES} - ({"sink_recent"} if scope != "stream" else set())
    for capacity in ("1", "2", "4", "99"):
        for name in simulated:
            assert simulated[name][capacity]["hits"] <= simulated["opt"][capacity]["hits"]
            total = simulated[name][capacity]["hits"] + simulated[name][capacity]["misses"]
            assert total == result["lru_curve"]["accesses"]
    curve = result["lru_curve"]
    assert simulated["opt"]["99"]["hits"] == curve["accesses"] - curve["first_accesses"]
    for mode in ("step", "sequential"):
        assert curve[mode]["hits"] == sorted(set(curve[mode]["hits"]))
    assert len(POLICIES) + 1 == len(NAMES)


def test_help_names_every_policy() -> None:
    (key,) = [key for key in keys("analyze") if key.name == "policies"]
    assert set(re.findall(r"[a-z0-9_]+", key.help)) >= {*NAMES, "all", "none"}
