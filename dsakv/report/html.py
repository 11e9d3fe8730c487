"""Analysis results as one HTML file that needs no network."""

from __future__ import annotations

from html import escape
from typing import Any

import orjson

from dsakv.report.charts import line_chart
from dsakv.report.tables import TableData, header, tables

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --dim: #667079; --line: #d8dde2; --paper: #fff; --mark: #0b6bcb;
  --alarm: #b45309; --soft: #f4f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --dim: #98a2ab; --line: #363d44; --paper: #15181b;
  --mark: #6cb2f7; --alarm: #f0a94b; --soft: #1e2327; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dt { color: var(--dim); } dd { margin: 0; overflow-wrap: anywhere; }
.warning { border-left: 4px solid var(--alarm); background: var(--soft); padding: .4rem .8rem; margin: .5rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1.5rem 0 .3rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; white-space: nowrap; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap; }
td.words:last-child { white-space: normal; }
th { color: var(--dim); font-weight: 500; } .words { text-align: left; }
.note { color: var(--dim); margin: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1rem; }
.chart { width: 100%; font-size: 11px; } .chart text { fill: var(--dim); }
.chart .title { fill: var(--ink); font-size: 13px; font-weight: 600; } .chart .grid { stroke: var(--line); }
.chart .line { fill: none; stroke: var(--mark); stroke-width: 2; } .chart .dot { fill: var(--mark); }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: 12.5px; }
"""
_WORDS = frozenset({"figure", "rule", "advice"})


def render(document: dict[str, Any]) -> str:
    """``document`` (``{"results": [...]}``) as a whole page. What comes from the trace is escaped."""
    body = "".join(_result(result) for result in document["results"])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>DSA trace analysis</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>DSA trace analysis</h1>\n{body}</body></html>\n"
    )


def _result(result: dict[str, Any]) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in header(result))
    warnings = "".join(f'<p class="warning">{escape(warning)}</p>' for warning in result["warnings"])
    figures = "".join(_table(data) for data in tables(result))
    heading = escape(f"{result['trace_dir']}, blocks of {result['block_size_tokens']} tokens")
    return (
        f"<section><h2>{heading}</h2>\n<dl>{facts}</dl>\n{warnings}\n"
        f'<div class="charts">{_charts(result)}</div>\n{figures}\n{_provenance(result)}</section>\n'
    )


def _charts(result: dict[str, Any]) -> str:
    caches = sorted(
        (e["capacity_blocks"], e["hit_rate"]) for e in result["cache_sim"].values() if e["hit_rate"] is not None
    )
    windows = sorted((int(w), d["mean"]) for w, d in result["working_set"].items() if d["mean"] is not None)
    reuse = [(p["reuse_distance_steps"], p["cdf"]) for p in result["temporal_locality"]["reuse_distance_cdf_steps"]]
    return "".join(
        (
            line_chart("LRU hit rate", "capacity in blocks", caches, top=1.0),
            line_chart("Working set, mean blocks", "last records of a stream", windows),
            line_chart("Share of reuses within a distance", "steps", reuse, top=1.0),
        )
    )


def _table(data: TableData) -> str:
    kinds = [' class="words"' if column in _WORDS else "" for column in data.columns]
    head = "".join(f"<th{kind}>{escape(column)}</th>" for kind, column in zip(kinds, data.columns, strict=True))
    rows = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>\n"
        for row in data.rows
    )
    note = f'<p class="note">{escape(data.note)}</p>' if data.note else ""
    return (
        f'<div class="wide"><table><caption>{escape(data.title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>{note}\n"
    )


def _provenance(result: dict[str, Any]) -> str:
    parts = (("run_meta.json", result["run_meta"]), ("configuration", result["config"]), ("input", result["input"]))
    shown = "".join(
        f"<h3>{escape(name)}</h3><pre>{escape(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())}</pre>"
        for name, value in parts
    )
    return f"<details><summary>Provenance (dsakv {escape(result['dsakv_version'])})</summary>{shown}</details>"
