"""A plan for tiers in the terminal's report."""

from __future__ import annotations

from rich.console import RenderableType
from rich.rule import Rule
from rich.text import Text

from dsakv.report import plan_tables, tables
from dsakv.report.compare import Run
from dsakv.report.grids import RANDOM, data_table, indented


def plan_of(run: Run, alone: bool) -> list[RenderableType]:
    """What a plan answers, and the rows that led to it."""
    plan = run.lead.get("plan")
    if plan is None:
        return []
    parts: list[RenderableType] = [Text()]
    parts.append(Rule(Text("Plan for tiers" if alone else f"Plan for tiers: {run.label}"), align="left"))
    if run.random_weights:
        parts.append(Text(RANDOM, style="bold red"))
    parts += [Text(line, style="dim") for line in plan_tables.premises(plan)]
    made = tables.answered(plan["answers"])
    for one in made:
        parts += [Text(one.question, style="dim"), indented(Text.assemble((one.answer, "bold"), " ", one.because))]
    rules = dict.fromkeys(one.rule for one in made)
    parts += [indented(Text(f"Rule: {rule}.", style="dim"), 0) for rule in rules]
    for data in plan_tables.brief(plan):
        parts += [Text(), Text(data.title, style="bold"), data_table(data), Text(data.note, style="dim")]
    return parts
