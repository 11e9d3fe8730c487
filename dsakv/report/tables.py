"""A result as tables of text: what the terminal and the HTML report both show."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsakv.trace.open import has_random_weights

_SPREAD = ("mean", "std", "min", "max")


@dataclass(frozen=True, slots=True)
class TableData:
    """A titled table; every cell is plain text that may come from the trace and is still to be escaped."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def figure(value: float | None) -> str:
    """A number for people: whole ones in full, others with three decimals, one from 100 on."""
    if value is None:
        return "-"
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3f}"


def plural(count: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def printable(text: object) -> str:
    """``text`` without characters that would steer a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def header(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What was analyzed, and how, as pairs of a name and a fact."""
    given, meta = result["input"], result["run_meta"] or {}
    left_out = [f"{entry['count']:,} bad ({reason})" for reason, entry in given["rejected"].items()]
    left_out += [
        f"{count:,} {what}"
        for count, what in (
            (given["records_without_positions"], "without positions"),
            (given["prefill_tail_records_left_out"], "of the prefill's tail"),
            (len(given["unfinished_last_lines"]), "cut off"),
        )
        if count
    ]
    facts = [
        ("trace", result["trace_dir"]),
        ("records", f"{given['records']:,} in {plural(given['files'], 'file')}, {given['bytes'] / 1e6:,.1f} MB"),
        ("left out", ", ".join(left_out)),
        ("dataset", meta.get("dataset", "")),
        ("model", _model(meta.get("model"))),
        ("block size", f"{result['block_size_tokens']} tokens"),
        ("stream", _stream(result)),
    ]
    return [(name, printable(fact)) for name, fact in facts if fact]


def tables(result: dict[str, Any]) -> list[TableData]:
    """The figures of one result."""
    return [_locality(result), _reuse(result), _working_set(result), _cache(result), _recommendations(result)]


def _model(model: Any) -> Any:
    return model.get("name", "") if isinstance(model, dict) else model or ""


def _stream(result: dict[str, Any]) -> str:
    if result["step_union"]:
        return "a request, its layers merged step by step"
    return "a request" if result["key_mode"] == "request" else "a layer of a request"


def _spread(name: str, distribution: dict[str, Any]) -> tuple[str, ...]:
    return (name, *(figure(distribution[key]) for key in _SPREAD))


def _locality(result: dict[str, Any]) -> TableData:
    stats = result["record_stats"]
    recent, spread_over = stats["recent_locality"], stats["block_concentration"]
    rows = [
        _spread("unique blocks", stats["unique_blocks"]),
        _spread("block span", stats["block_span"]),
        _spread("block density", stats["block_density"]),
        _spread("tokens per block", stats["tokens_per_block_mean"]),
        _spread("normalized entropy", spread_over["normalized_entropy"]),
        _spread("gini", spread_over["gini"]),
        _spread("mean block distance", recent["mean_block_distance"]),
    ]
    rows += [_spread(f"share of tokens at most {w} back", d) for w, d in recent["recent_token_ratio"].items()]
    rows += [_spread(f"share of blocks at most {w} back", d) for w, d in recent["recent_block_ratio"].items()]
    return TableData("Locality of a record", ("figure", *_SPREAD), rows)


def _reuse(result: dict[str, Any]) -> TableData:
    temporal = result["temporal_locality"]
    jaccard = temporal["step_jaccard"]
    rows = [
        ("Jaccard of consecutive records, mean", figure(jaccard["mean"])),
        ("Jaccard of consecutive records, std", figure(jaccard["std"])),
        ("blocks touched for the first time", figure(temporal["first_touch_blocks"])),
        ("blocks touched only once", figure(temporal["single_touch_blocks"])),
        ("reuses", figure(temporal["reuse_samples"])),
    ]
    points = temporal["reuse_distance_cdf_steps"]
    if points:
        distances = [point["reuse_distance_steps"] for point in points]
        cap, last = temporal["reuse_cap_steps"], distances[-1]
        marks = [2**i for i in range(last.bit_length()) if 2**i < last]
        if last < cap:
            marks.append(last)
        for mark in marks:
            at = bisect_right(distances, mark)
            share = points[at - 1]["cdf"] if at else 0.0
            rows.append((f"share of reuses after at most {mark} {'step' if mark == 1 else 'steps'}", figure(share)))
        if last == cap:
            before = points[-2]["cdf"] if len(points) > 1 else 0.0
            rows.append((f"share of reuses after {cap} steps or more", figure(1 - before)))
    return TableData("Reuse", ("figure", "value"), rows)


def _working_set(result: dict[str, Any]) -> TableData:
    rows = [_spread(window, d) for window, d in result["working_set"].items()]
    return TableData("Working set in distinct blocks", ("last records", *_SPREAD), rows)


def _cache(result: dict[str, Any]) -> TableData:
    needed = result["record_stats"]["unique_blocks"]["mean"]
    rows, small = [], False
    for entry in result["cache_sim"].values():
        below = result["lru_mode"] == "sequential" and needed is not None and entry["capacity_blocks"] < needed
        small |= below
        rows.append(
            (
                figure(entry["capacity_blocks"]) + ("*" if below else ""),
                figure(entry["hits"]),
                figure(entry["misses"]),
                figure(entry["hit_rate"]),
            )
        )
    notes = []
    if small:
        notes.append("* below the blocks of one record, where access by access LRU thrashes: see --lru-mode step")
    first, reused = (result["temporal_locality"][key] for key in ("first_touch_blocks", "reuse_samples"))
    if reused:
        notes.append(
            f"A block's first touch always misses: no capacity hits more than {reused / (first + reused):.3f}."
        )
    title = "LRU cache of each stream, " + ("step by step" if result["lru_mode"] == "step" else "access by access")
    return TableData(title, ("blocks", "hits", "misses", "hit rate"), rows, "\n".join(notes))


def _recommendations(result: dict[str, Any]) -> TableData:
    rows = [
        (
            entry["rule"].replace("_", " "),
            f"{figure(entry['value'])} ({'>' if entry['comparison'] == 'above' else '<'} {figure(entry['threshold'])})",
            entry["advice"],
        )
        for entry in result["recommendations"]
    ]
    note = "" if rows else "no rule applies"
    if rows and has_random_weights(result["run_meta"]):
        note = "The weights are random: do not act on this advice."
    return TableData("Recommendations", ("rule", "measured", "advice"), rows, note)
