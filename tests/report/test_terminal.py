from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from dsakv.report import terminal
from dsakv.report.grids import RANDOM
from dsakv.report.terminal import sparkline
from tests.report.documents import KINDS, NASTY, analyzed, document, four_runs, write_trace


def printed(made: dict[str, Any], width: int = 120) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(terminal.render(made))
    assert max(cell_len(line) for line in out.getvalue().splitlines()) <= width
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_result_fits(tmp_path: Path, kind: str, width: int) -> None:
    made = document(tmp_path, **KINDS[kind])
    made["results"][0]["decision"] = [
        {"question": "How much?", "answer": "60 blocks of near memory " * 9, "rule": "enough", "measured": {"x": None}}
    ]
    for result in made["results"]:
        result["decision"] = made["results"][0]["decision"]
    shown = printed(made, width)
    assert shown.index("How much?") < shown.index("60 blocks of near memory") < shown.index("Hit rate by capacity")
    assert "…" not in shown
    assert ("Layers" in shown) == bool(made["results"][0]["layers"])
    assert ("Block sizes compared" in shown) == (len(made["results"]) > 1)
    assert len(shown.splitlines()) < 70


@pytest.mark.parametrize("width", [80, 120])
def test_runs_stand_side_by_side(tmp_path: Path, width: int) -> None:
    shown = printed(four_runs(tmp_path, block_sizes=(2, 4)), width)
    assert "…" not in shown
    table = shown[shown.index("Runs side by side") :].splitlines()[2:6]
    assert [line.split()[0] for line in table] == ["burstgpt", "longbenchv2", "ruler", "sharegpt"]
    assert shown.index("Decision: ruler") < shown.index("Runs side by side") < shown.index("Hit rate by capacity")


def test_capacities_below_a_step_are_marked(tmp_path: Path) -> None:
    shown = printed(document(tmp_path, policies=("all",)))
    assert " 16!" in shown
    assert "100!" not in shown
    assert "! below the p95 of a step's set" in shown
    assert "OPT" in shown


def test_nothing_from_the_trace_steers_the_terminal(tmp_path: Path) -> None:
    write_trace(tmp_path / "run", name=NASTY)
    made = analyzed(tmp_path)
    made["results"][0]["decision"] = [{"question": NASTY, "answer": NASTY, "rule": NASTY, "measured": {NASTY: NASTY}}]
    made["results"][0]["warnings"].append(NASTY)
    shown = printed(made)
    assert "\x1b" not in shown
    assert "<b>[red]&amp;" in shown


def test_random_weights_and_warnings_are_said(tmp_path: Path) -> None:
    write_trace(tmp_path / "run", random=True)
    shown = printed(analyzed(tmp_path))
    assert shown.index(RANDOM) < shown.index("Hit rate by capacity")
    assert "warning: the model's weights are random" in shown


def test_what_the_figures_are_not_is_said_before_them(tmp_path: Path) -> None:
    write_trace(tmp_path / "run", caveat="not of [red]a\x1b large model")
    shown = printed(analyzed(tmp_path))
    said = "Note: not of [red]a\N{REPLACEMENT CHARACTER} large model."
    assert shown.index(said) < shown.index("Hit rate by capacity")
    assert "warning: not of [red]a" in shown


def test_many_layers_are_one_line(tmp_path: Path) -> None:
    write_trace(tmp_path / "run", layers=61, steps=4)
    shown = printed(analyzed(tmp_path), 80)
    assert "layers 0 to 60" in shown
    assert "…" not in shown


def test_a_long_name_leaves_the_numbers_whole(tmp_path: Path) -> None:
    for place in range(2):
        write_trace(tmp_path / f"run{place}", name="long" * 30 + str(place))
    assert "…" not in printed(analyzed(tmp_path), 80).split("Runs side by side")[1].split("blocks of a record")[0]


def test_sparklines() -> None:
    assert sparkline([0, 1, None, 0.5]) == "▁█ ▅"
    assert sparkline([2, 2]) == "▅▅"
    assert sparkline([None]) == " "
    assert sparkline([]) == ""
    assert sparkline([*range(100)], 10) == "▁▂▃▃▄▅▆▆▇█"
