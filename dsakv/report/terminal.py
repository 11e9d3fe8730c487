"""Analysis results in short, for a terminal: the decision first, then what led to it. All else is in the JSON and HTML.

Nothing here is wider than the terminal, and what comes from a trace is ``Text``: never markup, never control codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.bar import Bar
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from dsakv.report import tables
from dsakv.report.compare import Capacity, Result, Run, cache_scope, capacities, ceiling, curve, layers, runs
from dsakv.report.detail_tables import kv_tiers, reuse_marks
from dsakv.report.grids import RANDOM, columns_of, data_table, indented
from dsakv.report.measures import JACCARD, NEED_90, NEEDLES, OVER_CHANCE, Measure, layer_measures, run_measures
from dsakv.report.plan_terminal import plan_of
from dsakv.report.text import TableData, figure, percent, plural, printable, short, size

_LEVELS = "▁▂▃▄▅▆▇█"
_BAR = 14
_BLOCK_SIZES = ("block", "blocks", "tok/blk", "ampl.", "chance", "for 90%", "tokens", "hit rate", "Jaccard")
_AT_LEAST = 5
"""Figures of the comparison where long names leave little room."""


def render(document: dict[str, Any]) -> Group:
    """``document`` (``{"results": [...]}``) ready to be printed."""
    compared = runs(document)
    parts: list[RenderableType] = [_opening(compared)]
    for run in compared:
        parts += _decision(run, len(compared) == 1)
    rules = {one.question: one.rule for run in compared for one in tables.decisions(run.lead)}
    parts += [indented(Text(f"{question} Rule: {rule}.", style="dim"), 0) for question, rule in rules.items()]
    if len(compared) > 1:
        parts += [Text(), Rule(Text("Runs side by side"), align="left"), _Comparison(compared)]
    for run in compared:
        parts += _details(run)
    for run in compared:
        parts += plan_of(run, len(compared) == 1)
    return Group(*parts)


def _opening(compared: Sequence[Run]) -> Text:
    lead = compared[0].lead
    sizes = sorted({result["block_size_tokens"] for run in compared for result in run.results})
    text = Text("DSA trace analysis", style="bold")
    text.append(
        f"  {plural(len(compared), 'run')}, blocks of {', '.join(map(str, sizes))} tokens, LRU "
        f"{'step by step' if lead['lru_mode'] == 'step' else 'access by access'}, one cache for {cache_scope(lead)}",
        style="not bold dim",
    )
    return text


def _decision(run: Run, alone: bool) -> list[RenderableType]:
    """Answers; where there are none, the advice of the decision table."""
    block = f"blocks of {run.lead['block_size_tokens']} tokens"
    parts: list[RenderableType] = [Text()]
    parts.append(Rule(Text(f"Decision, {block}" if alone else f"Decision: {run.label}, {block}"), align="left"))
    if run.random_weights:
        parts.append(Text(RANDOM, style="bold red"))
    if run.caveat:
        parts.append(Text(f"Note: {run.caveat}.", style="yellow"))
    made = tables.decisions(run.lead)
    for one in made:
        parts += [Text(one.question, style="dim"), indented(Text.assemble((one.answer, "bold"), " ", one.because))]
    if not made:
        data = tables.advice(run.lead)
        parts += [indented(Text(words, style="bold"), 0) for _, _, words, _ in data.rows]
        parts += [Text(data.note)] if data.note else []
    return parts


@dataclass(frozen=True, slots=True)
class _Comparison:
    """A row for each run, and as many figures as there is room for, the most telling ones first."""

    runs: Sequence[Run]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        chosen = run_measures([run.lead for run in self.runs])
        table = self._table(chosen)
        unbound = options.update(max_width=10_000)  # a measure is no wider than its options
        while len(chosen) > _AT_LEAST and Measurement.get(console, unbound, table).maximum > options.max_width:
            chosen = chosen[:-1]
            table = self._table(chosen)
        yield table
        meanings = [f"{measure.brief}: {measure.name}" for measure in chosen if measure.brief != measure.name]
        yield Text("; ".join(meanings), style="dim")

    def _table(self, chosen: Sequence[Measure]) -> Table:
        rows = [(run.label, *(measure.show(measure.value(run.lead)) for measure in chosen)) for run in self.runs]
        return data_table(TableData("", ("run", *(measure.brief for measure in chosen)), rows))


def _details(run: Run) -> list[RenderableType]:
    result = run.lead
    facts = dict(tables.facts(result))
    parts: list[RenderableType] = [Text(), Rule(Text(run.label), align="left")]
    parts.append(Text(facts.pop("trace"), style="dim", overflow="fold"))
    line = [f"{name}: {facts[name]}" for name in ("records", "left out", "dense", "model") if name in facts]
    parts.append(Text(" · ".join(line), style="dim"))
    parts += [Text(f"warning: {printable(warning)}", style="bold yellow") for warning in result["warnings"]]
    parts += [Text(), *_caches(result), Text(), *_locality(result)]
    if result["layers"]:
        parts += [Text(), *_layers(result)]
    if (tiers := kv_tiers(result)) is not None:
        parts += [Text(), Text(tiers.title, style="bold"), data_table(tiers), Text(tiers.note, style="dim")]
    if len(run.results) > 1:
        data = tables.block_sizes(run)
        parts += [Text(), Text(data.title, style="bold"), data_table(replace(data, columns=_BLOCK_SIZES))]
        parts.append(Text(data.note, style="dim"))
    if tables.decisions(result):  # else it stands at the top already
        parts += [Text(), *_advice(result)]
    return parts


def _caches(result: Result) -> list[RenderableType]:
    """Hit rates as bars, the other policies behind, and the capacities for given rates."""
    found = capacities(result)
    known = result["lru_curve"]["blocks_per_cache"]
    title = f"Hit rate by capacity, blocks of {result['block_size_tokens']} tokens"
    parts: list[RenderableType] = [Text(title, style="bold")]
    grid = columns_of(("blocks", "share", "memory", f"LRU {result['lru_mode']}", "", "OPT", "better policy"), {3, 6})
    for entry in found:
        grid.add_row(
            Text(figure(entry.blocks) + ("" if entry.fits_a_step else tables.BELOW)),
            Text("-" if entry.share is None else f"{entry.share:.0%}"),
            Text(size(entry.bytes)),
            Bar(1, 0, entry.hit_rate or 0, width=_BAR),
            Text(percent(entry.hit_rate)),
            Text(percent(entry.policies.get("opt"))),
            Text(_better(entry)),
        )
    if found:
        parts.append(grid)
    if tables.below_note(result):
        parts.append(Text(tables.below_note(result), style="dim"))
    needs = [
        f"{float(target):.0%} needs {figure(capacity)}"
        if capacity is not None
        else f"{float(target):.0%} is not reached"
        for target, capacity in result["capacity_for_hit_rate"].items()
    ]
    knee = curve(result).knee
    if knee is not None:
        needs.append(f"knee at {figure(knee['capacity_blocks'])} ({percent(knee['hit_rate'])})")
    parts.append(Text(f"blocks: {', '.join(needs)}"))
    seen = f"a cache sees {short(known)} blocks; first accesses miss, so at most {percent(ceiling(result))} hits"
    parts.append(Text(seen, style="dim"))
    return parts


def _better(entry: Capacity) -> str:
    """The best of the policies that need no look ahead, where it hits more than LRU."""
    rates = [(name, rate) for name, rate in entry.policies.items() if name != "opt" and rate is not None]
    name, rate = max(rates, key=lambda item: item[1], default=("", 0.0))
    return f"{name} {percent(rate)}" if rate > (entry.hit_rate or 0.0) else "-"


def _locality(result: Result) -> list[RenderableType]:
    """Locality, working set and reuse, a line each."""
    stats, amplification = result["record_stats"], result["read_amplification"]
    windows = [f"{window}: {short(d['mean'])}" for window, d in result["working_set"].items()]
    marks = [(within, share) for within, share in reuse_marks(result) if within.bit_count() == 1][:7]
    grid = Table.grid(padding=(0, 2))
    lines = [
        (
            "a record",
            f"{short(stats['unique_blocks']['mean'])} blocks, {short(stats['tokens_per_block_mean']['mean'])} tokens "
            f"used of each; reads {short(amplification['measured']['mean'])} tokens for one "
            f"({short(amplification['uniform']['mean'])} by chance)",
        ),
        ("working set", f"blocks in the last records: {', '.join(windows)}" if windows else ""),
        ("reuse", "within steps: " + ", ".join(f"{d}: {percent(share)}" for d, share in marks) if marks else ""),
        (
            "overlap",
            ", ".join(
                f"with the {what} before {percent(result['overlap'][key]['kept']['mean'])} kept, Jaccard "
                f"{short(result['overlap'][key]['jaccard']['mean'])}"
                for key, what in (("steps", "step"), ("layers", "layer"))
                if result["overlap"][key]["jaccard"]["count"]
            ),
        ),
    ]
    if result["needle_recall"] is not None:
        lines.append(("needles", f"{percent(NEEDLES.value(result))} found, over all layers and steps"))
    for name, text in lines:
        if text:
            grid.add_row(Text(name, style="dim"), Text(text))
    return [Text("Locality", style="bold"), grid]


def _layers(result: Result) -> list[RenderableType]:
    """A picture of each figure over the layers, with the layers where it is least and greatest."""
    found = layers(result)
    grid = columns_of(("", f"layers {found[0][0]} to {found[-1][0]}", "least", "greatest"), {0, 1, 2, 3})
    wanted = [m for m in layer_measures(result) if m in (JACCARD, NEED_90, OVER_CHANCE, NEEDLES)]
    for measure in wanted:
        values = [measure.value(one) for _, one in found]
        known = [(value, layer) for value, (layer, _) in zip(values, found, strict=True) if value is not None]
        low, high = min(known), max(known)
        ends = [f"{measure.show(value)} (layer {layer})" for value, layer in (low, high)]
        grid.add_row(Text(measure.brief), Text(sparkline(values)), *(Text(end) for end in ends))
    return [Text("Layers", style="bold"), grid] if wanted else []


def sparkline(values: Sequence[float | None], most: int = 28) -> str:
    """One character a value, or a group's mean where there are more than ``most``; a blank for none."""
    group = max(1, -(-len(values) // most))
    means = []
    for at in range(0, len(values), group):
        known = [value for value in values[at : at + group] if value is not None]
        means.append(sum(known) / len(known) if known else None)
    known = [value for value in means if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(_LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        " " if value is None else _LEVELS[round((value - low) * scale) if scale else len(_LEVELS) // 2]
        for value in means
    )


def _advice(result: Result) -> list[RenderableType]:
    data = tables.advice(result)
    parts: list[RenderableType] = [Text(data.title, style="bold")]
    for rule, measured, words, _ in data.rows:
        parts += [indented(Text.assemble((f"{rule} {measured}: ", "dim"), words), 0)]
    return parts + ([Text(data.note)] if data.note else [])
