"""Numbers and names as people read them. Every function returns plain text, still to be escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TableData:
    """A titled table; cells may come from the trace. ``words`` are the columns that hold prose or names."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    words: frozenset[int] = frozenset({0})


def figure(value: float | None) -> str:
    """Whole numbers in full, others with three decimals, one from 100 on; ``-`` for none."""
    if value is None:
        return "-"
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3f}"


def short(value: float | None) -> str:
    """About three digits: ``234``, ``14.6``, ``0.55``."""
    if value is None:
        return "-"
    if float(value).is_integer() or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def percent(share: float | None) -> str:
    """``0.9725`` as ``97.2%``."""
    return "-" if share is None else f"{share:.1%}"


def size(count: float | None) -> str:
    """Bytes as ``18.9 MB`` (powers of 1000)."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def plural(count: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def printable(text: object) -> str:
    """``text`` without characters that would steer a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
