"""What the parts of the terminal's report are laid out with. Cells are ``Text``: never markup."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dsakv.report.text import TableData

RANDOM = "RANDOM WEIGHTS: noise, not a model. Do not act on any figure below."


def indented(text: Text, by: int = 2) -> Padding:
    """``text`` with a margin."""
    return Padding(text, (0, 0, 0, by))


def columns_of(columns: Sequence[str], left: set[int]) -> Table:
    """An empty table without lines; the columns ``left`` hold words, the others numbers."""
    grid = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    for i, column in enumerate(columns):
        grid.add_column(Text(column), justify="left" if i in left else "right", no_wrap=i not in left, overflow="fold")
    return grid


def data_table(data: TableData) -> Table:
    """``data`` without its title and note."""
    table = columns_of(data.columns, set(data.words))
    for row in data.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def titled(data: TableData) -> list[RenderableType]:
    """``data`` under its title and above its note, and an empty line."""
    return [Text(data.title, style="bold"), data_table(data), Text(data.note, style="dim"), Text()]
