"""Charts of a plan for tiers: what offloading adds to a step, and what it moves, over hot capacity."""

from __future__ import annotations

from typing import Any

from dsakv.report.charts import COLORS, Chart, axis, color, layout
from dsakv.report.plan_tables import NAMES, Plan, tiers
from dsakv.report.text import size


def charts(plan: Plan) -> list[Chart]:
    """Added TPOT for each pool, then bytes."""
    return [*(_added(plan, pool) for pool in tiers(plan)), _moved(plan)]


def _added(plan: Plan, pool: str) -> Chart:
    base, budget = plan["base"]["tpot_ms"], plan["budget_percent"]
    limit = base * budget / 100
    shapes = [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": limit, "y1": limit,
               "line": {"dash": "dash", "width": 1, "color": COLORS[7]}}]  # fmt: skip
    notes = [{"xref": "paper", "x": 1, "y": limit, "yanchor": "bottom", "xanchor": "right", "showarrow": False,
              "text": f"budget: {budget:g}% of {base:.3g} ms"}]  # fmt: skip
    return Chart(
        f"Added TPOT over hot capacity, KV in {NAMES[pool]}",
        "Mean over decode steps; reads and writes of a step one after the other, nothing hidden behind compute.",
        _lines(plan, lambda row: row["tiers"][pool]["added_ms"], "ms"),
        layout(axis("hot memory, bytes of all layers"), axis("added ms a step", rangemode="tozero"),
               shapes=shapes, annotations=notes),
    )  # fmt: skip


def _moved(plan: Plan) -> Chart:
    return Chart(
        "Bytes read from far over hot capacity",
        "Of a decode step, mean: whole blocks, so that larger ones move more that nobody reads.",
        _lines(plan, lambda row: row["bytes_per_step"], "bytes"),
        layout(axis("hot memory, bytes of all layers"), axis("bytes a step", rangemode="tozero")),
    )


def _lines(plan: Plan, value: Any, unit: str) -> list[dict[str, Any]]:
    """A line for each block size and policy."""
    several = len({row["policy"] for one in plan["sizes"] for row in one["rows"]}) > 1
    data: list[dict[str, Any]] = []
    for one in plan["sizes"]:
        for policy in dict.fromkeys(row["policy"] for row in one["rows"]):
            rows = [row for row in one["rows"] if row["policy"] == policy]
            block = one["block_size_tokens"]
            name = f"rows ({block} token)" if block == 1 else f"blocks of {block}"
            data.append(
                {"type": "scatter", "mode": "lines+markers", "name": f"{name}, {policy}" if several else name,
                 "x": [row["hot_bytes"] for row in rows], "y": [value(row) for row in rows],
                 "line": {"color": color(len(data)), "width": 2},
                 "customdata": [f"{row['hot_share']:.0%} hot, {row['hot_blocks']:,} blocks a layer, "
                                f"{size(row['hot_bytes'])}" for row in rows],
                 "hovertemplate": f"%{{y:.4g}} {unit}<br>%{{customdata}}<extra>%{{fullData.name}}</extra>"}
            )  # fmt: skip
    return data
