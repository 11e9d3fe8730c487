"""Analysis results as one HTML file that needs no network: plotly.js is in it, and its policy forbids to load anything.

Whatever comes from a trace is escaped, in the data of the script too.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import orjson

from dsakv.report import detail_tables, plan_charts, plan_tables, run_charts, tables
from dsakv.report.assets import SCRIPT, STYLE
from dsakv.report.charts import Chart
from dsakv.report.compare import Result, Run, cache_scope, runs
from dsakv.report.layer_charts import layer_charts
from dsakv.report.measures import definitions, run_measures
from dsakv.report.text import TableData, plural, printable

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
RANDOM = "RANDOM WEIGHTS: these selections are noise. No figure and no advice here says anything about a real model."


def render(document: dict[str, Any]) -> str:
    """``document`` (``{"results": [...]}``) as a whole page."""
    from plotly.offline import get_plotlyjs  # 5 MB of text, and only a report needs it

    page = _Page()
    compared = runs(document)
    body = page.body(compared)
    library = get_plotlyjs().replace("</script", "<\\/script")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>DSA trace analysis</title><style>{STYLE}</style></head>\n<body>\n{body}"
        f'<script type="application/json" id="chart-data">{script_json([_plot(c) for c in page.charts])}</script>\n'
        f'<script id="plotly">{library}</script>\n<script>{SCRIPT}</script>\n</body></html>\n'
    )


def script_json(value: Any) -> str:
    """JSON that no parser of HTML sees a tag in."""
    return orjson.dumps(value).decode().replace("<", "\\u003c")


class _Page:
    """Collects the charts of the page while its text is put together."""

    def __init__(self) -> None:
        self.charts: list[Chart] = []

    def body(self, compared: Sequence[Run]) -> str:
        lead = compared[0].lead
        sizes = sorted({result["block_size_tokens"] for run in compared for result in run.results})
        parts = [
            "<h1>DSA trace analysis</h1>",
            f'<p class="lead">{plural(len(compared), "run")}, blocks of {", ".join(map(str, sizes))} tokens; LRU '
            f"{'step by step' if lead['lru_mode'] == 'step' else 'access by access'}, one cache for "
            f"{escape(cache_scope(lead))}; dsakv {escape(lead['dsakv_version'])}</p>",
            *(f'<p class="warning loud">{escape(_whose(run, compared))}{RANDOM}</p>' for run in compared
              if run.random_weights),
            _contents(compared),
            '<section id="decision"><h2>Where the KV cache may live</h2>',
            f'<div class="cards">{"".join(_card(run, len(compared) == 1) for run in compared)}</div></section>',
        ]  # fmt: skip
        if len(compared) > 1:
            parts.append(self._side_by_side(compared))
        parts += [self._run(run, place, len(compared) == 1) for place, run in enumerate(compared)]
        parts += [self._plan(run, place, len(compared) == 1) for place, run in enumerate(compared)]
        parts.append(_definitions(compared))
        return "\n".join(parts)

    def _side_by_side(self, compared: Sequence[Run]) -> str:
        data = tables.comparison(compared)
        charts = [
            run_charts.runs_by_blocks(compared),
            run_charts.runs_by_share(compared),
            run_charts.working_set(compared),
        ]
        shown = f"{_table(data, caption=False)}{self._plots(charts)}"
        return f'<section id="runs"><h2>{escape(data.title)}</h2>{shown}</section>'

    def _run(self, run: Run, place: int, alone: bool) -> str:
        result, sizes = run.lead, len(run.results) > 1
        heading = "Figures" if alone else escape(run.label)
        facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in tables.facts(result))
        warnings = "".join(f'<p class="warning">{escape(printable(warning))}</p>' for warning in result["warnings"])
        shown = f"at blocks of {result['block_size_tokens']} tokens"
        charts = [run_charts.hit_rates(run), run_charts.working_set([run])]
        charts += [chart for chart in [run_charts.reuse(run)] if chart is not None]
        parts = [
            f'<section id="run{place}"><h2>{heading}</h2><dl class="facts">{facts}</dl>{warnings}',
            f"<h3>Caches {shown}</h3>",
            _tiles(run),
            self._plots(charts),
            _pair(tables.caches(result), tables.targets(result)),
        ]
        if (tiers := detail_tables.kv_tiers(result)) is not None:
            parts.append(f"<h3>{escape(tiers.title)}</h3>{_table(tiers, caption=False)}")
        if sizes:
            parts.append("<h3>Block sizes</h3>")
            parts.append(self._plots([run_charts.block_size_rates(run), run_charts.amplification(run)]))
            parts.append(_table(tables.block_sizes(run)))
        if result["layers"]:
            by_layer = [detail_tables.by_layer(result), detail_tables.hit_rate_by_layer(result)]
            parts.append(f"<h3>Layers {shown}</h3>{self._plots(layer_charts(run))}")
            parts.append(_fold("Tables by layer", _pair(*(data for data in by_layer if data is not None))))
        parts.append(f"<h3>Advice of the decision table {shown}</h3>{_table(tables.advice(result), caption=False)}")
        rest = (detail_tables.locality(result), detail_tables.working_set(result), detail_tables.reuse(result))
        parts.append(_fold("Distributions in numbers", _pair(*rest)))
        parts.append(_provenance(run) + "</section>")
        return "\n".join(parts)

    def _plan(self, run: Run, place: int, alone: bool) -> str:
        plan = run.lead.get("plan")
        if plan is None:
            return ""
        heading = "Plan for tiers" if alone else f"Plan for tiers: {escape(run.label)}"
        alarm = f'<p class="warning loud">{RANDOM}</p>' if run.random_weights else ""
        told = "".join(f'<p class="note">{escape(line)}</p>' for line in plan_tables.premises(plan))
        made = _answers(tables.answered(plan["answers"]), alone)
        card = f'<div class="cards"><div class="card"><dl>{made}</dl></div></div>'
        shown = "".join(_table(data) for data in plan_tables.every(plan))
        charts = self._plots(plan_charts.charts(plan))
        return f'<section id="plan{place}"><h2>{heading}</h2>{alarm}{told}{card}{charts}{shown}</section>'

    def _plots(self, charts: Sequence[Chart]) -> str:
        boxes = []
        for chart in charts:
            kind, title = ' class="full"' if chart.wide else "", escape(chart.title)
            boxes.append(
                f"<figure{kind}><figcaption><b>{title}</b>{escape(chart.note)}</figcaption>"
                f'<div class="plot" data-chart="{len(self.charts)}" role="img" aria-label="{title}"></div>'
                "</figure>"
            )
            self.charts.append(chart)
        three = " three" if sum(not chart.wide for chart in charts) == 3 else ""
        return f'<div class="charts{three}">{"".join(boxes)}</div>'


def _plot(chart: Chart) -> dict[str, Any]:
    return {"title": chart.title, "data": chart.data, "layout": chart.layout}


def _whose(run: Run, compared: Sequence[Run]) -> str:
    return "" if len(compared) == 1 else f"{run.label}: "


def _contents(compared: Sequence[Run]) -> str:
    links = [("decision", "Decision")]
    links += [("runs", "Runs side by side")] if len(compared) > 1 else []
    links += [(f"run{i}", run.label if len(compared) > 1 else "Figures") for i, run in enumerate(compared)]
    for i, run in enumerate(compared):
        if "plan" in run.lead:
            links.append((f"plan{i}", "Plan for tiers" if len(compared) == 1 else f"Plan for tiers: {run.label}"))
    links.append(("definitions", "Definitions"))
    noscript = '<p class="note unscripted">Charts need JavaScript; the figures are in tables too.</p>'
    return "<nav>" + "".join(f'<a href="#{to}">{escape(name)}</a>' for to, name in links) + f"</nav>{noscript}"


def _card(run: Run, alone: bool) -> str:
    """The answers of one run; where there are none, what the decision table advises."""
    made = tables.decisions(run.lead)
    if made:
        rows = _answers(made, alone)
    else:
        data = tables.advice(run.lead)
        rows = "".join(
            f'<dt>{escape(rule)}</dt><dd><b>{escape(words)}</b></dd><dd class="basis">{escape(metric)} '
            f"{escape(measured)}</dd>"
            for rule, measured, words, metric in data.rows
        ) or f"<dt>{escape(data.note)}</dt>"  # fmt: skip
    alarm = '<p class="warning loud">Random weights: do not act on this.</p>' if run.random_weights else ""
    if run.caveat:
        alarm += f'<p class="warning">Note: {escape(run.caveat)}.</p>'
    size = run.lead["block_size_tokens"]
    return f'<div class="card"><h3>{escape(run.label)}, blocks of {size} tokens</h3>{alarm}<dl>{rows}</dl></div>'


def _answers(made: Sequence[tables.Decision], unfolded: bool) -> str:
    """Questions with their answers, rules and figures."""
    return "".join(
        f"<dt>{escape(one.question)}</dt><dd><b>{escape(one.answer)}</b> {escape(one.because)}</dd>"
        f'<dd class="basis"><details{" open" if unfolded else ""}><summary>rule and figures</summary>'
        f"Rule: {escape(one.rule)}.<br>Measured: {escape(one.measured)}</details></dd>"
        for one in made
    )


def _tiles(run: Run) -> str:
    tiles = "".join(
        f'<div class="tile" title="{escape(measure.meaning)}"><b>{escape(measure.show(measure.value(run.lead)))}</b>'
        f"<span>{escape(measure.name)}</span></div>"
        for measure in run_measures([run.lead])
    )
    return f'<div class="tiles">{tiles}</div>'


def _table(data: TableData, caption: bool = True) -> str:
    prose = {i for i, name in enumerate(data.columns) if name == "advice"}
    kinds = [
        f' class="words{" prose" if i in prose else ""}"' if i in data.words else "" for i in range(len(data.columns))
    ]
    head = "".join(f"<th{kind}>{escape(column)}</th>" for kind, column in zip(kinds, data.columns, strict=True))
    rows = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>\n"
        for row in data.rows
    )
    note = f'<p class="note">{escape(data.note)}</p>' if data.note else ""
    if not data.rows:
        return note
    title = f"<caption>{escape(data.title)}</caption>" if caption else ""
    return (
        f'<div class="wide"><table>{title}<thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>{note}\n'
    )


def _pair(*some: TableData) -> str:
    """Tables side by side where there is room."""
    return f'<div class="pair">{"".join(f"<div>{_table(data)}</div>" for data in some)}</div>'


def _fold(name: str, content: str) -> str:
    return f"<details><summary>{escape(name)}</summary>{content}</details>"


def _provenance(run: Run) -> str:
    """Where the figures come from, a line for each entry, values as JSON."""
    result = run.lead
    parts = (("run_meta.json", result["run_meta"]), ("configuration", result["config"]), ("input", result["input"]))
    shown = []
    for name, values in parts:
        rows = "".join(
            f"<dt>{escape(printable(key))}</dt><dd>{escape(printable(orjson.dumps(value).decode()))}</dd>"
            for key, value in (values or {"": "there is none"}).items()
        )
        shown.append(f'<h3>{escape(name)}</h3><dl class="facts">{rows}</dl>')
    return _fold(f"Provenance (dsakv {result['dsakv_version']})", "".join(shown))


def _definitions(compared: Sequence[Run]) -> str:
    results: list[Result] = [run.lead for run in compared]
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(meaning)}</dd>" for name, meaning in definitions(results))
    return f'<section id="definitions"><h2>Definitions</h2><dl class="facts">{rows}</dl></section>'
