"""Line charts as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 420, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 34, 44
_MOST_TICKS = 9


def line_chart(title: str, x_label: str, points: Sequence[tuple[float, float]], top: float | None = None) -> str:
    """``points`` (x ascending, both >= 0) as one line over ``log2(1 + x)``; empty text without points.

    ``top`` is the end of the y axis, by default the largest y.
    """
    if not points:
        return ""
    ceiling = top if top is not None else _round_up(max(y for _, y in points) or 1.0)
    low, high = math.log2(1 + points[0][0]), math.log2(1 + points[-1][0])

    def place(x: float, y: float) -> tuple[float, float]:
        share = (math.log2(1 + x) - low) / (high - low) if high > low else 0.5
        across, up = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        return _LEFT + share * across, _HEIGHT - _BOTTOM - y / ceiling * up

    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text class="title" x="{_LEFT}" y="18">{escape(title)}</text>',
    ]
    for quarter in range(5):
        y = ceiling * quarter / 4
        _, at = place(points[0][0], y)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{at:.1f}" x2="{_WIDTH - _RIGHT}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    every = -(-len(points) // _MOST_TICKS)
    for x, _ in points[::every]:
        at, _ = place(x, 0)
        parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    placed = [place(x, y) for x, y in points]
    parts.append(f'<polyline class="line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in placed)}"/>')
    if len(placed) <= 64:
        parts += [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in placed]
    parts.append("</svg>")
    return "".join(parts)


def _round_up(value: float) -> float:
    """The next 1, 2, 4 or 8 times a power of ten, so that quarters of it read well."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 8, 10) if step * power >= value)
