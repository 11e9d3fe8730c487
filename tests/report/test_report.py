from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import orjson
import pytest
from rich.console import Console

from dsakv.analysis.run import analyze_trace
from dsakv.config import AnalyzeConfig
from dsakv.report import html, terminal
from dsakv.report.charts import line_chart
from dsakv.report.tables import figure, header, tables
from dsakv.trace.open import find_traces

NASTY = '<script>alert("1")</script>[red]&\x1b[31m'


def document(folder: Path, **options: Any) -> dict[str, Any]:
    trace = folder / "block<b>4"
    trace.mkdir()
    meta = {"block_size_tokens": 4, "dataset": NASTY, "model": {"name": NASTY, "random_weights": True}}
    (trace / "run_meta.json").write_bytes(orjson.dumps(meta))
    with (trace / "trace_steps.jsonl").open("wb") as file:
        for step in range(9):
            entry = {"request_id": 0, "layer_id": 0, "step_idx": step, "seq_len_current": 900}
            file.write(orjson.dumps({**entry, "selected_token_pos": list(range(step, 400, 3))}) + b"\n")
        file.write(b'{"requ')
    (found,) = find_traces(folder)
    return {"results": analyze_trace(found, AnalyzeConfig(**options), lambda done: None)}


def printed(made: dict[str, Any], width: int = 120) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(terminal.render(made))
    return out.getvalue()


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href"}]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("options", [{}, {"lru_mode": "sequential", "lru_caps": (4, 200)}, {"block_sizes": (4, 16)}])
def test_terminal_and_page_show_every_figure_of_the_tables(tmp_path: Path, options: dict[str, Any]) -> None:
    made = document(tmp_path, **options)
    shown, page = printed(made), _Page()
    page.feed(html.render(made))
    page.close()
    assert page.open == []
    for result in made["results"]:
        for data in tables(result):
            assert data.title in shown
            assert data.title in page.text
            for row in data.rows:
                assert all(cell in page.text for cell in row)
                assert row[0] in shown
        for name, _ in header(result):
            assert name in shown
    assert "locality numbers mean nothing" in shown
    assert "locality numbers mean nothing" in page.text
    assert "unfinished last line" in shown


def test_nothing_from_the_trace_is_markup_or_steers_the_terminal(tmp_path: Path) -> None:
    made = document(tmp_path)
    shown = printed(made)
    assert "\x1b" not in shown
    assert '<script>alert("1")</script>[red]&' in shown
    text = html.render(made)
    page = _Page()
    page.feed(text)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert "block<b>4" in page.text


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    text = html.render(document(tmp_path))
    page = _Page()
    page.feed(text)
    assert page.links == []
    assert "http" not in text
    assert "@import" not in text
    assert "svg" in page.tags


def test_sequential_marks_capacities_below_a_record(tmp_path: Path) -> None:
    shown = printed(document(tmp_path, lru_mode="sequential", lru_caps=(4, 200)))
    assert "4*" in shown
    assert "200*" not in shown
    assert "* below the blocks of one record" in shown


def test_charts_are_well_formed_for_any_number_of_points() -> None:
    assert line_chart("t", "x", []) == ""
    for points in ([(5, 0.5)], [(0, 0.0), (0, 0.0)], [(x, x / 100) for x in range(101)]):
        root = ElementTree.fromstring(line_chart("a < b", "x", [(float(x), y) for x, y in points]))
        line = root.find("polyline")
        assert line is not None
        assert len(line.attrib["points"].split()) == len(points)
        assert all(0 <= float(v) <= 420 for pair in line.attrib["points"].split() for v in pair.split(","))


def test_numbers_for_people() -> None:
    assert [figure(v) for v in (None, 0, 3.0, 12345, 0.8239, 99.98765, 1305.44)] == [
        "-",
        "0",
        "3",
        "12,345",
        "0.824",
        "99.988",
        "1,305.4",
    ]
