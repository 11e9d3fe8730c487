"""Small traces: made up by Hypothesis, written as shards, analyzed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import orjson
from hypothesis import strategies as st

from dsakv.analysis.run import analyze_trace
from dsakv.config import AnalyzeConfig
from dsakv.trace.open import find_traces

Record = dict[str, Any]


def record(request: int | str, layer: int, step: int, positions: list[int], seq_len: int = 64) -> Record:
    return {
        "event": "dsa_topk",
        "request_id": request,
        "layer_id": layer,
        "step_idx": step,
        "seq_len_current": seq_len,
        "selected_token_pos": positions,
    }


def write_shard(path: Path, records: list[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(orjson.dumps(r) + b"\n" for r in records))


def run(trace_dir: Path, config: AnalyzeConfig) -> list[dict[str, Any]]:
    (trace,) = find_traces(trace_dir)
    return analyze_trace(trace, config, lambda done: None)


@st.composite
def requests(draw: st.DrawFn) -> list[list[Record]]:
    """The records of each of a few requests: gaps in the steps, layers of a step in any order, some without
    positions, some with one, some with them out of order, some of the prefill's tail.
    """
    names: list[Any] = draw(st.sampled_from([[0, 1, 2], [7, 3], ["b", "a"], [5]]))
    made = []
    for name in names:
        steps = sorted(draw(st.sets(st.integers(-2, 12), min_size=1, max_size=6)))
        layers = draw(st.integers(1, 3))
        mine = []
        for step in steps:
            seq_len = 30 + step
            for layer in draw(st.permutations(range(layers))):
                chosen = draw(st.lists(st.integers(0, seq_len - 1), min_size=0, max_size=9, unique=True))
                entry = record(name, layer, step, chosen, seq_len)
                if not chosen and draw(st.booleans()):
                    del entry["selected_token_pos"]
                mine.append(entry)
        made.append(mine)
    return made


def interleave(draw: st.DrawFn, parts: list[list[Record]]) -> list[Record]:
    """One list in which every part keeps its order."""
    turns = draw(st.permutations([i for i, part in enumerate(parts) for _ in part]))
    iterators = [iter(part) for part in parts]
    return [next(iterators[i]) for i in turns]


configs = st.builds(
    AnalyzeConfig,
    key_mode=st.sampled_from(["request_layer", "request"]),
    step_union=st.booleans(),
    lru_mode=st.sampled_from(["step", "sequential"]),
    max_steps_per_stream=st.integers(0, 4),
    prefill_tail=st.booleans(),
    reuse_cap_steps=st.sampled_from([1, 3, 2048]),
    block_sizes=st.sampled_from([(1,), (2, 64), (4, 7, 16)]),
    ws_windows=st.sampled_from([(1, 2), (3, 64)]),
    recent_token_windows=st.just((0, 4, 20)),
    recent_block_windows=st.just((0, 2, 5)),
    lru_caps=st.sampled_from([(1, 2, 3), (4, 6, 10**9), (0.1, 0.5, 3)]),
    skip_dense=st.booleans(),
)


def assert_close(got: Any, expected: Any, where: str = "") -> None:
    """Equal in shape, type of null and count; floats to 1e-9."""
    if isinstance(expected, dict):
        assert list(got) == list(expected), where
        for key, value in expected.items():
            assert_close(got[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), where
        for i, value in enumerate(expected):
            assert_close(got[i], value, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert math.isclose(got, expected, rel_tol=1e-9, abs_tol=1e-9), f"{where}: {got} != {expected}"
    else:
        assert got == expected, f"{where}: {got} != {expected}"
