from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import orjson
import pytest

from dsakv.report import detail_tables, html, tables
from dsakv.report.compare import runs
from tests.report.documents import KINDS, NASTY, analyzed, document, four_runs, write_trace

_LIBRARY = re.compile(r'<script id="plotly">.*?</script>', re.DOTALL)


class _Page(HTMLParser):
    """What a browser makes of a page, the library left out."""

    def __init__(self, text: str) -> None:
        super().__init__()
        assert len(_LIBRARY.findall(text)) == 1
        self.own = _LIBRARY.sub("", text)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(self.own)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in {"meta", "br"}:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.text += data

    @property
    def charts(self) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = orjson.loads(self.scripts[0])
        return made

    def chart(self, title: str) -> dict[str, Any]:
        (found,) = [chart for chart in self.charts if chart["title"] == title]
        return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_of_the_tables_is_there(tmp_path: Path, kind: str) -> None:
    made = document(tmp_path, **KINDS[kind])
    page = _Page(html.render(made))
    (run,) = runs(made)
    shown = [
        tables.caches(run.lead),
        tables.targets(run.lead),
        tables.advice(run.lead),
        detail_tables.locality(run.lead),
        detail_tables.working_set(run.lead),
        detail_tables.reuse(run.lead),
    ]
    shown += [tables.block_sizes(run)] if len(run.results) > 1 else []
    shown += [detail_tables.by_layer(run.lead)] if run.lead["layers"] else []
    for data in shown:
        assert all(cell in page.text for row in data.rows for cell in row)
    assert page.tags.count("section") == 3
    assert [int(value) for name, value in page.attributes if name == "data-chart"] == list(range(len(page.charts)))
    titles = {chart["title"] for chart in page.charts}
    assert ("Locality by layer" in titles) == bool(run.lead["layers"])
    assert ("Hit rate by block size at equal memory" in titles) == (len(run.results) > 1)
    shared = kind in ("a cache for a request", "a cache for the run")
    assert ("Blocks that each layer needs" in titles) == (
        bool(run.lead["layers"]) and not shared and kind != "one step"
    )
    assert ("Reuse distance" in titles) == (kind != "one step")


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    made = four_runs(tmp_path, block_sizes=(4, 8))
    page = _Page(html.render(made))
    rows = tables.comparison(runs(made)).rows
    assert [row[0] for row in rows] == ["burstgpt", "longbenchv2", "ruler", "sharegpt"]
    assert all(cell in page.text for row in rows for cell in row)
    for title in ("Hit rate of all runs over capacity", "Hit rate of all runs by share kept near"):
        assert [trace["name"] for trace in page.chart(title)["data"]] == [row[0] for row in rows]
    by_blocks, by_share = (page.chart(f"Hit rate of all runs {how}")["data"] for how in
                           ("over capacity", "by share kept near"))  # fmt: skip
    for run, tokens, share in zip(runs(made), by_blocks, by_share, strict=True):
        found = run.lead["lru_curve"]
        assert tokens["x"] == [4 * capacity for capacity in found["step"]["capacity_blocks"]]
        assert share["x"] == [c / found["blocks_per_cache"] for c in found["step"]["capacity_blocks"]]
        assert tokens["y"] == share["y"] == [hits / found["accesses"] for hits in found["step"]["hits"]]
    assert page.tags.count("section") == 2 + 4 + 1


def test_charts_show_what_the_document_says(tmp_path: Path) -> None:
    made = document(tmp_path, block_sizes=(2, 4), policies=("all",))
    page = _Page(html.render(made))
    small, result = made["results"]
    traces = {trace["name"]: trace for trace in page.chart("Hit rate over capacity")["data"]}
    found = result["lru_curve"]
    for name, mode in (("LRU, a step's set at once", "step"), ("LRU, one access after the other", "sequential")):
        assert traces[name]["x"] == found[mode]["capacity_blocks"]
        assert traces[name]["y"] == [hits / found["accesses"] for hits in found[mode]["hits"]]
    knees = [found[mode]["knee"] for mode in ("step", "sequential")]
    assert traces["knee"]["x"] == [knee["capacity_blocks"] for knee in knees]
    assert traces["knee"]["y"] == [knee["hit_rate"] for knee in knees]
    for name, entries in result["policies"].items():
        if name != "lru":  # the curve says it
            drawn = traces["OPT (offline bound)" if name == "opt" else name]
            assert drawn["x"] == [entry["capacity_blocks"] for entry in entries.values()]
            assert drawn["y"] == [entry["hit_rate"] for entry in entries.values()]
    shaded = page.chart("Hit rate over capacity")["layout"]["shapes"][0]
    assert shaded["x1"] == result["step_set_blocks"]["p95"]

    means = page.chart("Working set")["data"][0]
    assert dict(zip(means["x"], means["y"], strict=True)) == {
        int(window): d["mean"] for window, d in result["working_set"].items()
    }
    (reuses,) = page.chart("Reuse distance")["data"]
    cdf = result["temporal_locality"]["reuse_distance_cdf_steps"]
    assert list(zip(reuses["x"], reuses["y"], strict=True)) == [(p["reuse_distance_steps"], p["cdf"]) for p in cdf]
    measured, uniform = page.chart("Read amplification by block size")["data"]
    for trace, key in ((measured, "measured"), (uniform, "uniform")):
        assert trace["y"] == [one["read_amplification"][key]["mean"] for one in (small, result)]
    sizes = page.chart("Hit rate by block size at equal memory")["data"]
    assert [trace["x"] for trace in sizes] == [
        [size * capacity for capacity in one["lru_curve"]["step"]["capacity_blocks"]]
        for size, one in ((2, small), (4, result))
    ]


def test_layers_are_drawn_as_the_document_says(tmp_path: Path) -> None:
    write_trace(tmp_path / "run", layers=61, steps=24, needles=True)
    made = analyzed(tmp_path)
    page = _Page(html.render(made))
    (result,) = made["results"]
    layers = [str(layer) for layer in range(61)]
    assert list(result["layers"]) == layers
    (rates,) = page.chart("LRU hit rate by layer and capacity")["data"]
    assert rates["x"] == layers
    assert rates["z"] == [
        [result["layers"][x]["cache_sim"][c]["hit_rate"] for x in layers] for c in ("16", "60", "100")
    ]
    needed = page.chart("Blocks that each layer needs")["data"]
    for trace in needed:
        target = {"90% hits": "0.9", "95% hits": "0.95"}[trace["name"]]
        assert trace["y"] == [result["layers"][x]["capacity_for_hit_rate"][target] for x in layers]
    needles, tokens = page.chart("Needle recall by layer")["data"]
    assert needles["y"] == [result["layers"][x]["needle_recall"]["needles"]["mean"] for x in layers]
    assert tokens["y"] == [result["layers"][x]["needle_recall"]["tokens"]["mean"] for x in layers]
    (heat,) = page.chart("Locality by layer")["data"]
    jaccard = [result["layers"][x]["temporal_locality"]["step_jaccard"]["mean"] for x in layers]
    assert heat["text"][heat["y"].index("step Jaccard")] == [f"{value:.2f}" if value != 1 else "1" for value in jaccard]
    mean = sum(jaccard) / len(jaccard)
    assert heat["z"][heat["y"].index("step Jaccard")] == pytest.approx([value / mean - 1 for value in jaccard])


def test_reuse_within_a_step_is_told_where_the_axis_cannot_show_it(tmp_path: Path) -> None:
    made = document(tmp_path, key_mode="request")
    first = made["results"][0]["temporal_locality"]["reuse_distance_cdf_steps"][0]
    assert first["reuse_distance_steps"] == 0
    assert f"Within the same step, left of the axis: {first['cdf']:.1%}." in _Page(html.render(made)).text


def test_null_hit_rates_are_dashes(tmp_path: Path) -> None:
    made = document(tmp_path, policies=("all",))
    (result,) = made["results"]
    result["lru_curve"].update(accesses=0, first_accesses=0, blocks_per_cache=0.0)
    for mode in ("step", "sequential"):
        result["lru_curve"][mode] = {"capacity_blocks": [], "hits": [], "knee": None}
    result["step_set_blocks"] = {"count": 0, "p50": None, "p95": None, "max": None}
    for entry in [*result["cache_sim"].values(), *(e for p in result["policies"].values() for e in p.values())]:
        entry.update(hits=0, misses=0, hit_rate=None, below_step_set_p95=False)
    result["capacity_for_hit_rate"] = dict.fromkeys(result["capacity_for_hit_rate"])
    result.update(layers={}, decision=[])
    page = _Page(html.render(made))
    assert page.chart("Hit rate over capacity")["layout"].get("shapes") == []
    assert tables.caches(result).rows[0][3] == "-"


def test_nothing_from_the_trace_is_markup(tmp_path: Path) -> None:
    for place in range(2):
        write_trace(tmp_path / f"run<i>{place}", name=NASTY + str(place))
    made = analyzed(tmp_path)
    made["results"][0]["decision"] = [
        {"question": NASTY, "answer": NASTY, "rule": NASTY, "measured": {NASTY: NASTY, "x": None, "y": 0.5}}
    ]
    made["results"][0]["warnings"].append(NASTY)
    text = html.render(made)
    page = _Page(text)
    assert page.tags.count("script") == 2  # data and code; the library is cut out
    assert {"b", "i"} & set(page.tags) <= {"b"}
    assert "\x1b" not in page.own
    assert NASTY.replace("\x1b", "\N{REPLACEMENT CHARACTER}") in page.text
    assert "<" not in page.scripts[0]
    names = [trace["name"] for chart in page.charts for trace in chart["data"] if "name" in trace]
    assert any(name.startswith("run") for name in names)
    assert not any("<" in name or ">" in name for name in names)  # plotly reads markup in names


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    page = _Page(html.render(four_runs(tmp_path)))
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    assert not [name for name, _ in page.attributes if name in {"src", "srcset", "action", "data", "poster"}]
    assert not {"link", "iframe", "img", "object", "embed", "base", "form"} & set(page.tags)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttpRequest|import\(", page.own)
    assert ("content", html.POLICY) in page.attributes
    assert "default-src 'none'" in html.POLICY
    assert "http" not in html.POLICY


def test_random_weights_are_said_loudly(tmp_path: Path) -> None:
    write_trace(tmp_path / "run", random=True)
    text = html.render(analyzed(tmp_path))
    assert html.RANDOM in text
    assert text.index(html.RANDOM) < text.index('id="decision"')
    assert "do not act on this" in text


def test_what_the_figures_are_not_stands_beside_the_decision(tmp_path: Path) -> None:
    write_trace(tmp_path / "run", caveat="not of <b>a large model")
    text = html.render(analyzed(tmp_path))
    assert text.index('id="decision"') < text.index("Note: not of &lt;b&gt;a large model.") < text.index("<dl>")


def test_without_scripts_the_charts_are_not_missed(tmp_path: Path) -> None:
    page = _Page(html.render(document(tmp_path)))
    assert "Charts need JavaScript" in page.text
    assert ".charts { display: none;" in page.own


def test_the_decision_comes_first(tmp_path: Path) -> None:
    made = document(tmp_path)
    made["results"][0]["decision"] = [
        {"question": "How much?", "answer": "60 blocks.", "rule": "enough", "measured": {"capacity_blocks": 60}}
    ]
    page = _Page(html.render(made))
    assert page.text.index("How much?") < page.text.index("60 blocks.") < page.text.index("Rule: enough.")
    assert page.text.index("capacity blocks 60") < page.text.index("Hit rate over capacity")
    assert 60 in [shape.get("x1") for shape in page.chart("Hit rate over capacity")["layout"]["shapes"]]
