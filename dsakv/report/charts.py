"""Parts of charts as plotly.js takes them: dictionaries of ``data`` and ``layout``.

Colors of the page (text, grid) are not set here: the page's script knows whether it is light or dark.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

COLORS = ("#3b82d6", "#e07b39", "#2fa36b", "#c0529b", "#8a6fd1", "#b8962e", "#2aa3ad", "#d64f4f")
"""Legible on white and on near black."""
POINTS = 1000
"""Points drawn of a curve, about."""
SHARE_AXIS: Mapping[str, Any] = MappingProxyType({"tickformat": ".0%", "range": [0, 1.02]})


@dataclass(frozen=True, slots=True)
class Chart:
    """One plot; ``note`` says how to read it."""

    title: str
    note: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    wide: bool = False


def layout(x: dict[str, Any], y: dict[str, Any], height: int = 340, **more: Any) -> dict[str, Any]:
    """What charts have in common: legend above, room for axis titles."""
    return {
        "height": height,
        "margin": {"l": 64, "r": 16, "t": 24, "b": 56},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hovermode": "closest",
        "xaxis": {"automargin": True, **x},
        "yaxis": {"automargin": True, **y},
        **more,
    }


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis that says what it shows."""
    return {"title": {"text": title, "standoff": 8}, **more}


def color(index: int) -> str:
    """The color of the line of that number; they repeat."""
    return COLORS[index % len(COLORS)]


def curve_of(
    name: str,
    x: Sequence[float],
    y: Sequence[float],
    style: dict[str, Any],
    keep: Sequence[float] = (),
    hover: Sequence[str] = (),
) -> dict[str, Any]:
    """A line, thinned but for the values at ``keep``; ``hover`` says more of each point."""
    at = thinned(x, y, keep)
    return {"type": "scatter", "mode": "lines", "name": name, "x": [x[i] for i in at], "y": [y[i] for i in at],
            "line": style, "customdata": [hover[i] for i in at],
            "hovertemplate": "%{y:.2%}<br>%{customdata}<extra>%{fullData.name}</extra>"}  # fmt: skip


def marks_of(
    name: str, x: list[int], y: list[Any], symbol: str, paint: str, large: int, hover: list[str]
) -> dict[str, Any]:
    """Points without a line."""
    return {"type": "scatter", "mode": "markers", "name": name, "x": x, "y": y, "customdata": hover,
            "marker": {"symbol": symbol, "color": paint, "size": large, "line": {"width": 1.5}},
            "hovertemplate": "%{y:.2%}<br>%{customdata}<extra>%{fullData.name}</extra>"}  # fmt: skip


def stairs(place: int) -> dict[str, Any]:
    """Style of a line that keeps its value up to the next point."""
    return {"shape": "hv", "color": color(place), "width": 2, "dash": "solid" if place < len(COLORS) else "dash"}


def ticks(low: float, high: float) -> list[int]:
    """Round numbers from ``low`` to ``high``, more of them where there is less between."""
    wide = math.log10(max(high, 1) / max(low, 1)) > 1.3
    steps = (1, 2, 5) if wide else (1, 1.5, 2, 3, 4, 5, 7)
    found = {step * 10.0**power for power in range(-1, math.ceil(math.log10(max(high, 1))) + 1) for step in steps}
    return [int(value) for value in sorted(found) if value.is_integer() and low <= value <= high]


def log_range(first: float, last: float) -> list[float]:
    """Ends of a logarithmic axis."""
    return [math.log10(first), math.log10(last)]


def kilo(tokens: float) -> str:
    """``16.4k``."""
    return f"{tokens / 1000:g}k" if tokens >= 1000 else f"{tokens:g}"


def thinning(all_of: Sequence[float], drawn: Sequence[float]) -> str:
    """How many points are shown, where it is not all of them."""
    return "" if len(drawn) == len(all_of) else f"{len(drawn):,} of {len(all_of):,} points are drawn."


def thinned(x: Sequence[float], y: Sequence[float], keep: Sequence[float] = ()) -> list[int]:
    """Which points to draw, both coordinates ascending: about ``POINTS``, evenly over log x and over y, the ends, and
    those that decide the value at each x of ``keep``.
    """
    if len(x) <= POINTS:
        return list(range(len(x)))
    half, last = POINTS // 2, len(x) - 1
    low, high = math.log(max(x[0], 1e-9)), math.log(max(x[-1], 1e-9))
    chosen = {0, last}
    for i in range(half):
        chosen.add(min(bisect_left(x, math.exp(low + (high - low) * i / half)), last))
        chosen.add(min(bisect_left(y, y[0] + (y[-1] - y[0]) * i / half), last))
    for value in keep:
        chosen.add(max(0, bisect_left(x, value + 1) - 1))
    return sorted(chosen)
