"""A trace into results, in as few passes over it as the configuration allows.

1. Everything but what follows: each part on its own, added up. Parts are cut at requests, so that what a stream did
   before lies in its own part; where a request turns out to be in two, the trace is read again as one part.
2. Caches that requests share (``--cache-scope layer`` or ``run``), in the order of the engine's steps.
3. Policies at capacities that are fractions: of what, the first passes have found.
4. The tiers of a run that kept its KV in some, replayed in the order of the engine's steps.

Where the trace does not tell its block size, the first records are looked at before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from dsakv.analysis.decide import decide
from dsakv.analysis.kv_check import check_tiers, has_tiers
from dsakv.analysis.part import PartFigures, Task, analyze_part, run_wide_caches
from dsakv.analysis.results import resolved, to_result
from dsakv.analysis.side_facts import read_side_facts
from dsakv.analysis.simulation import chosen
from dsakv.analysis.work import count_parts
from dsakv.config import AnalyzeConfig
from dsakv.errors import InputError
from dsakv.trace.intake import Intake, ReadCounts
from dsakv.trace.open import TraceDir
from dsakv.trace.units import Unit, read_unit, to_units

LARGEST_BLOCK = (1 << 31) - 1
"""Positions are 32-bit integers."""


def passes(trace: TraceDir, config: AnalyzeConfig) -> int:
    """How often :func:`analyze_trace` reads ``trace``."""
    wide = config.cache_scope in ("layer", "run")
    again = any(given < 1 for given in config.lru_caps) and bool(chosen(config.policies, config.cache_scope))
    return 1 + wide + again + has_tiers(trace, config)


def analyze_trace(trace: TraceDir, config: AnalyzeConfig, advance: Callable[[int], None]) -> list[dict[str, Any]]:
    """The results of one trace, one for each block size.

    ``advance`` is called with the number of bytes just read; one that has to be read again counts negative first.

    Raises:
        InputError: a bad record in strict mode, no record with positions, no way to tell the block size, options at
            odds.
        DsakvError: a file that cannot be read, or workers that die.
    """
    if config.cache_scope != "stream" and config.step_union:
        raise InputError(
            f"--cache-scope {config.cache_scope} tells layers apart, --step-union merges them", "give one of them"
        )
    if config.cache_scope in ("layer", "run") and config.key_mode == "request":
        raise InputError(
            f"--cache-scope {config.cache_scope} and --key-mode request do not go together",
            "leave --key-mode out: the cache brings the layers together",
        )
    config = msgspec.structs.replace(config, lru_caps=tuple(dict.fromkeys(config.lru_caps)))
    for given in config.lru_caps:
        if given >= 1 and given != int(given):
            raise InputError(
                f"--lru-caps: {given:g} is neither a number of blocks nor a fraction", "such as 128 or 0.25"
            )
    block_sizes, from_records = _block_sizes(trace, config)
    facts = read_side_facts(trace)
    whole = tuple(int(given) for given in config.lru_caps if given >= 1)
    fractions = len(whole) < len(config.lru_caps)
    policies = chosen(config.policies, config.cache_scope)
    task = Task(
        config,
        tuple(sorted(block_sizes)),
        from_records,
        facts.needles,
        facts.owners,
        () if fractions else policies,
        dict.fromkeys(block_sizes, () if fractions else whole),
    )
    units = to_units(trace.shards)
    total = _count(units, task, advance)
    if len(total.counts.block_sizes) > 1:
        sizes = ", ".join(map(str, sorted(total.counts.block_sizes)))
        raise InputError(f"the records in {trace.path} have several block sizes: {sizes}", "choose with --block-size")
    _require_figures(trace, config, total)
    if task.run_wide:
        total.caches = run_wide_caches(units, task, total.counts.accepted, advance)
    capacities = {size: resolved(config.lru_caps, total.caches[size].lru) for size in block_sizes}
    if fractions and policies:
        again = replace(task, policies=policies, capacities=capacities, policies_only=True)
        if task.run_wide:
            simulated = run_wide_caches(units, again, total.counts.accepted, advance)
        else:
            simulated = _count(units, again, advance).caches
        for size in block_sizes:
            total.caches[size].policies = simulated[size].policies
    checked = check_tiers(trace, units, config, advance) if has_tiers(trace, config) else None
    own = (trace.run_meta or {}).get("block_size_tokens")
    results = [
        to_result(trace, config, size, total, capacities[size], policies, checked if size == own else None)
        for size in block_sizes
    ]
    curves = [total.caches[size].lru for size in block_sizes]
    for result, answers in zip(results, decide(results, curves), strict=True):
        result["decision"] = answers
    return results


def _count(units: Sequence[Unit], task: Task, advance: Callable[[int], None]) -> PartFigures:
    """The figures of all parts added up."""
    total = PartFigures.none(task)
    for part in count_parts(units, task, task.config.workers, task.config.scheduler, advance):
        if total.requests & part.requests:
            advance(-total.counts.bytes - part.counts.bytes)
            return analyze_part(units, task, advance)
        total.merge(part)
    if len({type(request) for request in total.requests}) > 1:
        raise InputError(
            "some shards number their requests, others name them",
            "analyze each kind on its own: they are not of one run",
        )
    return total


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


def _require_figures(trace: TraceDir, config: AnalyzeConfig, total: PartFigures) -> None:
    _require_records(trace, total.counts)
    if total.left_out.prefill_tail == total.counts.accepted:
        raise InputError(f"{trace.path} holds records of the prefill's tail alone", "include them with --prefill-tail")
    if config.skip_dense and total.left_out.prefill_tail + total.left_out.dense == total.counts.accepted:
        raise InputError(
            f"every record in {trace.path} selects all tokens of its sequence: there is nothing sparse to analyze",
            "trace longer contexts, or leave --skip-dense out",
        )
