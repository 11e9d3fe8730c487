"""The results of `dsakv bench` and of its comparisons on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from dsakv.report.grids import columns_of
from dsakv.report.text import figure, percent, plural, printable, short, size

_LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms", "decode_step_ms")
_SHOWN_AS = {"ttft_ms": ("mean",), "tpot_ms": ("mean",), "itl_ms": ("mean", "p50", "p95", "p99"), "e2el_ms": ("mean",)}
_TIMES = ("prefill_ms", "decode_ms", "e2e_ms")
_RATES = ("throughput_tok_s", "output_throughput", "total_token_throughput")
_LINKS = {
    "disk": "disk to host memory, weights",
    "device": "host memory to the device, weights",
    "local_pool_read": "host memory to the device, KV",
    "local_pool_write": "device to host memory, KV",
    "remote_pool_read": "remote pool to the device, KV",
    "remote_pool_write": "device to the remote pool, KV",
}
_OF_LINKS = ("mb_s", "overlap_efficiency", "bound_ms")
"""Formulas that belong under the table of links."""
_COMPARED_LINKS = (
    *("disk.bytes", "disk.mb_s", "device.bytes"),
    *(f"{pool}_{way}.bytes" for pool in ("local_pool", "remote_pool") for way in ("read", "write")),
)
COMPARED = (
    *(f"{name}.{which}" for name, shown in _SHOWN_AS.items() for which in shown),
    *_TIMES,
    "decode_step_ms.p50",
    *_RATES,
    *(f"links.{kind}.{what}" for kind in ("prefill", "decode") for what in _COMPARED_LINKS),
    *(f"links.{kind}.overlap_efficiency" for kind in ("prefill", "decode")),
    "experts.hit_rate",
    "kv.hit_rate",
)
"""Figures that a comparison shows, by path."""
SPREAD = "spread = (max - min) / median, over rounds. The percentile q of n values is sorted[round((n - 1) * q)]."


def render_bench(results: Mapping[str, Any]) -> Group:
    """Facts, figures with their formulas, links, memory and, where there are any, doubts."""
    parts: list[RenderableType] = [_heading("benchmark"), _facts(results), Text(), _figures(results["summary"])]
    formulas = results["formulas"]
    parts += [Text(), _formulas({name: text for name, text in formulas.items() if name not in _OF_LINKS}), _dim(SPREAD)]
    if links := _links(results["links"], cuda=results["model"]["device"] != "cpu"):
        parts += [Text(), _heading("what moved, medians over rounds"), *links]
        parts.append(_formulas({name: formulas[name] for name in _OF_LINKS}))
    return Group(*parts, *_doubts(results))


def round_line(figures: Mapping[str, Any]) -> str:
    """A round in one line."""
    return (
        f"{short(figures['e2e_ms'])} ms, TTFT {short(figures['ttft_ms']['mean'])} ms, "
        f"TPOT {short(figures['tpot_ms']['mean'])} ms, decode {short(figures['throughput_tok_s'])} tokens/s"
    )


def render_comparison(document: Mapping[str, Any]) -> Group:
    """Medians of two configurations beside each other, and what the second is times the first."""
    table = columns_of(("figure", "A", "B", "B / A", "least", "most", "spread"), {0})
    for name in COMPARED:
        found = document["figures"].get(name)
        if found and (found["a"]["median"] or found["b"]["median"]):  # what neither has says nothing
            ratio = found["ratio"]
            cells = [figure(found["a"]["median"]), figure(found["b"]["median"])]
            cells += [short(ratio[key]) for key in ("median", "min", "max")]
            if ratio["median"] is not None and ratio["min"] < 1 < ratio["max"]:
                cells[2] += " ?"
            table.add_row(*(Text(cell) for cell in (name, *cells, percent(ratio["spread"]))))
    same = document["same_tokens"]
    differing = [f"{name}: {_value(a)} / {_value(b)}" for name, (a, b) in document["differences"].items()]
    sides = [_heading("comparison"), Text(f"A  {document['a']['path']}"), Text(f"B  {document['b']['path']}")]
    sides.append(Text(f"A / B differ in {'; '.join(map(printable, differing)) or 'nothing'}"))
    notes = [
        f"B / A: median over {document['pairs']} pairs of rounds that ran one after the other, and its least, most "
        "and spread over the pairs",
        f"both generated {'the same' if same else 'different'} tokens",
    ]
    if document["pairs"] > 1:
        notes.append("?: least and most lie on both sides of 1, so that which is faster was not found out")
    return Group(*sides, Text(), table, _dim("\n".join(notes)))


def _value(value: Any) -> str:
    return "none" if value is None or value == [] else str(value)


def span(prompts: Mapping[str, Any]) -> str:
    """How many prompts there are, and how long."""
    shortest, longest = prompts["shortest"], prompts["longest"]
    tokens = f"{shortest:,} tokens" if shortest == longest else f"{shortest:,} to {longest:,} tokens"
    return f"{plural(prompts['count'], 'prompt')} of {tokens} ({printable(prompts['source'])})"


def _formulas(formulas: Mapping[str, str]) -> RenderableType:
    table = columns_of(("", ""), {0, 1})
    table.show_header = False
    for name, meaning in formulas.items():
        table.add_row(_dim(name), _dim(meaning))
    return table


def _facts(results: Mapping[str, Any]) -> RenderableType:
    model, prompts, machine = results["model"], results["prompts"], results["machine"]
    table = columns_of(("", ""), {0, 1})
    table.show_header = False
    random = " (random weights: its text means nothing, its speed does)" if model["random_weights"] else ""
    rows = [
        ("model", f"{printable(model['name'])}, {model['dtype']} on {machine['device']}{random}"),
        ("machine", f"{machine['cpu']}, {machine['usable_cores']} cores, {plural(machine['threads'], 'thread')}"),
        ("prompts", f"{span(prompts)}, {prompts['cut']:,} cut to fit"),
        ("new tokens", f"{prompts['new_tokens']:,} for each prompt; an end of sequence does not end it"),
        ("rounds", f"{len(results['rounds'])} after {results['config']['bench']['warmup_rounds']} to warm up"),
        ("weights", _placed(results["placement"])),
        ("memory", _memory(results["memory"])),
    ]
    for name, text in rows:
        table.add_row(Text(name), Text(text))
    return table


def _placed(plan: Mapping[str, Any] | None) -> str:
    if plan is None:
        return "all loaded"
    disk = sum(row["on_disk"] for row in plan["rows"])
    return (
        f"by {plan['unit']}, {plan['residency']}: {size(plan['host_bytes'])} in host memory, "
        f"{size(plan['device_bytes'])} on the device, {disk:,} units on disk; "
        f"{size(plan['pass_disk_bytes'])} read a pass"
    )


def _memory(memory: Mapping[str, int | None]) -> str:
    parts = [f"{size(memory['host_peak'])} of host memory at most"] if memory["host_peak"] is not None else []
    if memory["device_allocated"] is not None:
        allocated, reserved = size(memory["device_allocated"]), size(memory["device_reserved"])
        parts.append(f"on the device {allocated} allocated, {reserved} reserved at most")
    return "; ".join(parts) or "not told by this system"


def _figures(summary: Mapping[str, Any]) -> RenderableType:
    table = columns_of(("figure", "median", "min", "max", "spread"), {0})

    def row(name: str, found: Mapping[str, float | None]) -> None:
        if found["median"] is not None:
            numbers = [figure(found[key]) for key in ("median", "min", "max")]
            table.add_row(*(Text(cell) for cell in (name, *numbers, percent(found["spread"]))))

    for name in _LATENCIES:
        for which in _SHOWN_AS.get(name, ("p50",)):
            row(f"{name} {which}", summary[name][which])
    for name in (*_TIMES, *_RATES):
        row(name, summary[name])
    for name in ("weight_h2d", "kv_h2d", "kv_d2h"):
        if summary[name]["bytes"]["median"]:
            row(f"{name} bytes", summary[name]["bytes"])
            row(f"{name} MB/s", summary[name]["mb_s"])
    row("expert cache hit rate", summary["experts"]["hit_rate"])
    row("KV hit rate on the device", summary["kv"]["hit_rate"])
    for tier, found in summary["kv"]["found"].items():
        row(f"KV blocks found in {tier}", found)
    return table


def _links(links: Mapping[str, Any], *, cuda: bool) -> list[RenderableType]:
    columns = ("phase", "link", "bytes", "a pass", "MB/s", "at work ms", "a pass ms")
    table, notes = columns_of(columns, {0, 1}), []
    for kind in ("prefill", "decode"):
        for name, words in (_LINKS if cuda else _LINKS | {"device": "converted, weights"}).items():
            link = links[kind][name]
            if link["bytes"]:
                cells = [size(link["bytes"]), size(link["bytes_per_pass"]), short(link["mb_s"])]
                cells += [short(link["busy_ms"]), short(link["busy_ms_per_pass"])]
                table.add_row(*(Text(cell) for cell in (kind, words, *cells)))
        if links[kind]["overlap_efficiency"] is not None:
            notes.append(
                f"{kind}: {figure(links[kind]['passes'])} passes in {short(links[kind]['wall_ms'])} ms, of which "
                f"{short(links[kind]['wait_ms'])} ms waited for weights; overlap efficiency "
                f"{percent(links[kind]['overlap_efficiency'])}"
            )
    if not table.row_count:
        return []
    return [table, *([_dim("\n".join(notes))] if notes else [])]


def _doubts(results: Mapping[str, Any]) -> list[RenderableType]:
    bound = results["bound"]
    speeds = {"from disk": bound["disk_bytes_per_s"], "to the device": bound["device_bytes_per_s"]}
    at = " and ".join(f"{size(speed)}/s {link}" for link, speed in speeds.items() if speed)
    parts: list[RenderableType] = [
        Text(f"{kind} took {bound[kind]['wall_to_bound']:.2f} times its bound, at {at}")
        for kind in ("prefill", "decode")
        if bound[kind]["wall_to_bound"] is not None
    ]
    drift = results["drift"]
    if drift["flag"]:
        changes = [f"{name} {change:+.1%}" for name, change in drift["change"].items() if change is not None]
        parts.append(Text(f"DRIFT: {', '.join(changes)}. {drift['rule']}", style="yellow"))
    if results["rejected"]:
        parts.append(Text("REJECTED: these results cannot be right. Do not use them.", style="bold red"))
        parts += [Text(f"  {printable(fault)}", style="red") for fault in _some(results["rejected"])]
    return [Text(), *parts] if parts else []


def _some(faults: Sequence[str], most: int = 8) -> list[str]:
    more = len(faults) - most
    return [*faults[:most], *([f"and {more:,} more"] if more > 0 else [])]


def _heading(text: str) -> Text:
    return Text(text, style="bold")


def _dim(text: str) -> Text:
    return Text(text, style="dim")
