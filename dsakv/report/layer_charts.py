"""Charts over the layers of one run."""

from __future__ import annotations

from typing import Any

from dsakv.report.charts import SHARE_AXIS, Chart, axis, color, layout
from dsakv.report.compare import Run, layers
from dsakv.report.measures import layer_measures

DEEPEST = 0.3
"""Deviation from the mean of the layers with the strongest color."""
DEVIATIONS = [[0, "#2166ac"], [0.25, "#7fb2d8"], [0.5, "#e9e9e6"], [0.75, "#ee9f7e"], [1, "#b2182b"]]
FEW_LAYERS = 16
"""Up to so many, the cells of a heat map have room for their numbers."""


def layer_charts(run: Run) -> list[Chart]:
    """Everything by layer; nothing where layers were merged."""
    if not run.lead["layers"]:
        return []
    made = [_measures(run), _hit_rates(run), _needed(run), _needles(run)]
    return [chart for chart in made if chart is not None]


def _measures(run: Run) -> Chart:
    """Figures by layer, colored against the mean of their row, for their units differ."""
    found, measures = layers(run.lead), layer_measures(run.lead)
    values = [[measure.value(one) for _, one in found] for measure in measures]
    text = [[measure.show(value) for value in row] for measure, row in zip(measures, values, strict=True)]
    scaled = [[_deviation(value, row) for value in row] for row in values]
    return Chart(
        "Locality by layer",
        f"Red: above the mean of its row, blue: below it, pale: close to it; deepest at {DEEPEST:.0%} of the mean.",
        [
            _heat(
                [layer for layer, _ in found],
                [measure.name for measure in measures],
                scaled,
                text,
                [-DEEPEST, DEEPEST],
                DEVIATIONS,
                "+.0%",
            )
        ],
        _map_layout(len(measures)),
        wide=True,
    )


def _hit_rates(run: Run) -> Chart | None:
    """LRU hit rates by layer and capacity; None where caches serve several layers."""
    found = layers(run.lead)
    if any(one["cache_sim"] is None for _, one in found) or not run.lead["cache_sim"]:
        return None
    keys = sorted(run.lead["cache_sim"], key=lambda key: int(run.lead["cache_sim"][key]["capacity_blocks"]))
    rates = [[one["cache_sim"][key]["hit_rate"] for _, one in found] for key in keys]
    text = [["-" if rate is None else f"{rate:.1%}" for rate in row] for row in rates]
    entries = [run.lead["cache_sim"][key] for key in keys]
    names = [
        f"{entry['capacity_blocks']:,} blocks" + (" (below a step's set)" if entry["below_step_set_p95"] else "")
        for entry in entries
    ]
    known = [rate for row in rates for rate in row if rate is not None]
    return Chart(
        "LRU hit rate by layer and capacity",
        "One color scale for all cells.",
        [_heat([layer for layer, _ in found], names, rates, text, [min(known, default=0), 1], "Viridis", ".0%")],
        _map_layout(len(keys)),
        wide=True,
    )


def _needed(run: Run) -> Chart | None:
    """The capacity that a layer needs for its hit rate."""
    found = layers(run.lead)
    if any(one["capacity_for_hit_rate"] is None for _, one in found):
        return None
    data = []
    for place, (target, name) in enumerate((("0.9", "90% hits"), ("0.95", "95% hits"))):
        y = [one["capacity_for_hit_rate"][target] for _, one in found]
        if any(value is not None for value in y):
            data.append(_bars(name, [layer for layer, _ in found], y, place, "%{y:,} blocks"))
    if not data:
        return None
    return Chart(
        "Blocks that each layer needs",
        "The smallest LRU cache of a layer that reaches the hit rate; no bar where no capacity does.",
        data,
        layout(
            axis("layer", type="category", tickangle=0, nticks=13), axis("blocks", rangemode="tozero"), barmode="group"
        ),
    )


def _needles(run: Run) -> Chart | None:
    """What the selection holds of the needles."""
    found = [(layer, one["needle_recall"]) for layer, one in layers(run.lead) if one["needle_recall"] is not None]
    if not found:
        return None
    names = {"needles": "needles with a token selected", "tokens": "tokens of the needles selected"}
    data = [
        _bars(name, [layer for layer, _ in found], [recall[key]["mean"] for _, recall in found], place, "%{y:.2%}")
        for place, (key, name) in enumerate(names.items())
    ]
    return Chart(
        "Needle recall by layer",
        "Does the indexer select what the answer stands in? Mean over the records of the layer.",
        data,
        layout(axis("layer", type="category", tickangle=0, nticks=13), axis("share", **SHARE_AXIS), barmode="group"),
    )


def _bars(name: str, x: list[str], y: list[Any], place: int, hover: str) -> dict[str, Any]:
    return {
        "type": "bar",
        "name": name,
        "x": x,
        "y": y,
        "marker": {"color": color(place)},
        "hovertemplate": f"layer %{{x}}: {hover}<extra>%{{fullData.name}}</extra>",
    }


def _heat(
    x: list[str],
    y: list[str],
    z: list[list[float | None]],
    text: list[list[str]],
    ends: list[float],
    colors: Any,
    bar: str,
) -> dict[str, Any]:
    made: dict[str, Any] = {
        "type": "heatmap",
        "x": x,
        "y": y,
        "z": z,
        "text": text,
        "zmin": ends[0],
        "zmax": ends[1],
        "colorscale": colors,
        "colorbar": {"tickformat": bar, "thickness": 12, "outlinewidth": 0},
        "xgap": 1 if len(x) <= FEW_LAYERS else 0,
        "ygap": 1,
        "hovertemplate": "layer %{x}, %{y}: %{text}<extra></extra>",
    }
    if len(x) <= FEW_LAYERS:
        made["texttemplate"] = "%{text}"
    return made


def _map_layout(rows: int) -> dict[str, Any]:
    return layout(
        axis("layer", type="category", tickangle=0, nticks=13, showgrid=False),
        {"type": "category", "autorange": "reversed", "showgrid": False},
        110 + 26 * max(rows, 3),
    )


def _deviation(value: float | None, row: list[float | None]) -> float | None:
    """Of ``value`` from the mean of ``row``, as a share of the mean."""
    known = [one for one in row if one is not None]
    if value is None:
        return None
    mean = sum(known) / len(known)
    return value / mean - 1 if mean else 0.0
