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
from dsakv.request import TIERS, Step, StepRecords
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
    tiers = [0] * count if r.found is None else [int(tier) for tier in r.found[layer, b, :count]]
    fetched: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(TIERS):
        here = [p for p, tier in zip(positions, tiers, strict=True) if tier == i]
        ids = sorted({p // block_size for p in here})
        ops, op_bytes = (len(here), r.row_bytes) if name == "hbm" else (len(ids), block_size * r.row_bytes)
        fetched[name] = dict(UNUSED)
        if here:
            fetched[name] = {
                "hit_blocks": len(ids),
                "bytes_read": ops * op_bytes,
                "read_ops": ops,
                "latency_us": float(np.round(r.fetch_us[i, layer, b], 1)),
                "batch_size": int(r.fetch_batch[i, layer, b]),
            }
        if options.store_block_ids:
            fetched[name]["hit_block_ids"] = ids
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
        "kv_fetch": fetched,
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
        record["selected_block_ids"] = sorted(blocks)
    if options.store_scores:
        record["scores_topk"] = scores
    else:
        record["scores_stats"] = {"min": min(scores), "mean": sum(scores) / count, "max": max(scores)}
    return record


BLOCK_SIZES = [1, 3, 16, 64, 8192]


@st.composite
def some_steps(draw: st.DrawFn, block_size: int = 16) -> list[Step]:
    """Steps with rows of different length, padding in the surplus columns, and steps without records.

    Some find all blocks on the device, others any of them in any tier.
    """
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
        found = None
        if draw(st.booleans()):
            found = rng.integers(0, 3, (layers, queries, columns)).astype(np.uint8)  # of padding anything
            tiers = rng.choice(
                draw(st.sampled_from([[0, 1, 2], [1, 2], [2]])), (layers, queries, 5001 // block_size + 1)
            )
            for layer in range(layers):
                for b in range(queries):
                    found[layer, b, : counts[b]] = tiers[layer, b, positions[layer, b, : counts[b]] // block_size]
        fetch_us = rng.uniform(0, 1000, (3, layers, queries))
        fetch_batch = rng.integers(1, 9, (3, layers, queries))
        for layer in range(layers):
            for b in range(queries):
                seen = {0} if found is None else {*found[layer, b, : counts[b]].tolist()}
                for tier in {1, 2} - seen:  # the device reads for every query, whatever it held
                    fetch_us[tier, layer, b], fetch_batch[tier, layer, b] = np.nan, 0
        records = StepRecords(
            request_id=rng.permutation(queries),
            step_idx=rng.integers(-2, 100, queries),
            step_offset=np.sort(rng.integers(0, 3, queries)),
            seq_len=seq_len,
            counts=counts,
            positions=positions,
            scores=rng.standard_normal(positions.shape).astype(np.float32),
            index_layer_id=np.zeros(layers, dtype=np.int32),
            found=found,
            fetch_us=fetch_us,
            fetch_batch=fetch_batch,
            row_bytes=int(rng.integers(1, 2000)),
        )
        steps.append(Step(index, "decode", 10 * index, [], 0, [], records))
    return steps


@given(
    steps_of=st.sampled_from(BLOCK_SIZES).flatmap(lambda size: st.tuples(some_steps(size), st.just(size))),
    prefix=st.lists(st.integers(0, 40), min_size=3, max_size=3),
    options=st.builds(
        TraceConfig, store_token_pos=st.booleans(), store_scores=st.booleans(), store_block_ids=st.booleans()
    ),
)
def test_lines_are_what_a_plain_computation_gives(
    steps_of: tuple[list[Step], int], prefix: list[int], options: TraceConfig
) -> None:
    steps, block_size = steps_of
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
        found=None,
        fetch_us=np.array([[[3.0]], [[np.nan]], [[np.nan]]]),
        fetch_batch=np.array([[[1]], [[0]], [[0]]]),
        row_bytes=8,
    )
    return Step(0, "decode", 1, [], 0, [], replace(records, **changes))


@pytest.mark.parametrize("positions", [[0, 5, 9], [-1, 5, 8], [0, 5, 5], [5, 0, 8]])
def test_impossible_positions_are_refused(positions: list[int]) -> None:
    batch = to_batch([one_record(positions=np.array([[positions]], dtype=np.int32))], seed=0)
    assert batch is not None
    with pytest.raises(ValueError, match="request 4, layer 0, step 2: selected positions are not ascending"):
        derive(batch, 4, np.array([0]))


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        ([0, 0, 1], "request 4, layer 0, step 2: blocks were found in local_pool, but no batch read them"),
        ([0, 0, 3], "several tiers at once, or in an unknown one"),
        ([0, 255, 255], "several tiers at once, or in an unknown one"),
    ],
)
def test_tiers_that_contradict_the_reads_are_refused(found: list[int], complaint: str) -> None:
    batch = to_batch([one_record(found=np.array([[found]], dtype=np.uint8))], seed=0)
    assert batch is not None
    with pytest.raises(ValueError, match=complaint):
        derive(batch, 4, np.array([0]))


def test_a_block_in_two_tiers_is_refused() -> None:
    batch = to_batch([one_record(found=np.array([[[0, 0, 1]]], dtype=np.uint8))], seed=0)
    assert batch is not None
    with pytest.raises(ValueError, match="several tiers at once"):
        derive(batch, 9, np.array([0]))


def test_an_empty_selection_is_refused() -> None:
    batch = to_batch([one_record(counts=np.array([0]))], seed=0)
    assert batch is not None
    with pytest.raises(ValueError, match="selects nothing"):
        derive(batch, 4, np.array([0]))


def test_scores_that_are_not_finite_name_their_place() -> None:
    scores = np.array([[[1.0, np.nan, 0.5]]], dtype=np.float32)
    with pytest.raises(DsakvError, match="index scores of request 4 in layer 0 are not finite"):
        to_batch([one_record(scores=scores)], seed=0)
