"""Decode's sets of blocks from a trace, against those that a made-up engine knew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsakv.analysis.kv_facts import KvFacts, RequestKv, read_kv_facts
from dsakv.analysis.kv_steps import KvSteps, kv_steps
from dsakv.analysis.kv_tables import BlockTables
from dsakv.errors import InputError
from dsakv.trace.intake import Intake
from dsakv.trace.open import find_traces
from dsakv.trace.units import to_units
from tests.analysis.kv_runs import DecodeStep, Run, run_engine

runs = st.builds(
    run_engine,
    st.integers(0, 10**6),
    requests=st.integers(1, 7),
    batch_size=st.sampled_from([1, 2, 4]),
    block_size=st.sampled_from([1, 2, 3, 8, 64]),
    layers=st.integers(1, 3),
    prefix_cache=st.booleans(),
    admission=st.sampled_from(["batch", "continuous"]),
)


def read(trace_dir: Path, block_size: int, **options: Any) -> list[KvSteps]:
    (trace,) = find_traces(trace_dir)
    intake = Intake("strict", engine_steps=True)
    return list(kv_steps(to_units(trace.shards), read_kv_facts(trace), block_size, intake, **options))


Event = tuple[Any, ...]


def events_of(batches: list[KvSteps]) -> list[Event]:
    """Everything that steps say, one thing after the other."""
    events: list[Event] = []
    for steps in batches:
        for r in range(len(steps) + 1):
            events += [("drop", ids.tolist()) for at, ids in steps.ended if at == r]
            if r == len(steps):
                break
            events += [("begin", ids.tolist()) for at, ids in steps.begins if at == r]
            inside = slice(int(steps.offsets[r]), int(steps.offsets[r + 1]))
            facts = (steps.layer, steps.engine_step, steps.touched, steps.open_touched, steps.queries, steps.rows)
            events.append(
                ("step", steps.ids[inside].tolist(), steps.written[inside].tolist(), *(int(f[r]) for f in facts))
            )
    return events


def expected(run: Run, tables: Mapping[int, list[int]], size: int, dropped: list[list[int]]) -> list[Event]:
    """The same from what the engine knew, with the ids of ``tables``; ``dropped`` after each step."""
    events: list[Event] = []
    for step, ids in zip(run.steps, dropped, strict=True):
        for layer in range(run.layers):
            events += _layer(step, layer, tables, size)
        if ids:
            events.append(("drop", ids))
    return events


def _layer(step: DecodeStep, layer: int, tables: Mapping[int, list[int]], size: int) -> list[Event]:
    begun, touched, opened, closing = set(), set(), set(), set()
    rows = 0
    for sequence, number, seq_len in step.batch:
        table, positions = tables[sequence.request], step.selected[layer, sequence.request]
        touched |= {table[position // size] for position in positions}
        opened.add(table[(seq_len - 1) // size])
        if seq_len % size == 0:
            closing.add(table[(seq_len - 1) // size])
        if number == 0:
            begun |= set(table[: len(sequence.prompt) // size])
        rows += len(positions)
    ids = sorted((touched - opened) | closing)
    made: list[Event] = [("begin", sorted(begun))] if begun else []
    facts = (layer, step.engine_step, len(touched), len(touched & opened), len(step.batch), rows)
    return [*made, ("step", ids, [block in closing for block in ids], *facts)]


@settings(max_examples=150, deadline=None)
@given(runs, st.integers(1, 3))
def test_steps_are_those_of_the_engine(tmp_path_factory: pytest.TempPathFactory, run: Run, shards: int) -> None:
    if not run.steps:
        return
    trace = run.write(tmp_path_factory.mktemp("run"), shards)
    found = events_of(read(trace, run.block_size))
    tables = {sequence.request: sequence.table for sequence in run.sequences}
    assert found == expected(run, tables, run.block_size, [step.unheld for step in run.steps])


def facts_of(run: Run) -> KvFacts:
    return KvFacts(
        {
            one.request: RequestKv(len(one.prompt), one.decode_steps, False, tuple((b, 1) for b in one.table))
            for one in run.sequences
        },
        run.block_size,
        run.layers,
        1.0,
    )


@settings(max_examples=150, deadline=None)
@given(runs, st.sampled_from([1, 2, 3, 4, 5, 8, 12, 64]))
def test_tables_for_another_block_size(tmp_path_factory: pytest.TempPathFactory, run: Run, size: int) -> None:
    """A block is the same for two requests exactly where every block under it is, and has a number of its own."""
    if not run.steps or size == run.block_size:
        return
    tables = BlockTables(facts_of(run), size)
    requests = facts_of(run).requests
    content: dict[int, Any] = {}  # what holds each number
    live: dict[int, dict[int, Any]] = {}  # by request: content by number
    dropped = []
    ids: dict[int, list[int]] = {}
    for step in run.steps:
        for sequence, number, seq_len in step.batch:
            if number == 0:
                total = len(sequence.prompt) + sequence.decode_steps
                tables.begin(sequence.request, requests[sequence.request], seq_len)
                row = tables.grid[tables.row(sequence.request)]
                ids[sequence.request] = [int(n) for n in row[: -(-total // size)]]
                mine = {}
                for block, number_of in enumerate(ids[sequence.request]):
                    below = range(block * size // run.block_size, -(-(block + 1) * size // run.block_size))
                    whole = (block + 1) * size <= total
                    under = tuple(sequence.table[b] for b in below if b < len(sequence.table))
                    mine[number_of] = (block, under, None if whole else sequence.request)
                assert len(mine) == len(ids[sequence.request])
                for number_of, what in mine.items():
                    assert content.setdefault(number_of, what) == what
                live[sequence.request] = mine
        names = list(content.values())
        assert len(set(names)) == len(names)
        ended = [sequence.request for sequence, number, _ in step.batch if number + 1 == sequence.decode_steps]
        gone = tables.end(ended)
        for request in ended:
            del live[request]
        held = {number for mine in live.values() for number in mine}
        assert gone.tolist() == sorted(content.keys() - held)
        content = {number: what for number, what in content.items() if number in held}
        dropped.append(gone.tolist())
        tables.reuse_rows()
    trace = run.write(tmp_path_factory.mktemp("run"))
    assert events_of(read(trace, size)) == expected(run, ids, size, dropped)


def test_without_tables_requests_share_nothing_and_one_alone_has_blocks_in_the_order_of_its_tokens(
    tmp_path: Path,
) -> None:
    run = run_engine(3, requests=4, batch_size=1, block_size=4, prefix_cache=True)
    trace = run.write(tmp_path)
    lines = [{k: v for k, v in line.items() if k != "kv_blocks"} for line in run.lines()]
    (tmp_path / "requests.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    (found,) = find_traces(trace)
    assert not read_kv_facts(found).has_tables
    by_place = {one.request: list(range(99)) for one in run.sequences}
    dropped = []
    for step in run.steps:
        ended = [sequence for sequence, number, _ in step.batch if number + 1 == sequence.decode_steps]
        dropped.append([b for one in ended for b in range(-(-(len(one.prompt) + one.decode_steps) // 4))])
    assert events_of(read(trace, 4)) == expected(run, by_place, 4, dropped)


def test_requests_that_never_finished_have_blocks_of_their_own(tmp_path: Path) -> None:
    run = run_engine(8, requests=6, batch_size=3, block_size=4, prefix_cache=True)
    trace = run.write(tmp_path)
    kept = run.lines()[:3]
    (tmp_path / "requests.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in kept))
    steps = read(trace, 4)
    top = max(first + count for line in kept for first, count in line["kv_blocks"])
    alone = [s for s in run.steps if all(sequence.request >= 3 for sequence, _, _ in s.batch)]
    assert alone
    for batch in steps:
        for r, engine_step in enumerate(batch.engine_step.tolist()):
            if any(step.engine_step == engine_step for step in alone):
                assert (batch.ids[batch.offsets[r] : batch.offsets[r + 1]] >= top).all()
    assert sum(int(batch.queries.sum()) for batch in steps) == sum(1 for _ in run.records())


BAD: list[tuple[Any, str]] = [
    ({"kv_blocks": [[0, 1], [0, 9]]}, "a block twice"),
    ({"kv_blocks": [[1 << 28, 1]]}, "no cache is large enough"),
    ({"kv_blocks": [[0, 1]]}, "hold 4 tokens"),
    ({"kv_blocks": [[0, 0]]}, "no runs"),
    ({"kv_blocks": [[True, 1]]}, "no runs"),
    ({"kv_blocks": 5}, "damaged"),
    ({"prompt_tokens": "9"}, "no number of tokens"),
    ({"forced": 1}, "neither true nor false"),
    ({"prompt_tokens": 2}, "files are not of one run"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_files_at_odds_are_told(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    run = run_engine(5, requests=1, batch_size=1, block_size=4)
    trace = run.write(tmp_path)
    (line,) = run.lines()
    (tmp_path / "requests.jsonl").write_bytes(orjson.dumps(line | change) + b"\n")
    with pytest.raises(InputError) as raised:
        read(trace, 4)
    assert message in f"{raised.value.message} {raised.value.hint}"


def test_a_sampled_trace_is_refused(tmp_path: Path) -> None:
    run = run_engine(5, requests=1, batch_size=1, block_size=4)
    with pytest.raises(InputError, match="25% of the decode steps"):
        read(run.write(tmp_path, trace={"sample_rate": 0.25}), 4)


def test_known_answers_are_read_as_if_decoded_or_left_out(tmp_path: Path) -> None:
    run = run_engine(6, requests=5, batch_size=2, block_size=4)
    trace = run.write(tmp_path)
    forced = 2
    lines = [line | {"forced": line["request_id"] == forced} for line in run.lines()]
    (tmp_path / "requests.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    steps = {own: sum(int(b.queries.sum()) for b in read(trace, 4, forced=own)) for own in (True, False)}
    assert steps[True] - steps[False] == run.sequences[forced].decode_steps * run.layers > 0
    assert np.concatenate([b.ids for b in read(trace, 4)]).max() < run.n_blocks
