from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from dsakv.report.charts import POINTS, thinned, ticks
from dsakv.report.compare import bytes_of, capacities, curve, runs
from dsakv.report.measures import definitions
from dsakv.report.text import figure, percent, short, size
from tests.report.documents import KINDS, analyzed, document, four_runs, write_trace


def test_runs_group_block_sizes_and_lead_with_the_traces_own(tmp_path: Path) -> None:
    found = runs(four_runs(tmp_path, block_sizes=(8, 2, 4)))
    assert [run.label for run in found] == ["burstgpt", "longbenchv2", "ruler", "sharegpt"]
    assert [[result["block_size_tokens"] for result in run.results] for run in found] == [[2, 4, 8]] * 4
    assert {run.lead["block_size_tokens"] for run in found} == {4}
    assert runs(analyzed(tmp_path, block_sizes=(8, 2)))[0].lead["block_size_tokens"] == 8


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_trace(tmp_path / name)
        write_trace(tmp_path / "x" / f"other{name}_1", name="other" + name)
    write_trace(tmp_path / "mine", name="generate")
    write_trace(tmp_path / "y" / "mine", name="generate")
    assert [run.label for run in runs(analyzed(tmp_path))] == [
        "a",
        "b",
        str(tmp_path / "mine" / "block4"),
        "othera",
        "otherb",
        str(tmp_path / "y" / "mine" / "block4"),
    ]


@pytest.mark.parametrize("mode", ["step", "sequential"])
def test_curves_agree_with_the_simulated_capacities(tmp_path: Path, mode: str) -> None:
    (result,) = document(tmp_path, lru_mode=mode, lru_caps=(1, 7, 60, 10**6))["results"]
    for entry in capacities(result):
        assert entry.hit_rate == curve(result).rate(entry.blocks)
    assert result["run_meta"]["model"]["kv_bytes_per_token_layer"] == 1000
    assert bytes_of(result, 3) == 3 * 4 * 1000


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_shown_is_defined(tmp_path: Path, kind: str) -> None:
    made = document(tmp_path, **KINDS[kind])
    names = [name for name, _ in definitions(made["results"])]
    assert len(set(names)) == len(names)
    assert {"blocks of a record", "read amplification", "needles found"} <= set(names)
    assert ("step Jaccard" in names) == (kind != "one step")


def test_thinned_curves_keep_what_decides() -> None:
    x = list(range(1, 50_001))
    y = [min(1.0, capacity / 40_000) ** 0.3 for capacity in x]
    at = thinned(x, y, [12_345])
    assert at[0] == 0
    assert at[-1] == len(x) - 1
    assert x.index(12_345) in at
    assert POINTS // 2 < len(at) <= POINTS + 3
    assert max(y[b] - y[a] for a, b in pairwise(at)) < 0.05
    assert thinned(x[:9], y[:9]) == list(range(9))


def test_ticks_are_round_and_few() -> None:
    assert ticks(1, 1000) == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    assert ticks(117, 680) == [150, 200, 300, 400, 500]
    assert ticks(1, 1) == [1]


def test_numbers_for_people() -> None:
    values = (None, 0, 3.0, 12345, 0.8239, 99.98765, 1305.44)
    assert [figure(v) for v in values] == ["-", "0", "3", "12,345", "0.824", "99.988", "1,305.4"]
    assert [short(v) for v in values] == ["-", "0", "3", "12,345", "0.82", "100.0", "1,305"]
    assert [percent(v) for v in (None, 0.0, 0.97249)] == ["-", "0.0%", "97.2%"]
    assert [size(v) for v in (None, 999, 18_874_368, 150_994_944, 4e15)] == [
        "-",
        "999 B",
        "18.9 MB",
        "151 MB",
        "4,000.0 TB",
    ]
