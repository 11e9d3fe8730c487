"""Analysis results as tables on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from dsakv.report.tables import TableData, header, printable, tables


def render(document: dict[str, Any]) -> Group:
    """Everything that ``document`` (``{"results": [...]}``) says, ready to be printed."""
    parts: list[RenderableType] = []
    for result in document["results"]:
        parts += [Rule(Text("Trace analysis"), align="left"), _facts(result)]
        parts += [Text(f"warning: {printable(warning)}", style="bold yellow") for warning in result["warnings"]]
        for data in tables(result):
            parts += [Text(), Text(data.title, style="bold"), _table(data)]
            if data.note:
                parts.append(Text(data.note))
        parts.append(Text())
    return Group(*parts)


def _facts(result: dict[str, Any]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, fact in header(result):
        grid.add_row(Text(name, style="dim"), Text(fact))
    return grid


def _table(data: TableData) -> Table:
    # Text, not str: what comes from the trace is never read as markup.
    table = Table(header_style="dim")
    words = {"figure", "rule", "advice"}
    for column in data.columns:
        table.add_column(Text(column), justify="left" if column in words else "right", no_wrap=column == "measured")
    for row in data.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
