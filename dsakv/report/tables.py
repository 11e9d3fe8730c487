"""What terminal and HTML report say in rows: cells are plain text that may come from the trace."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsakv.report.compare import Result, Run, bytes_of, cache_scope, capacities, curve
from dsakv.report.measures import (
    AMPLIFICATION,
    BLOCKS,
    CHANCE,
    JACCARD,
    NEED_90,
    PER_BLOCK,
    run_measures,
)
from dsakv.report.text import TableData, figure, percent, plural, printable, short, size

BELOW = "!"
"""Marks a capacity that cannot hold what a step reads."""
_SPREAD = ("mean", "std", "min", "max")


def facts(result: Result) -> list[tuple[str, str]]:
    """What was analyzed, and how, as pairs of a name and a fact."""
    given, meta = result["input"], result["run_meta"] or {}
    left_out = [f"{entry['count']:,} bad ({reason})" for reason, entry in given["rejected"].items()]
    left_out += [
        f"{count:,} {what}"
        for count, what in (
            (given["records_without_positions"], "without positions"),
            (given["prefill_tail_records_left_out"], "of the prefill's tail"),
            (given["dense_records_left_out"], "that select every token"),
            (len(given["unfinished_last_lines"]), "cut off"),
        )
        if count
    ]
    dense = given["dense_records"] - given["dense_records_left_out"]
    pairs = [
        ("trace", result["trace_dir"]),
        ("records", f"{given['records']:,} in {plural(given['files'], 'file')}, {given['bytes'] / 1e6:,.1f} MB"),
        ("left out", ", ".join(left_out)),
        ("dense", f"{dense:,} records select every token of their sequence" if dense else ""),
        ("dataset", meta.get("dataset", "")),
        ("model", _model(meta.get("model"))),
        ("stream", _stream(result)),
        ("one cache for", cache_scope(result)),
    ]
    return [(name, printable(fact)) for name, fact in pairs if fact]


@dataclass(frozen=True, slots=True)
class Decision:
    """A question with its answer, the rule that gave it, and the figures it rests on."""

    question: str
    answer: str
    """Its first sentence says it, the others explain."""
    because: str
    rule: str
    measured: str


def decisions(result: Result) -> list[Decision]:
    """The decision in plain words; none where a trace gives no ground for any."""
    return answered(result.get("decision", []))


def answered(entries: Sequence[dict[str, Any]]) -> list[Decision]:
    """Answers as they stand in the results, in plain words."""
    made = []
    for entry in entries:
        measured = ", ".join(
            f"{name.replace('_', ' ')} {value if isinstance(value, str) else figure(value)}"
            for name, value in entry["measured"].items()
        )
        answer, *because = re.split(r"(?<=[.])\s+(?=[A-Z])", entry["answer"], maxsplit=1)
        parts = (entry["question"], answer, "".join(because), entry["rule"], measured)
        made.append(Decision(*map(printable, parts)))
    return made


def comparison(runs: Sequence[Run]) -> TableData:
    """A row for each run, at the block size that is shown first."""
    chosen = run_measures([run.lead for run in runs])
    rows = [
        (
            run.label + (" (random weights)" if run.random_weights else ""),
            figure(run.lead["records"]),
            figure(run.lead["block_size_tokens"]),
            *(measure.show(measure.value(run.lead)) for measure in chosen),
        )
        for run in runs
    ]
    return TableData("Runs side by side", ("run", "records", "block", *(m.name for m in chosen)), rows)


def targets(result: Result) -> TableData:
    """The capacity for each hit rate: of all caches of one size, and what single caches would need."""
    seen, rows = result["lru_curve"]["blocks_per_cache"], []
    needed = result["step_set_blocks"]["p95"]
    for target, capacity in result["capacity_for_hit_rate"].items():
        alone = result["capacity_per_cache"][target]
        below = capacity is not None and needed is not None and capacity < needed
        rows.append(
            (
                f"{float(target):.0%}",
                "not reached" if capacity is None else figure(capacity) + (BELOW if below else ""),
                "-" if capacity is None or not seen else f"{capacity / seen:.0%}",
                "-" if capacity is None else size(bytes_of(result, capacity)),
                figure(alone["p50"]),
                figure(alone["p95"]),
                figure(alone["max"]),
                f"{alone['caches']:,} of {result['lru_curve']['caches']:,}",
            )
        )
    columns = ("hit rate", "blocks", "share", "memory", "own p50", "own p95", "own max", "caches that reach it")
    note = "own: what a cache needs for the hit rate by itself, over the caches that reach it."
    return TableData("LRU capacity for a hit rate", columns, rows, note, frozenset())


def caches(result: Result) -> TableData:
    """Hit rates of the simulated capacities, LRU and every policy."""
    found = capacities(result)
    names = list(dict.fromkeys(name for entry in found for name in entry.policies))
    names.sort(key=lambda name: name != "opt")
    rows = [
        (
            figure(entry.blocks) + ("" if entry.fits_a_step else BELOW),
            "-" if entry.share is None else f"{entry.share:.0%}",
            size(entry.bytes),
            percent(entry.hit_rate),
            *(percent(entry.policies[name]) for name in names),
        )
        for entry in found
    ]
    columns = (
        "blocks",
        "share",
        "memory",
        f"LRU {result['lru_mode']}",
        *("OPT" if name == "opt" else name for name in names),
    )
    return TableData("Hit rate by capacity", columns, rows, below_note(result), frozenset())


def below_note(result: Result) -> str:
    """What the mark means, where a capacity has it."""
    if all(entry.fits_a_step for entry in capacities(result)):
        return ""
    return (
        f"{BELOW} below the p95 of a step's set ({figure(result['step_set_blocks']['p95'])} blocks): "
        "such a cache cannot hold what attention reads at once."
    )


def block_sizes(run: Run) -> TableData:
    """One row a block size; hit rates at the memory that the decision compares them at."""
    tokens = equal_memory(run)
    rows = []
    for result in run.results:
        block, needed = result["block_size_tokens"], NEED_90.value(result)
        rows.append(
            (
                figure(block),
                *(measure.show(measure.value(result)) for measure in (BLOCKS, PER_BLOCK, AMPLIFICATION, CHANCE)),
                NEED_90.show(needed),
                "-" if needed is None else f"{needed * block:,.0f}",
                "-" if tokens is None else percent(curve(result).rate(tokens // block)),
                JACCARD.show(JACCARD.value(result)),
            )
        )
    columns = (
        "block size",
        *(measure.name for measure in (BLOCKS, PER_BLOCK, AMPLIFICATION, CHANCE, NEED_90)),
        "tokens for 90% hits",
        "hit rate at equal memory",
        JACCARD.name,
    )
    note = "" if tokens is None else f"Equal memory: {tokens:,} tokens in a cache, that of the decision."
    return TableData("Block sizes compared", columns, rows, note, frozenset())


def equal_memory(run: Run) -> int | None:
    """Tokens that the decision compares block sizes at; None where it does not."""
    measured = (entry["measured"].get("near_tokens") for entry in run.lead.get("decision", []))
    return next((tokens for tokens in measured if isinstance(tokens, int)), None)


def advice(result: Result) -> TableData:
    """Rules of the decision table that apply."""
    rows = [
        (
            entry["rule"].replace("_", " "),
            f"{short(entry['value'])} ({'>' if entry['comparison'] == 'above' else '<'} {short(entry['threshold'])})",
            entry["advice"],
            entry["metric"],
        )
        for entry in result["recommendations"]
    ]
    note = "No rule of the decision table applies."
    if rows:
        note = "Rules of thumb with fixed thresholds: where they and the decision disagree, follow the decision."
    return TableData("Advice of the decision table", ("rule", "measured", "advice", "figure"), rows, note,
                     frozenset({0, 2, 3}))  # fmt: skip


def _model(model: Any) -> Any:
    return model.get("name", "") if isinstance(model, dict) else model or ""


def _stream(result: Result) -> str:
    if result["step_union"]:
        return "a request, its layers merged step by step"
    return "a request" if result["key_mode"] == "request" else "a layer of a request"
