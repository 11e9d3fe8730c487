"""``dsakv analyze``: traces in, ``analysis.json`` and, where asked for, an HTML report out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from dsakv.analysis.plan import check_plan, plan_passes, plan_trace
from dsakv.analysis.run import analyze_trace, passes
from dsakv.config import AnalyzeConfig
from dsakv.console import Console
from dsakv.errors import InputError
from dsakv.report import html
from dsakv.settings import keys
from dsakv.trace.files import check_target, run_files, write_result
from dsakv.trace.open import TraceDir, find_traces, newest_run

_OF_PLAN = ("links", "plan_policies", "plan_hot", "plan_budget", "plan_hbm", "base_tpot_ms")
_ELSEWHERE = "name a file in a directory that can be written to"


@dataclass(frozen=True, slots=True)
class AnalysisOutcome:
    """What an analysis left behind."""

    document: dict[str, Any]
    """``{"results": [...]}``, one for each trace directory and block size."""
    out: Path
    report: Path | None


def analyze(config: AnalyzeConfig, console: Console) -> AnalysisOutcome:
    """Analyze what ``config.input`` names, by default the newest run under ``outputs/``, and write the results.

    Nothing is written unless every trace could be analyzed.

    Raises:
        InputError: no trace there, a bad record in strict mode, a trace without positions, options at odds.
        DsakvError: a file cannot be read or written.
    """
    root = Path(config.input) if config.input is not None else newest_run(Path("outputs"))
    traces = find_traces(root)
    links = check_plan(config) if config.plan else None
    given = [key for key in keys("analyze") if key.name in _OF_PLAN and getattr(config, key.name) != key.default]
    if links is None and given:
        raise InputError(f"{given[0].flag} does nothing without --plan", "add --plan, or leave it out")
    if config.to_parquet is not None:
        _check_targets([Path(path) for path in (config.out, config.report) if path is not None], traces)
        root, traces = _to_parquet(root, traces, config, console)
    out = Path(config.out) if config.out is not None else traces[0].path / "analysis.json"
    report = Path(config.report) if config.report is not None else None
    _check_targets([out] if report is None else [out, report], traces)

    results: list[dict[str, Any]] = []
    warnings: list[str] = []
    reads = [passes(trace, config) for trace in traces]
    with _progress(traces, f"analyzing {root}", console, reads) as read:
        for trace in traces:
            found = analyze_trace(trace, config, read)
            results += found
            warnings += [f"{trace.path}: {warning}" for warning in found[0]["warnings"]]
    if links is not None:
        with _progress(traces, f"planning {root}", console, [plan_passes(config)] * len(traces)) as read:
            for trace in traces:
                mine = [result for result in results if result["trace_dir"] == str(trace.path)]
                tiers = next((result["kv_tiers"] for result in mine if result["kv_tiers"]), None)
                plan = plan_trace(trace, config, links, read, tiers)
                for result in mine:
                    result["plan"] = plan
    for warning in warnings:
        console.warn(warning)

    document = {"results": results}
    write_result(out, orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE), _ELSEWHERE)
    console.info(f"results: {out}")
    if report is not None:
        write_result(report, html.render(document).encode(), _ELSEWHERE)
        console.info(f"report: {report}")
    return AnalysisOutcome(document, out, report)


def _to_parquet(
    root: Path, traces: list[TraceDir], config: AnalyzeConfig, console: Console
) -> tuple[Path, list[TraceDir]]:
    """Copy the traces; returns where, and those found there."""
    from dsakv.trace.convert import to_parquet  # pyarrow is not needed for the rest

    if config.on_error != "strict":
        raise InputError(
            "--to-parquet copies whole traces only: --on-error skip would leave records out",
            "convert with --on-error strict, after repairing or removing what is bad",
        )
    target = Path(str(config.to_parquet))
    with _progress(traces, f"converting {root}", console, [1] * len(traces)) as read:
        to_parquet(traces, root, target, console.warn, read)
    console.info(f"copy: {target}")
    return target, find_traces(target)


def _progress(
    traces: Sequence[TraceDir], what: str, console: Console, reads: Sequence[int]
) -> AbstractContextManager[Callable[[int], None]]:
    """A bar in megabytes, advanced by bytes, for traces that are each read so often."""
    total = sum(
        often * shard.stat().st_size for trace, often in zip(traces, reads, strict=True) for shard in trace.shards
    )
    return console.megabytes(total, what)


def _check_targets(targets: list[Path], traces: Iterable[TraceDir]) -> None:
    """Say before the work, not after it, that its results have nowhere to go."""
    if len({_real(target) for target in targets}) < len(targets):
        raise InputError("--out and --report name the same file", "give each its own")
    for target in targets:
        if any(_real(target) in _real(other).parents for other in targets):
            raise InputError(f"{target} cannot be a file and a folder", "give --out and --report files of their own")
    inputs = {_real(path) for trace in traces for path in (*trace.shards, *run_files(trace.path))}
    for target in targets:
        if _real(target) in inputs:
            raise InputError(f"{target} is part of the trace", "name another file for the results")
        check_target(target, _ELSEWHERE)


def _real(path: Path) -> Path:
    """``path`` without links; unlike ``resolve``, it takes those that lead in a circle as they are."""
    return Path(os.path.realpath(path))
