"""A trace into results: every shard on its own, in as many processes as asked for, added up in shard order.

Shards are cut at requests, so what a stream did before lies in its own shard, and the sum does not depend on who
counted what. That a request stays in one shard is verified; where it does not, the trace is read again as a whole.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import msgspec

from dsakv import __version__
from dsakv.analysis.part import PartFigures, analyze_part, make_metrics
from dsakv.analysis.recommend import recommend
from dsakv.config import AnalyzeConfig
from dsakv.errors import DsakvError, InputError
from dsakv.trace.intake import Intake, ReadCounts
from dsakv.trace.open import TraceDir, has_random_weights
from dsakv.trace.units import Unit, read_unit, to_units

LARGEST_BLOCK = (1 << 31) - 1
"""Positions are 32-bit integers."""
# They say how and where to, not what: results must be the same without them.
_NOT_FIGURES = ("workers", "out", "report", "json")


def analyze_trace(trace: TraceDir, config: AnalyzeConfig, advance: Callable[[int], None]) -> list[dict[str, Any]]:
    """The results of one trace, one for each block size.

    ``advance`` is called with the number of bytes just read.

    Raises:
        InputError: a bad record in strict mode, no record with positions, or no way to tell the block size.
        DsakvError: a file that cannot be read, or a worker that was killed.
    """
    block_sizes, from_records = _block_sizes(trace, config)
    total = _no_figures(config, block_sizes)
    for part in _parts(trace, config, block_sizes, from_records, advance):
        if total.requests & part.requests:
            total = analyze_part(to_units(trace.shards), config, block_sizes, from_records, advance)
            break
        total.merge(part)
    if len(total.counts.block_sizes) > 1:
        sizes = ", ".join(map(str, sorted(total.counts.block_sizes)))
        raise InputError(f"the records in {trace.path} have several block sizes: {sizes}", "choose with --block-size")
    _require_figures(trace, total)
    return [_result(trace, config, block_size, total) for block_size in block_sizes]


def _block_sizes(trace: TraceDir, config: AnalyzeConfig) -> tuple[tuple[int, ...], bool]:
    """The block sizes to analyze, and whether they are the records' own."""
    if config.block_sizes and config.block_size:
        raise InputError("--block-size and --block-sizes are both given", "give one of them")
    asked = config.block_sizes or ((config.block_size,) if config.block_size else ())
    for size in asked:
        if not 1 <= size <= LARGEST_BLOCK:
            raise InputError(f"a block of {size} tokens is not possible", f"choose from 1 to {LARGEST_BLOCK}")
    if asked:
        return tuple(dict.fromkeys(asked)), False
    if trace.run_meta is not None and "block_size_tokens" in trace.run_meta:
        size = trace.run_meta["block_size_tokens"]
        if type(size) is not int or not 1 <= size <= LARGEST_BLOCK:
            raise InputError(
                f'{trace.path / "run_meta.json"}: "block_size_tokens" is {size!r}, not a positive integer',
                "repair it, or give --block-size",
            )
        return (size,), False
    return (_first_block_size(trace, config),), True


def _first_block_size(trace: TraceDir, config: AnalyzeConfig) -> int:
    intake = Intake(config.on_error, block_sizes=True)
    for unit in to_units(trace.shards):
        for _ in read_unit(unit, intake):
            if intake.counts.block_sizes:
                return min(intake.counts.block_sizes)
    _require_records(trace, intake.counts)
    raise InputError(f"nothing in {trace.path} tells the block size", "give --block-size")


def _no_figures(config: AnalyzeConfig, block_sizes: Sequence[int]) -> PartFigures:
    return PartFigures(ReadCounts(), 0, set(), {size: make_metrics(config) for size in block_sizes})


def _parts(
    trace: TraceDir,
    config: AnalyzeConfig,
    block_sizes: Sequence[int],
    from_records: bool,
    advance: Callable[[int], None],
) -> Iterator[PartFigures]:
    """The figures of each shard, in shard order."""
    units = to_units(trace.shards)
    workers = min(config.workers, len(units))
    if workers == 1:
        for unit in units:
            yield analyze_part([unit], config, block_sizes, from_records, advance)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker) as pool:
        try:
            waiting = [pool.submit(_work, unit, config, block_sizes, from_records) for unit in units]
            for future in waiting:
                part = future.result()
                advance(part.counts.bytes)
                yield part
        except BrokenProcessPool as error:
            raise DsakvError(
                "a worker process was killed, most likely for lack of memory", "try again with fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker at once and without a traceback


def _work(unit: Unit, config: AnalyzeConfig, block_sizes: Sequence[int], from_records: bool) -> PartFigures:
    return analyze_part([unit], config, block_sizes, from_records, lambda done: None)


def _require_records(trace: TraceDir, counts: ReadCounts) -> None:
    if counts.accepted:
        return
    if counts.without_positions:
        raise InputError(
            f"none of the {counts.without_positions} records in {trace.path} has selected_token_pos",
            "trace again with the positions stored: DS_TRACE_STORE_TOKEN_POS=0 drops them",
        )
    if counts.rejected:
        reasons = ", ".join(f"{reason} ({rejected.count})" for reason, rejected in counts.rejected.items())
        raise InputError(
            f"every record in {trace.path} is bad: {reasons}", "run with --on-error strict for the first place"
        )
    raise InputError(f"{trace.path} holds no records", "the run was stopped, or no request generated a second token")


def _require_figures(trace: TraceDir, total: PartFigures) -> None:
    _require_records(trace, total.counts)
    if total.prefill_tail_records == total.counts.accepted:
        raise InputError(f"{trace.path} holds records of the prefill's tail alone", "include them with --prefill-tail")


def _result(trace: TraceDir, config: AnalyzeConfig, block_size: int, total: PartFigures) -> dict[str, Any]:
    figures = {name: metric.result() for name, metric in total.metrics[block_size].items()}
    counts = total.counts
    options = msgspec.json.decode(msgspec.json.encode(config))
    return {
        "trace_dir": str(trace.path),
        "block_size_tokens": block_size,
        "key_mode": config.key_mode,
        "lru_mode": config.lru_mode,
        "step_union": config.step_union,
        "complete": not counts.rejected,
        "warnings": _warnings(trace, counts),
        "run_meta": trace.run_meta,
        "input": {
            "files": counts.files,
            "bytes": counts.bytes,
            "records": counts.accepted - total.prefill_tail_records,
            "rejected": {
                reason: {"count": rejected.count, "places": rejected.places}
                for reason, rejected in counts.rejected.items()
            },
            "records_without_positions": counts.without_positions,
            "prefill_tail_records_left_out": total.prefill_tail_records,
            "unfinished_last_lines": counts.unfinished,
        },
        **figures,
        "recommendations": recommend(figures, block_size),
        "config": {name: value for name, value in options.items() if name not in _NOT_FIGURES},
        "dsakv_version": __version__,
    }


def _warnings(trace: TraceDir, counts: ReadCounts) -> list[str]:
    warnings = []
    if has_random_weights(trace.run_meta):
        warnings.append("the model's weights are random: locality numbers mean nothing")
    if counts.rejected:
        bad = sum(rejected.count for rejected in counts.rejected.values())
        warnings.append(f"the figures are incomplete: {bad} bad records were skipped")
    if counts.without_positions:
        warnings.append(f"{counts.without_positions} records without positions were skipped")
    warnings += [f"{place}: an unfinished last line was dropped" for place in counts.unfinished]
    return warnings
