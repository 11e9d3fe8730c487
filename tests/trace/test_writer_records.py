"""Lines of a trace against a plain recomputation from the step."""

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsakv.config import TraceConfig
from dsakv.errors import DsakvError
from dsakv.request import Step, StepRecords
from dsakv.trace.jsonl_writer import record_lines
from dsakv.trace.records import PrefixFacts, derive, sampled, to_batch

UNUSED = {"hit_blocks": 0, "bytes_read": 0, "read_ops": 0, "latency_us": None, "batch_size": 0}


def nearest_rank(values: list[int], q: float) -> int:
    return sorted(values)[round((len(values) - 1) * q)]


def share(part: int, whole: int) -> float:
    return round(Fraction(part, whole) * 10**6) / 10**6


def expected_record(
    step: Step, b: int, layer: int, block_size: int, facts: PrefixFacts, options: TraceConfig
) -> dict[str, Any]:
    r = step.records
    assert r is not None
    count, seq_len = int(r.counts[b]), int(r.seq_len[b])
    positions = [int(p) for p in r.positions[layer, b, :count]]
    scores = [float(s) for s in r.scores[layer, b, :count]]
    offsets = [seq_len - 1 - p for p in positions]
    blocks = Counter(p // block_size for p in positions)
    shared = sum(block < facts.prefix_cached_blocks for block in blocks)
    hit: dict[str, Any] = {
        "hit_blocks": len(blocks),
        "bytes_read": count * r.row_bytes,
        "read_ops": count,
        "latency_us": round(float(r.gather_us[layer, b]), 1),
        "batch_size": int(r.gather_batch[layer, b]),
    }
    unused: dict[str, Any] = dict(UNUSED)
    record: dict[str, Any] = {
        "event": "dsa_topk",
        "request_id": int(r.request_id[b]),
        "layer_id": layer,
        "index_layer_id": int(r.index_layer_id[layer]),
        "step_idx": int(r.step_idx[b]),
        "engine_step": step.index + int(r.step_offset[b]),
        "step_wall_us": step.wall_us,
        "seq_len_current": seq_len,
        "unique_token_pos_count": count,
        "offset_min": min(offsets),
        "offset_p50": nearest_rank(offsets, 0.5),
        "offset_max": max(offsets),
        "block_size_tokens": block_size,
        "unique_blocks": len(blocks),
        "touched_block_ratio": share(len(blocks), -(-seq_len // block_size)),
        "tokens_per_touched_block": {
            "mean": count / len(blocks),
            "p50": nearest_rank([*blocks.values()], 0.5),
            "p95": nearest_rank([*blocks.values()], 0.95),
        },
        "kv_fetch": {"hbm": hit, "local_pool": unused, "remote_pool": unused},
        "prefix": {
            "prefix_cache_hit": facts.prefix_cached_blocks > 0,
            "prefix_cached_blocks": facts.prefix_cached_blocks,
            "prefix_key": facts.prefix_key,
            "intersection_ratio": share(shared, len(blocks)),
            "intersection_blocks": shared,
        },
    }
    if options.store_token_pos:
        record["selected_token_pos"] = positions
    if options.store_block_ids:
        record["selected_block_ids"] = hit["hit_block_ids"] = sorted(blocks)
        unused["hit_block_ids"] = []
    if options.store_scores:
        record["scores_topk"] = scores
    else:
        record["scores_stats"] = {"min": min(scores), "mean": sum(scores) / count, "max": max(scores)}
    return record


@st.composite
def some_steps(draw: st.DrawFn) -> list[Step]:
    """Steps with rows of different length, padding in the surplus columns, and steps without records."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    layers = draw(st.integers(1, 3))
    steps = []
    for index in range(draw(st.integers(1, 4))):
        queries = draw(st.integers(0, 3))
        if queries == 0:
            steps.append(Step(index, "prefill", 1, [], 5, [], None))
            continue
        seq_len = rng.integers(1, draw(st.sampled_from([3, 60, 5000])), queries, endpoint=True)
        counts = np.minimum(seq_len, draw(st.sampled_from([1, 7, 64])))
        columns = int(counts.max()) + draw(st.integers(0, 2))
        positions = np.full((layers, queries, columns), draw(st.sampled_from([0, 2**31 - 1, -1])), dtype=np.int32)
        for layer in range(layers):
            for b in range(queries):
                positions[layer, b, : counts[b]] = np.sort(rng.choice(seq_len[b], counts[b], replace=False))
        records = StepRecords(
            request_id=rng.permutation(queries),
            step_idx=rng.integers(-2, 100, queries),
            step_offset=np.sort(rng.integers(0, 3, queries)),
            seq_len=seq_len,
            counts=counts,
            positions=positions,
            scores=rng.standard_normal(positions.shape).astype(np.float32),
            index_layer_id=np.zeros(layers, dtype=np.int32),
            gather_us=rng.uniform(0, 1000, positions.shape[:2]),
            gather_batch=rng.integers(1, 9, positions.shape[:2]),
            row_bytes=int(rng.integers(1, 2000)),
        )
        steps.append(Step(index, "decode", 10 * index, [], 0, [], records))
    return steps


@given(
    steps=some_steps(),
    block_size=st.sampled_from([1, 3, 16, 64, 8192]),
    prefix=st.lists(st.integers(0, 40), min_size=3, max_size=3),
    options=st.builds(
        TraceConfig, store_token_pos=st.booleans(), store_scores=st.booleans(), store_block_ids=st.booleans()
    ),
)
def test_lines_are_what_a_plain_computation_gives(
    steps: list[Step], block_size: int, prefix: list[int], options: TraceConfig
) -> None:
    facts = [PrefixFacts(f"key{i}", blocks) for i, blocks in enumerate(prefix)]
    expected = [
        expected_record(step, b, layer, block_size, facts[step.records.request_id[b]], options)
        for step in steps
        if step.records is not None
        for b in range(len(step.records.request_id))
        for layer in range(len(step.records.index_layer_id))
    ]
    batch = to_batch(steps, seed=0)
    if batch is None:
        assert not expected
        return
    of_record = [facts[request_id] for request_id in batch.request_id]
    derived = derive(batch, block_size, np.array([f.prefix_cached_blocks for f in of_record]))
    lines = record_lines(batch, derived, block_size, of_record, options)
    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in lines)
    found = [json.loads(line) for line in lines]
    for record, other in zip(found, expected, strict=True):
        if options.store_scores:
            assert np.array_equal(np.float32(record.pop("scores_topk")), np.float32(other.pop("scores_topk")))
        else:
            assert record.pop("scores_stats") == pytest.approx(other.pop("scores_stats"), rel=1e-5, abs=1e-6)
        assert record == other


@given(steps=some_steps(), cut=st.integers(0, 4))
def test_lines_do_not_depend_on_what_they_are_batched_with(steps: list[Step], cut: int) -> None:
    def lines(some: list[Step]) -> list[bytes]:
        batch = to_batch(some, seed=0)
        if batch is None:
            return []
        facts = [PrefixFacts("", 2)] * len(batch)
        return record_lines(batch, derive(batch, 16, np.full(len(batch), 2)), 16, facts, TraceConfig())

    assert lines(steps) == lines(steps[:cut]) + lines(steps[cut:])


@given(steps=some_steps(), rate=st.sampled_from([0.1, 0.5, 0.9]), seed=st.integers(0, 2**63 - 1))
def test_sampling_filters_whole_steps(steps: list[Step], rate: float, seed: int) -> None:
    whole, part = to_batch(steps, seed), to_batch(steps, seed, rate)
    if whole is None:
        assert part is None
        return
    keep = sampled(seed, whole.request_id, whole.step_idx, rate)
    rows = np.flatnonzero(keep)
    if part is None:
        assert len(rows) == 0
        return
    for name in ("request_id", "layer_id", "step_idx", "engine_step"):
        assert np.array_equal(getattr(whole, name)[rows], getattr(part, name))
    kept = [whole.positions[whole.offsets[r] : whole.offsets[r + 1]] for r in rows]
    assert np.array_equal(np.concatenate(kept), part.positions)


def test_sampling_is_fair_and_depends_on_all_its_keys() -> None:
    request, step = (axis.reshape(-1) for axis in np.meshgrid(np.arange(100), np.arange(-3, 200), indexing="ij"))
    kept = sampled(0, request, step, 0.1)
    assert abs(kept.mean() - 0.1) < 0.01
    assert abs((kept & sampled(1, request, step, 0.1)).mean() - 0.01) < 0.004
    assert not (kept & ~sampled(0, request, step, 0.3)).any()  # a higher rate keeps what a lower one keeps
    assert len({kept[request == r].tobytes() for r in range(100)}) == 100
    assert sampled(0, request, step, 1.0).all()


def one_record(**changes: Any) -> Step:
    records = StepRecords(
        request_id=np.array([4]),
        step_idx=np.array([2]),
        step_offset=np.array([0]),
        seq_len=np.array([9]),
        counts=np.array([3]),
        positions=np.array([[[0, 5, 8]]], dtype=np.int32),
        scores=np.array([[[1.0, 2.0, 0.5]]], dtype=np.float32),
        index_layer_id=np.array([0], dtype=np.int32),
        gather_us=np.array([[3.0]]),
        gather_batch=np.array([[1]]),
        row_bytes=8,
    )
    return Step(0, "decode", 1, [], 0, [], replace(records, **changes))


@pytest.mark.parametrize("positions", [[0, 5, 9], [-1, 5, 8], [0, 5, 5], [5, 0, 8]])
def test_impossible_positions_are_refused(positions: list[int]) -> None:
    batch = to_batch([one_record(positions=np.array([[positions]], dtype=np.int32))], seed=0)
    assert batch is not None
    with pytest.raises(ValueError, match="request 4, layer 0, step 2: selected positions are not ascending"):
        derive(batch, 4, np.array([0]))


def test_an_empty_selection_is_refused() -> None:
    batch = to_batch([one_record(counts=np.array([0]))], seed=0)
    assert batch is not None
    with pytest.raises(ValueError, match="selects nothing"):
        derive(batch, 4, np.array([0]))


def test_scores_that_are_not_finite_name_their_place() -> None:
    scores = np.array([[[1.0, np.nan, 0.5]]], dtype=np.float32)
    with pytest.raises(DsakvError, match="index scores of request 4 in layer 0 are not finite"):
        to_batch([one_record(scores=scores)], seed=0)
