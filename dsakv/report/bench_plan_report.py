"""The plan of a benchmark on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from dsakv.report.grids import titled
from dsakv.report.text import TableData, figure, short, size

_PASSES = {"decode_step": "decode step", "prefill_pass": "prefill of a batch"}


def render(document: Mapping[str, Any]) -> Group:
    """Where weights and KV are, then what each pass moves and its bound."""
    weights, cuda = document["weights"], document["model"]["device"] != "cpu"
    parts: list[RenderableType] = []
    if weights is None:
        parts += [
            Text("weights", style="bold"),
            Text(
                f"All are loaded: {size(document['weight_bytes'])}. With --{'device' if cuda else 'host'}-budget "
                "a part of them stays in memory, and each step reads the rest."
            ),
            Text(),
        ]
    else:
        parts += titled(_weights(weights, document["budgets"], cuda=cuda))
    parts += titled(_kv(document["kv"], cuda=cuda))
    if document["bound"] is not None:
        parts += titled(_passes(document["bound"]))
    return Group(*parts[:-1])


def _weights(plan: Mapping[str, Any], budgets: Mapping[str, str | None], *, cuda: bool) -> TableData:
    columns = ["weights", "units", "bytes", "on the device" if cuda else "in memory", "on disk"]
    if cuda:
        columns.insert(4, "in host memory")
    rows = []
    for row in plan["rows"]:
        kept = plan["expert_slots"] if row["kind"] == "expert" else 0  # as they are used
        cells = [row["kind"], figure(row["units"]), size(row["stored_bytes"]), figure(row["on_device"] + kept)]
        cells += [figure(row["in_host"])] if cuda else []
        rows.append((*cells, figure(max(row["on_disk"] - kept, 0))))
    notes = [f"{size(plan['host_bytes'])} of host memory ({_of(budgets['host'])}), buffers included"]
    if cuda:
        notes.append(f"{size(plan['device_bytes'])} of device memory ({_of(budgets['device'])})")
    notes.append(f"read by the {plan['unit']}, {plan['prefetch_depth']} ahead; what stays: {plan['residency']}")
    if plan["n_experts"]:
        notes.append(f"room for {plan['expert_slots']:,} of {plan['n_experts']:,} experts, as they are used")
    return TableData("weights", tuple(columns), rows, "; ".join(notes))


def _of(budget: str | None) -> str:
    return "no limit" if budget is None else f"budget {budget}"


def _kv(kv: Mapping[str, Any], *, cuda: bool) -> TableData:
    device = "on the device" if cuda else "in memory"
    rows = [("rows", size(kv["row_bytes"]), size(kv["hot_bytes"]))]
    if kv["index_key_bytes"]:
        rows.append(("index keys", size(kv["index_key_bytes"]), size(kv["index_key_bytes"])))
    note = f"{kv['blocks']:,} blocks of each layer, for one batch; not part of the budgets above"
    if (tiers := kv["tiers"]) is not None:
        note += f"; home is the {tiers['home'].replace('_', ' ')}, {size(kv['local_bytes'])} of it in host memory"
    return TableData("KV cache", ("KV", "bytes", device), rows, note)


def _passes(bound: Mapping[str, Any]) -> TableData:
    rows = []
    for name, words in _PASSES.items():
        found = bound[name]
        cells = [words, figure(found["tokens"]), _range(found["disk_bytes"], size), _range(found["device_bytes"], size)]
        rows.append((*cells, _range(found["at_least_ms"], short)))
    notes = []
    if bound["disk_bytes_per_s"] is not None:
        how = "past the page cache" if bound["direct"] else "through the page cache, which cannot be passed by here"
        notes.append(f"disk: {bound['disk_bytes_per_s'] / 1e9:.2f} GB/s, measured now on the checkpoint, {how}")
    if bound["device_bytes_per_s"] is not None:
        notes.append(f"to the device: {bound['device_bytes_per_s'] / 1e9:.1f} GB/s, measured now")
    notes.append("ranges: all experts that are kept are the right ones, to none of them")
    columns = ("each", "tokens", "from disk", "converted or copied", "at least ms")
    return TableData("what moves", columns, rows, "; ".join(notes))


def _range(ends: Sequence[Any], show: Any) -> str:
    low, high = (show(end) for end in ends)
    return low if low == high else f"{low} .. {high}"
