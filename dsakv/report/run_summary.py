"""What a traced run says on the terminal when it is over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import filesize
from rich.console import Group, RenderableType
from rich.table import Table

from dsakv.report.text import size
from dsakv.request import TIERS, Step, WeightTraffic
from dsakv.trace.serving import QUANTILES, SPANS
from dsakv.trace.tiers import PHASES, decode_hit_rates

_LABELS = {"queue_ms": "queue", "ttft_ms": "TTFT", "tpot_ms": "TPOT", "latency_ms": "latency"}
_CLOCKS = {
    "virtual": "a clock that counts the engine's work and skips idle time",
    "wall": "the wall clock",
}
_RATES = {
    "requests_per_s": "requests/s",
    "output_tokens_per_s": "new tokens/s",
    "total_tokens_per_s": "tokens/s with the prompts",
}
_DISTRIBUTIONS = {
    "unique_blocks": "blocks touched a record",
    "touched_block_ratio": "share of the blocks in use",
    "tokens_per_touched_block": "tokens used of a touched block",
    "offsets": "distance to the newest token",
    "prefix_intersection_ratio": "touched blocks of earlier prompts",
}


@dataclass(slots=True)
class Speed:
    """Tokens and time of the two kinds of steps, and what streaming weights took."""

    tokens: Counter[str] = field(default_factory=Counter)
    wall_us: Counter[str] = field(default_factory=Counter)
    weights: WeightTraffic = field(default_factory=WeightTraffic)
    passes: int = 0
    """Over weights that were streamed."""

    def add(self, step: Step) -> None:
        """Count a step: prompt tokens of prefill, new tokens of decode."""
        self.tokens[step.kind] += step.prompt_tokens or len(step.new_tokens)
        self.wall_us[step.kind] += step.wall_us
        if step.weights is not None:
            self.weights.add(step.weights)
            self.passes += 1

    def moved(self) -> str:
        """What streaming weights came to, in a line; empty where all were loaded."""
        if not self.passes:
            return ""
        moved = self.weights
        passes = "1 pass" if self.passes == 1 else f"{self.passes:,} passes"
        told = (
            f"weights: {size(moved.disk_bytes)} read from disk for {passes}, "
            f"computing waited {moved.wait_us / 1e6:.1f} s of {sum(self.wall_us.values()) / 1e6:.1f} s for them"
        )
        if asked := moved.expert_hits + moved.expert_misses:
            told += f"; {moved.expert_hits:,} of {asked:,} times an expert was there"
        return told

    def of(self, kind: str) -> str:
        """``1,024 tokens in 2.0 s (512.0 tokens/s)``."""
        seconds = max(self.wall_us[kind], 1) / 1e6
        return f"{self.tokens[kind]:,} tokens in {seconds:.1f} s ({self.tokens[kind] / seconds:,.1f} tokens/s)"


def render_run(
    trace_dir: Path,
    summary: Mapping[str, Any],
    scores: Mapping[str, Sequence[float]],
    speed: Speed,
    model: Mapping[str, Any],
    clock: str,
) -> RenderableType:
    """Tables of the distributions in ``summary.json``, of service times and, where there are any, of scores."""
    records = summary["unique_blocks"]["count"]
    facts = Table(title=f"trace {trace_dir}", title_justify="left", show_header=False, box=None)
    weights = " (random weights: locality figures mean nothing)" if model["random_weights"] else ""
    facts.add_row("model", f"{model['name']}{weights}")
    if model.get("caveat"):
        facts.add_row("note", str(model["caveat"]))
    facts.add_row("records", f"{records:,} of {model['n_layers']} layers, top-k {model['index_topk']}")
    for kind in ("prefill", "decode"):
        if speed.tokens[kind]:
            facts.add_row(kind, speed.of(kind))
    served = summary["serving"]
    if served["cached_tokens"]:
        share = served["cached_tokens"] / served["prompt_tokens"]
        facts.add_row(
            "prefix cache",
            f"{served['cached_tokens']:,} of {served['prompt_tokens']:,} prompt tokens reused ({share:.1%})",
        )
    parts: list[RenderableType] = [facts]
    table = Table("selection", "mean", "min", "p50", "p95", "max", title="what was selected", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for key, label in _DISTRIBUTIONS.items():
        values = summary[key]
        if values["count"]:
            table.add_row(label, *(_number(values[name]) for name in ("mean", "min", "p50", "p95", "max")))
    if table.row_count:
        parts.append(table)
    if "transfers" in summary.get("kv_tiers", {}):
        parts.append(render_tiers(summary["kv_tiers"]["transfers"]))
    parts += _serving(served, clock)
    if scores:
        quality = Table("group", "requests", "score", title="answers found (1 is all)", title_justify="left")
        quality.columns[1].justify = quality.columns[2].justify = "right"
        for group, values in scores.items():
            quality.add_row(group, str(len(values)), f"{sum(values) / len(values):.2f}")
        parts.append(quality)
    return Group(*parts)


def render_tiers(transfers: Mapping[str, Any]) -> RenderableType:
    """Where KV was found and what moved, by phase and tier, of :meth:`dsakv.trace.tiers.Traffic.transfers`."""
    title = "where KV was found and what moved"
    if transfers.get("since_resume"):
        title += ", since the run was resumed"
    table = Table(title=title, title_justify="left")
    for column in ("phase", "tier", "blocks found", "share"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("phase", "tier") else "right")
    for column in ("read", "written"):
        table.add_column(column, justify="right")
    for phase in PHASES:
        tiers = transfers.get(phase, {})
        every = sum(tier["hits"] for tier in tiers.values())
        for name in TIERS:
            if name in tiers:
                tier = tiers[name]
                table.add_row(
                    phase.replace("_", "-"),
                    name,
                    f"{tier['hits']:,}",
                    f"{tier['hits'] / every:.1%}" if every else "-",
                    _moved(tier["reads"], tier["read_ops"], name, tier["bytes_read"], tier["read_gb_s"]),
                    _moved(tier["writes"], tier["write_ops"], name, tier["bytes_written"], tier["write_gb_s"]),
                )
    rates = decode_hit_rates(transfers)
    if rates["hit_rate"] is None:
        return table
    warm = rates["hit_rate_without_cold"]
    without = "and all of them were cold" if warm is None else f"{warm:.1%} without the cold ones"
    notes = [
        f"decode found {rates['hit_rate']:.1%} of its blocks on the device, {without}: those that it reads for the "
        "first time since they were written, the price of starting with an empty cache"
    ]
    staged = transfers["decode"].get("hbm", {}).get("staged_blocks", 0)
    if staged:
        notes.append(f"a layer's step of decode held up to {staged:,} blocks that did not stay hot")
    retries = sum(tier["retries"] for phase in PHASES for tier in transfers.get(phase, {}).values())
    if retries:
        notes.append(f"{retries:,} commands to the remote pool failed at first and were tried again")
    return Group(table, "\n".join(notes))


def _moved(batches: int, ops: int, tier: str, size: int, rate: float | None) -> str:
    if not batches:
        return "-"
    unit = "rows" if tier == "hbm" else "blocks"
    speed = "" if rate is None else f", {_number(rate)} GB/s"
    return f"{ops:,} {unit} in {batches:,} {'batch' if batches == 1 else 'batches'}\n{filesize.decimal(size)}{speed}"


def _serving(served: Mapping[str, Any], clock: str) -> list[RenderableType]:
    """Waiting and latency of the requests, and what the words mean. Requests with known answers were not served."""
    if not served["requests"] or served["forced"]:
        return []
    title = f"how requests were served, in milliseconds by {_CLOCKS[clock]}"
    table = Table("time", *QUANTILES, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in SPANS:
        values = served[name]
        if values["max"] is not None:
            table.add_row(_LABELS[name], *(_number(values[q]) for q in QUANTILES))
    rates = [f"{served['requests']:,} requests in {served['duration_s']:,.1f} s from first arrival to last token"]
    rates += [f"{_number(served[name])} {unit}" for name, unit in _RATES.items() if served[name] is not None]
    meanings = "; ".join(f"{_LABELS[name]}: {meaning}" for name, meaning in SPANS.items())
    return [table, f"{'; '.join(rates)}\n{meanings}"]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
