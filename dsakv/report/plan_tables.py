"""What a plan for tiers says in rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsakv.report.text import TableData, figure, percent, printable, short, size

Plan = Mapping[str, Any]
NAMES: Mapping[str, str] = {"local_pool": "host memory", "remote_pool": "remote pool"}
BUDGET = "*"
"""Marks rows that stay within the budget."""


def premises(plan: Plan) -> list[str]:
    """What the plan rests on, a line each."""
    base, run, links = plan["base"], plan["run"], plan["links"]
    kind = "measured" if links["measured"] else "nominal figures, not measured: dsakv bench links measures a machine"
    lines = [
        f"Links: {links['name']} ({kind}).",
        f"TPOT without offloading: {short(base['tpot_ms'])} ms with {short(base['requests'])} requests at a time "
        f"({base['source']}).",
        f"Trace: {run['decode_steps']:,} decode steps, {run['layers']} layers, {run['row_bytes']:,} bytes a KV row and "
        f"{run['index_key_bytes']:,} an index key, which stays on the device.",
        f"Assumed: {plan['assumed']}.",
    ]
    if base.get("other_machine"):
        lines.append(
            "The steps are those of a CPU, the links those of other machines: give --base-tpot-ms of the device to "
            "plan for, or links that were measured here. The percentages mean little as they are."
        )
    if not plan["block_tables"]:
        lines.append("The run says nothing of its block tables: requests are taken to share no blocks.")
    return [printable(line) for line in lines]


def brief(plan: Plan) -> list[TableData]:
    """The tables for a terminal."""
    return [overview(plan, pool) for pool in tiers(plan)] + _others(plan)


def every(plan: Plan) -> list[TableData]:
    """All tables that there is something to say in."""
    return [capacities(plan, pool) for pool in tiers(plan)] + _others(plan)


def _others(plan: Plan) -> list[TableData]:
    made = [as_run(plan)] if plan.get("as_run") is not None else []
    return made + [table for answer in plan["answers"] if (table := concurrency(answer)) is not None]


def tiers(plan: Plan) -> list[str]:
    """The pools that blocks may live in."""
    return list(plan["sizes"][0]["rows"][0]["tiers"])


def overview(plan: Plan, pool: str) -> TableData:
    """Added TPOT: a row for each block size and policy, a column for each hot capacity."""
    asked = sorted({row["asked"] for one in plan["sizes"] for row in one["rows"]})
    rows = []
    for one in plan["sizes"]:
        for policy in dict.fromkeys(row["policy"] for row in one["rows"]):
            found = {row["asked"]: row for row in one["rows"] if row["policy"] == policy}
            cells = [_added(plan, found[value]["tiers"][pool]) if value in found else "-" for value in asked]
            rows.append((figure(one["block_size_tokens"]), policy, *cells))
    columns = ("block", "policy", *(f"{value:.0%}" if value <= 1 else f"{value:,.0f} blocks" for value in asked))
    note = f"Mean of decode steps, in percent of the TPOT without offloading. {_budget(plan)}"
    return TableData(f"Added TPOT by hot capacity, KV in {NAMES[pool]}", columns, rows, note, frozenset({1}))


def capacities(plan: Plan, pool: str) -> TableData:
    """A row for each block size, policy and hot capacity."""
    rows = [
        (
            figure(one["block_size_tokens"]),
            row["policy"],
            percent(row["hot_share"]),
            figure(row["hot_blocks"]),
            size(row["hot_bytes"]),
            percent(row["hit_rate"]),
            short(row["misses_per_step"]),
            size(row["bytes_per_step"]),
            short(row["tiers"][pool]["added_ms"]),
            _added(plan, row["tiers"][pool]),
            short(row["tiers"][pool]["added_p95_ms"]),
            short(row["tiers"][pool]["added_if_hidden_ms"]),
        )
        for one in plan["sizes"]
        for row in one["rows"]
    ]
    columns = ("block", "policy", "hot", "blocks", "memory", "hits", "misses", "bytes", "added ms", "of TPOT", "p95 ms",
               "if hidden")  # fmt: skip
    note = (
        "blocks: hot ones of each layer; memory: of all layers; misses, bytes, ms: of a decode step, mean; if hidden: "
        f"added where compute hides all that it can. {_budget(plan)}"
    )
    return TableData(f"Hot capacities, KV in {NAMES[pool]}", columns, rows, note, frozenset({1}))


def _added(plan: Plan, times: Mapping[str, float]) -> str:
    within = times["added_percent"] <= plan["budget_percent"]
    return f"{short(times['added_percent'])}%{BUDGET if within else ''}"


def _budget(plan: Plan) -> str:
    return f"{BUDGET} within the budget of {plan['budget_percent']:g}%."


def as_run(plan: Plan) -> TableData:
    """The tiers that the traced run had: what is predicted of them, and what was measured."""
    found = plan["as_run"]
    rows = [
        (
            NAMES[tier],
            short(one["blocks_per_step"]),
            size(one["bytes_per_step"]),
            "-" if one["predicted_ms"] is None else short(one["predicted_ms"]),
            "-" if one["measured_ms"] is None else short(one["measured_ms"]),
            "-" if not one["measured_ms"] or one["predicted_ms"] is None
            else short(one["predicted_ms"] / one["measured_ms"]),
        )
        for tier, one in found["tiers"].items()
    ]  # fmt: skip
    title = (
        f"As run: {found['hot_blocks']:,} hot blocks of {found['block_size_tokens']} tokens a layer, "
        f"{found['policy']}, scope {found['scope']}, start {found['start']}"
    )
    columns = ("read from", "blocks", "bytes", "predicted ms", "measured ms", "ratio")
    return TableData(printable(title), columns, rows, "Of a decode step, mean.", frozenset({0}))


def concurrency(answer: Mapping[str, Any]) -> TableData | None:
    """More requests at a time, and what they come to; None for answers to other questions."""
    if not answer.get("table"):
        return None
    plain = answer["measured"]
    rows = [(figure(plain["fits_without"]), "all", "-", short(plain["tokens_per_s_without"]))]
    rows += [
        (figure(row["requests"]), percent(row["hot_share"]), short(row["added_ms"]), short(row["tokens_per_s"]))
        for row in answer["table"]
    ]
    title = printable(answer["question"])
    return TableData(title, ("requests", "hot", "added ms", "tokens/s"), rows, "", frozenset())
