"""A plan in the terminal and in the HTML report."""

from __future__ import annotations

import io
from pathlib import Path

import orjson
import pytest

from dsakv.cli import run
from dsakv.config import AnalyzeConfig
from dsakv.console import Console
from dsakv.jobs.analyze import AnalysisOutcome, analyze
from dsakv.report import html
from tests.analysis.decoded import write
from tests.report.test_html import _Page
from tests.report.test_terminal import printed


def outcome(folder: Path, **options: str | tuple[str, ...]) -> AnalysisOutcome:
    for name in ("one", "two") if options.pop("runs", "") else ("one",):
        write(folder / name)
    config = AnalyzeConfig(input=str(folder), plan=True, out=str(folder / "out.json"), **options)  # type: ignore[arg-type]
    return analyze(config, Console(io.StringIO(), io.StringIO()))


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("links", ["pcie5", "pcie4+nvme"])
def test_the_terminal_has_answers_and_a_table_for_each_pool(tmp_path: Path, width: int, links: str) -> None:
    made = outcome(tmp_path, links=links, plan_policies=("lru", "s3fifo"))
    shown = printed(made.document, width)
    assert "\u2026" not in shown
    assert shown.count("Plan for tiers") == 1
    assert shown.count("Added TPOT by hot capacity") == 1 + ("+" in links)
    assert "nominal figures, not measured" in " ".join(shown.split())
    for question in ("How much hot capacity", "Token rows or pages", "From which concurrency"):
        assert question in shown
    assert "s3fifo" in shown
    assert orjson.loads(made.out.read_bytes())["results"][0]["plan"] == made.document["results"][0]["plan"]


def test_the_report_has_charts_and_tables(tmp_path: Path) -> None:
    made = outcome(tmp_path, links="pcie4+nvme", runs="two")
    page = _Page(html.render(made.document))
    assert page.text.count("Plan for tiers: ") == 2 * 2  # its heading, and the link to it
    plan = made.document["results"][0]["plan"]
    added = [chart for chart in page.charts if chart["title"] == "Added TPOT over hot capacity, KV in remote pool"]
    assert len(added) == 2
    line = added[0]["data"][0]
    assert line["name"] == "rows (1 token)"
    assert line["y"] == [row["tiers"]["remote_pool"]["added_ms"] for row in plan["sizes"][0]["rows"]]
    assert "Bytes read from far over hot capacity" in {chart["title"] for chart in page.charts}
    assert page.text.count("Hot capacities, KV in host memory") == 2


def test_without_plan_nothing_is_planned(tmp_path: Path) -> None:
    write(tmp_path / "run")
    made = analyze(AnalyzeConfig(input=str(tmp_path)), Console(io.StringIO(), io.StringIO()))
    assert "plan" not in made.document["results"][0]
    assert "Plan for tiers" not in printed(made.document)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--links pcie9", "there is no link profile pcie9"),
        ("--links nothing.json", "cannot read link profile nothing.json"),
        ("--plan-budget 0", "--plan-budget must be a number > 0"),
        ("--plan-hot 0,1", "--plan-hot must be a list of numbers > 0"),
        ("--plan-hot 1.5", "1.5 is neither a share nor a number of blocks"),
        ("--plan-policies best", "there is no policy best"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, error: str
) -> None:
    write(tmp_path / "run")
    assert run(["analyze", "--input", str(tmp_path), "--plan", *flags.split()]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said[-2:]] == ["error", "hint"]
    assert error in said[-2]
    assert not (tmp_path / "run" / "block4" / "analysis.json").exists()
