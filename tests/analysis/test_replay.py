"""Replays of tiers against a cache that is simulated block by block."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsakv.analysis.kv_steps import KvSteps
from dsakv.analysis.replay import PHASES, Replay, ReplayOptions
from dsakv.policies import POLICIES
from dsakv.policies.placement import LOCAL, REMOTE, PlacementOptions
from dsakv.request import TIERS
from tests.analysis.kv_runs import Run, run_engine
from tests.analysis.test_kv_steps import read
from tests.analysis.tiers_oracle import HBM, SlowTiers

FIGURES = ("hits", "cold", "reads", "read_ops", "writes", "write_ops")


def replay(steps: Iterable[KvSteps], options: ReplayOptions) -> Replay:
    made = Replay(options)
    for batch in steps:
        made.add(batch)
    return made


@st.composite
def cases(draw: st.DrawFn) -> tuple[Run, ReplayOptions]:
    policy = draw(st.sampled_from(sorted(POLICIES)))
    alone = policy == "sink_recent"  # it needs blocks numbered as they lie
    run = run_engine(
        draw(st.integers(0, 10**6)),
        requests=draw(st.integers(1, 7)),
        batch_size=1 if alone else draw(st.sampled_from([1, 2, 4])),
        block_size=draw(st.sampled_from([1, 2, 5, 16, 64])),
        layers=draw(st.integers(1, 3)),
        prefix_cache=not alone and draw(st.booleans()),
        admission=draw(st.sampled_from(["batch", "continuous"])),
    )
    home = draw(st.sampled_from([LOCAL, REMOTE]))
    tiers = PlacementOptions(
        layers=run.layers,
        policy=POLICIES[policy](),
        hot=draw(st.sampled_from([1, 2, 3, 5, 9, 40])),
        scope="layer" if alone else draw(st.sampled_from(["layer", "shared"])),
        home=home,
        local=draw(st.sampled_from([0, 1, 3, 8])) if home == REMOTE else 0,
    )
    write = draw(st.sampled_from(["through", "back"]))
    return run, ReplayOptions(tiers, "back" if write == "back" else "through", draw(st.booleans()))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_replays_count_what_a_cache_does(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[Run, ReplayOptions]
) -> None:
    run, options = case
    if not run.steps:
        return
    slow = SlowTiers(options).replay(run)
    made = replay(read(run.write(tmp_path_factory.mktemp("run")), run.block_size), options)
    for phase in PHASES:
        for layer in range(run.layers):
            found = made.transfers(1000, 10, phase, layer)
            for tier, name in enumerate(TIERS):
                mine = found.get(name, dict.fromkeys(FIGURES, 0))
                for figure in FIGURES:
                    if (tier, figure) != (HBM, "reads"):
                        assert mine[figure] == slow.counts[phase, layer, tier, figure], (phase, layer, name, figure)
    total = made.transfers(1000, 10)
    rows = sum(slow.counts["decode", layer, HBM, "read_ops"] for layer in range(run.layers))
    assert total["hbm"]["reads"] is None
    assert total["hbm"]["bytes_read"] == 10 * rows
    for name in TIERS[1:]:
        if name in total:
            assert total[name]["bytes_read"] == 1000 * (total[name]["read_ops"] or 0)
            assert total[name]["bytes_written"] == 1000 * (total[name]["write_ops"] or 0)


def test_what_the_prefix_cache_keeps_at_last_is_not_known(tmp_path: Path) -> None:
    run = run_engine(4, requests=5, batch_size=2, block_size=4, prefix_cache=True)
    tiers = PlacementOptions(run.layers, POLICIES["lru"](), hot=4, home=REMOTE)
    steps = read(run.write(tmp_path), 4)
    for write, known in (("through", True), ("back", False)):
        options = ReplayOptions(tiers, "back" if write == "back" else "through", prefix_cache=True)
        written = replay(steps, options).transfers(8, 2)["remote_pool"]
        assert [written[name] is not None for name in ("writes", "write_ops", "bytes_written")] == [known] * 3
