"""Charts of one run and of several side by side. Text from a trace is escaped: plotly reads markup in names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from dsakv.report.charts import (
    COLORS,
    SHARE_AXIS,
    Chart,
    axis,
    color,
    curve_of,
    kilo,
    layout,
    log_range,
    marks_of,
    stairs,
    thinning,
    ticks,
)
from dsakv.report.compare import Capacity, Result, Run, advised_capacity, bytes_of, capacities, ceiling, curve
from dsakv.report.text import percent, size

SHADE = "rgba(214,79,79,.10)"
_SYMBOLS = ("circle-open", "square-open", "triangle-up-open", "x-open", "cross-open", "star-open", "hexagon-open")


def hit_rates(run: Run) -> Chart:
    """Hit rate over capacity: both ways of LRU, their knees, the simulated policies, and what bounds them."""
    result = run.lead
    seen, entries = result["lru_curve"]["blocks_per_cache"], capacities(result)
    data, curves = [], {mode: curve(result, mode) for mode in ("step", "sequential")}
    for place, (mode, found) in enumerate(curves.items()):
        main = mode == result["lru_mode"]
        words = "LRU, a step's set at once" if mode == "step" else "LRU, one access after the other"
        style = {
            "shape": "hv",
            "color": color(place),
            "width": 2.5 if main else 1.5,
            "dash": "solid" if main else "dot",
        }
        keep = [entry.blocks for entry in entries]
        data.append(curve_of(words, found.capacities, found.rates(), style, keep, _hover(result, found.capacities)))
    knees = [found.knee for found in curves.values() if found.knee is not None and found.knee["hit_rate"] is not None]
    if knees:
        x = [knee["capacity_blocks"] for knee in knees]
        data.append(marks_of("knee", x, [knee["hit_rate"] for knee in knees], "star", COLORS[5], 13, _hover(result, x)))
    data += _policies(result, entries)
    first, last = _span([result], data)
    marks = ticks(first, last)
    text = [f"{mark:,}" + (f"<br>{mark / seen:.0%}" if seen else "") for mark in marks]
    shapes, notes = _bounds(result)
    return Chart(
        "Hit rate over capacity",
        f"{thinning(curves['step'].capacities, data[0]['x'])} Below each capacity, its share of the {seen:,.0f} blocks "
        "that a cache sees. Double-click shows the whole range.",
        data,
        layout(
            axis("capacity of one cache, blocks (log)", type="log", range=log_range(first, last),
                 tickvals=marks, ticktext=text),
            axis("hit rate", **SHARE_AXIS),
            440,
            shapes=shapes,
            annotations=notes,
        ),
        wide=True,
    )  # fmt: skip


def runs_by_blocks(compared: Sequence[Run]) -> Chart:
    """The curves of all runs over the capacity in tokens, which block sizes may differ for."""
    results = [run.lead for run in compared]
    data = []
    for place, run in enumerate(compared):
        found, block = curve(run.lead), run.lead["block_size_tokens"]
        x = [capacity * block for capacity in found.capacities]
        data.append(
            curve_of(
                escape(run.label), x, found.rates(), stairs(place), hover=[f"{c:,} blocks" for c in found.capacities]
            )
        )
    first, last = _span(results, data, [result["block_size_tokens"] for result in results])
    sizes = {result["block_size_tokens"] for result in results}
    blocks = sizes.pop() if len(sizes) == 1 else None
    marks = ticks(first, last)
    text = [f"{kilo(mark)}" + (f"<br>{mark / blocks:,.0f}" if blocks else "") for mark in marks]
    below = f"tokens (below: blocks of {blocks})" if blocks else "tokens"
    return Chart(
        "Hit rate of all runs over capacity",
        f"LRU, {_mode(results[0])}; one cache as large as the axis says.",
        data,
        layout(axis(f"capacity of one cache, {below}, log", type="log", range=log_range(first, last), tickvals=marks,
                    ticktext=text), axis("hit rate", **SHARE_AXIS), 380),
    )  # fmt: skip


def runs_by_share(compared: Sequence[Run]) -> Chart:
    """The same over the share of what a cache sees, so that contexts of other lengths compare."""
    data = []
    for place, run in enumerate(compared):
        found, seen = curve(run.lead), run.lead["lru_curve"]["blocks_per_cache"]
        x = [capacity / seen for capacity in found.capacities] if seen else []
        hover = [f"{c:,} blocks" for c in found.capacities] if seen else []
        data.append(curve_of(escape(run.label), x, found.rates() if seen else [], stairs(place), hover=hover))
    return Chart(
        "Hit rate of all runs by share kept near",
        "The same curves where 100% is all blocks that a cache ever reads (mean over the caches).",
        data,
        layout(
            axis("capacity / blocks that a cache sees", tickformat=".0%", range=[0, 1.1]),
            axis("hit rate", **SHARE_AXIS),
            380,
        ),
    )


def block_size_rates(run: Run) -> Chart:
    """One curve a block size, at equal memory."""
    data = []
    for place, result in enumerate(run.results):
        found, block = curve(result), result["block_size_tokens"]
        x = [capacity * block for capacity in found.capacities]
        hover = [f"{capacity:,} blocks" for capacity in found.capacities]
        data.append(curve_of(f"blocks of {block} tokens", x, found.rates(), stairs(place), hover=hover))
    first, last = _span(run.results, data, [result["block_size_tokens"] for result in run.results])
    marks = ticks(first, last)
    return Chart(
        "Hit rate by block size at equal memory",
        f"LRU, {_mode(run.lead)}; a lower curve with the same memory means that whole blocks waste it.",
        data,
        layout(axis("capacity of one cache, tokens (log)", type="log", range=log_range(first, last), tickvals=marks,
                    ticktext=[kilo(mark) for mark in marks]), axis("hit rate", **SHARE_AXIS)),
    )  # fmt: skip


def amplification(run: Run) -> Chart:
    """Tokens read for a token used, by block size, against chance."""
    x = [f"{result['block_size_tokens']} tokens" for result in run.results]
    data = [
        {"type": "bar", "name": name, "x": x, "y": [r["read_amplification"][key]["mean"] for r in run.results],
         "marker": {"color": color(place)}, "texttemplate": "%{y:.1f}", "textposition": "auto",
         "hovertemplate": "%{y:.3f} tokens read for each used<extra>%{fullData.name}</extra>"}
        for place, (key, name) in enumerate((("measured", "measured"), ("uniform", "tokens drawn at random")))
    ]  # fmt: skip
    return Chart(
        "Read amplification by block size",
        "Tokens in the blocks read, for each token selected (1 is ideal), mean over records.",
        data,
        layout(axis("block size", type="category"), axis("tokens read / used", rangemode="tozero"), barmode="group"),
    )


def working_set(compared: Sequence[Run]) -> Chart:
    """Mean and greatest working set by window; of several runs the means."""
    data: list[dict[str, Any]] = []
    alone = len(compared) == 1
    for place, run in enumerate(compared):
        windows = sorted((int(w), d) for w, d in run.lead["working_set"].items() if d["mean"] is not None)
        x = [window for window, _ in windows]
        hover = "last %{x} records: %{y:,.1f} blocks<extra>%{fullData.name}</extra>"
        means = {"type": "scatter", "mode": "lines+markers", "name": "mean" if alone else escape(run.label), "x": x,
                 "y": [d["mean"] for _, d in windows], "line": {"color": color(place)},
                 "hovertemplate": hover}  # fmt: skip
        data.append(means)
        if alone:
            means["error_y"] = {"type": "data", "array": [d["std"] for _, d in windows], "thickness": 1}
            data.append({**{k: v for k, v in means.items() if k != "error_y"}, "name": "greatest",
                         "y": [d["max"] for _, d in windows], "line": {"color": color(1), "dash": "dot"}})  # fmt: skip
    marks = sorted({window for trace in data for window in trace["x"]})
    return Chart(
        "Working set",
        "Distinct blocks in the last records of a stream" + ("; bars: one standard deviation." if alone else ", mean."),
        data,
        layout(axis("window, records (log)", type="log", tickvals=marks, ticktext=[str(mark) for mark in marks]),
               axis("blocks", rangemode="tozero")),
    )  # fmt: skip


def reuse(run: Run) -> Chart | None:
    """Share of reuses within a distance; None where nothing is read twice."""
    temporal = run.lead["temporal_locality"]
    points = temporal["reuse_distance_cdf_steps"]
    if not points:
        return None
    x = [point["reuse_distance_steps"] for point in points]
    line = curve_of("reuses", x, [point["cdf"] for point in points], stairs(0), hover=[""] * len(x))
    line["hovertemplate"] = "%{y:.2%} of the reuses within %{x:,} steps<extra></extra>"
    if len(x) <= 64:
        line["mode"] = "lines+markers"
    same = f" Within the same step, left of the axis: {percent(points[0]['cdf'])}." if x[0] == 0 else ""
    cap = f" The last point stands for {x[-1]:,} steps or more." if x[-1] == temporal["reuse_cap_steps"] else ""
    marks = ticks(1, max(2, x[-1]))
    return Chart(
        "Reuse distance",
        f"Share of repeated reads of a block that come within so many steps of the last one. "
        f"{thinning(x, line['x'])}{same}{cap}",
        [line],
        layout(axis("steps since the block was last read (log)", type="log", tickvals=marks,
                    ticktext=[f"{mark:,}" for mark in marks]), axis("share of reuses", **SHARE_AXIS)),
    )  # fmt: skip


def _bounds(result: Result) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Shapes with their labels: capacities that cannot hold a step's set, what no capacity exceeds, what is advised."""
    needed, top = result["step_set_blocks"]["p95"], ceiling(result)
    shapes: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    if needed is not None:
        shapes.append({"type": "rect", "yref": "paper", "x0": 0.5, "x1": needed, "y0": 0, "y1": 1, "layer": "below",
                       "fillcolor": SHADE, "line": {"width": 0}})  # fmt: skip
        notes.append({"x": math.log10(needed), "y": 0.02, "yref": "paper", "yanchor": "bottom", "xanchor": "right",
                      "showarrow": False, "text": f"cannot hold a step's set<br>(p95: {needed:,} blocks)",
                      "align": "right"})  # fmt: skip
    if top is not None:
        shapes.append({"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": top, "y1": top,
                       "line": {"dash": "dash", "width": 1, "color": COLORS[7]}})  # fmt: skip
        notes.append({"xref": "paper", "x": 1, "y": top, "yanchor": "bottom", "xanchor": "right", "showarrow": False,
                      "text": f"at most {percent(top)}: first accesses miss"})  # fmt: skip
    advised = advised_capacity(result)
    if advised is not None:
        shapes.append({"type": "line", "yref": "paper", "x0": advised, "x1": advised, "y0": 0, "y1": 1,
                       "line": {"width": 2, "color": COLORS[2]}})  # fmt: skip
        notes.append({"x": math.log10(advised), "y": 0.3, "yref": "paper", "xanchor": "left", "showarrow": False,
                      "text": f" advised: {advised:,} blocks"})  # fmt: skip
    return shapes, notes


def _policies(result: Result, entries: list[Capacity]) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(name for entry in entries for name in entry.policies))
    data, hover, x = [], _hover(result, [entry.blocks for entry in entries]), [entry.blocks for entry in entries]
    for place, name in enumerate(names):
        y = [entry.policies[name] for entry in entries]
        if name == "opt":
            data.append(marks_of("OPT (offline bound)", x, y, "diamond", COLORS[2], 11, hover))
        else:
            data.append(marks_of(name, x, y, _SYMBOLS[place % len(_SYMBOLS)], color(place + 3), 9, hover))
    return data


def _hover(result: Result, blocks: Sequence[int]) -> list[str]:
    """Capacity in every unit that is known."""
    seen = result["lru_curve"]["blocks_per_cache"]
    made = []
    for count in blocks:
        parts = [f"{count:,} blocks", f"{count * result['block_size_tokens']:,} tokens"]
        parts += [percent(count / seen) + " of what a cache sees"] if seen else []
        memory = bytes_of(result, count)
        parts += [size(memory)] if memory is not None else []
        made.append("<br>".join(parts))
    return made


def _span(results: Sequence[Result], data: list[dict[str, Any]], unit: Sequence[int] = ()) -> tuple[float, float]:
    """The capacities to look at: from half of a step's set on, and until nothing changes any more."""
    sets = [(result["step_set_blocks"]["p50"], scale) for result, scale in zip(results, unit or [1], strict=True)]
    ends = [trace["x"][-1] for trace in data if trace["mode"] == "lines" and trace["x"]]
    last = 1.3 * max(ends, default=2)
    first = min((small * scale / 2 for small, scale in sets if small is not None), default=1)
    return max(1.0, min(first, last / 4)), last


def _mode(result: Result) -> str:
    return "a step's set at once" if result["lru_mode"] == "step" else "one access after the other"
