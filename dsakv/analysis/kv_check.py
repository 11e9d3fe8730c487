"""The tiers of a run, measured and replayed: whether its trace gives the counts that the running cache had."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import orjson

from dsakv.analysis.kv_facts import KvFacts, read_kv_facts
from dsakv.analysis.kv_steps import KvStepper
from dsakv.analysis.replay import Replay, ReplayOptions
from dsakv.config import AnalyzeConfig
from dsakv.errors import DsakvError, InputError
from dsakv.policies.placement import Tiers
from dsakv.request import TIERS
from dsakv.trace.intake import Intake
from dsakv.trace.open import TraceDir
from dsakv.trace.ordered import in_engine_order
from dsakv.trace.units import Unit

_SHOWN = 3
Transfers = dict[str, dict[str, int | float | None]]
"""By tier; figures as in ``summary.json``."""


def has_tiers(trace: TraceDir, config: AnalyzeConfig) -> bool:
    """Whether the run kept KV in tiers and is analyzed at its own block size: then :func:`check_tiers` reads it."""
    meta = trace.run_meta or {}
    if "kv_tiers" not in meta:
        return False
    asked = config.block_sizes or ((config.block_size,) if config.block_size else ())
    return not asked or meta.get("block_size_tokens") in asked


def check_tiers(
    trace: TraceDir, units: Sequence[Unit], config: AnalyzeConfig, advance: Callable[[int], None]
) -> dict[str, Any]:
    """``measured`` and ``replayed`` transfers of decode by tier, either None where it cannot be had; whether they
    ``agree``, None where they need not; the ``reason`` of anything but True; and whether files are ``damaged``.

    ``advance`` is called with the bytes just read.

    Raises:
        DsakvError: a file cannot be read.
    """
    measured: Transfers | None = None
    replayed: Transfers | None = None
    inexact: list[str] = []
    facts: KvFacts | None = None
    damaged = False
    intake = Intake(config.on_error, engine_steps=True)
    try:
        measured, resumed = _measured(trace)
        facts = read_kv_facts(trace)
        options, block_bytes = _options(trace, facts)
        stepper = KvStepper(facts, facts.block_size or 1, intake.id_of, forced=False)
        cache, told = Replay(options), 0
        for batch in in_engine_order(units, intake):
            cache.add(stepper.steps(batch))
            advance(intake.counts.bytes - told)
            told = intake.counts.bytes
        replayed = {**cache.transfers(block_bytes, block_bytes // stepper.block_size)}
        inexact = _inexact(trace, facts, stepper, intake)
        if resumed:
            inexact.append("the run was resumed: it measured what came after, and what ran beside it before is lost")
    except InputError as error:
        inexact.append(error.message)
        damaged = facts is None or facts.sample_rate == 1  # else steps are lacking because that was asked for
    except MemoryError:
        inexact.append("there is not enough memory for as many blocks as the trace names")
        damaged = True
    advance(sum(unit.bytes for unit in units) - intake.counts.bytes)
    if measured is None and not inexact:
        inexact.append("summary.json holds no transfers of decode: the run did not come to its end")
    differing = [] if inexact or measured is None or replayed is None else _differing(measured, replayed)
    return {
        "measured": measured,
        "replayed": replayed,
        "agree": None if inexact else not differing,
        "reason": "; ".join(inexact or differing[:_SHOWN]) or None,
        "damaged": damaged,
    }


def _measured(trace: TraceDir) -> tuple[Transfers | None, bool]:
    """Transfers of decode, and whether they are only those since the run was resumed."""
    transfers = _section(_section(_json(trace.path / "summary.json"), "kv_tiers"), "transfers")
    if not transfers:
        return None, False
    try:
        return msgspec.convert(transfers.get("decode", {}), Transfers), "since_resume" in transfers
    except msgspec.ValidationError:
        return None, False


def _options(trace: TraceDir, facts: KvFacts) -> tuple[ReplayOptions, int]:
    """The tiers that the run had, and the bytes of a block. Raises InputError where they are not known."""
    path = trace.path / "run_meta.json"
    try:
        tiers = msgspec.convert((trace.run_meta or {})["kv_tiers"], Tiers)
        placement = tiers.placement(facts.layers or 1)
    except (msgspec.ValidationError, KeyError) as error:
        raise InputError(f'{path}: "kv_tiers" are not known tiers: {error}', "repair the file") from None
    if facts.layers is None or facts.block_size is None:
        raise InputError(f"{path} does not say how many layers there are, or how large a block is", "repair the file")
    if not facts.has_tables:
        raise InputError("requests.jsonl has no block tables", "trace again")
    prefix_cache = _section(_config(trace), "serving").get("prefix_cache") is not False
    return ReplayOptions(placement, tiers.write, tiers.start == "warm", prefix_cache), tiers.block_bytes


def _inexact(trace: TraceDir, facts: KvFacts, stepper: KvStepper, intake: Intake) -> list[str]:
    """Why the replay need not be what the run did."""
    skipped = sum(rejected.count for rejected in intake.counts.rejected.values()) + intake.counts.without_positions
    wanted = _section(trace.run_meta or {}, "inputs").get("kept")
    lacking = wanted - len(facts.requests) if type(wanted) is int else 0
    reasons = []
    for count, one, many in (
        (max(lacking, stepper.unfinished), "request did not finish", "requests did not finish"),
        (skipped, "record was skipped", "records were skipped"),
        (stepper.gaps, "decode step lacks records", "decode steps lack records"),
    ):
        if count:
            reasons.append(f"incomplete: {count:,} {one if count == 1 else many}")
    return reasons


def _config(trace: TraceDir) -> dict[str, Any]:
    folder = trace.path.parent if trace.path.name.startswith("block") else trace.path
    return _json(folder / "config.json")


def _json(path: Path) -> dict[str, Any]:
    """The object in a file of the run; nothing where there is none."""
    try:
        found = orjson.loads(path.read_bytes()) if path.is_file() else None
    except orjson.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}", "repair it, or move it away") from None
    except OSError as error:
        raise DsakvError(f"cannot read {path}: {error.strerror}", "check its permissions") from error
    return found if isinstance(found, dict) else {}


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def _differing(measured: Transfers, replayed: Transfers) -> list[str]:
    """Figures that are not the same, in words; what the replay does not know is no difference."""
    found = []
    for tier in TIERS:
        mine, other = measured.get(tier, {}), replayed.get(tier, {})
        for name in ("hits", "cold", "reads", "read_ops", "bytes_read", "writes", "write_ops", "bytes_written"):
            expected = other.get(name, 0)
            if expected is not None and mine.get(name, 0) != expected:
                found.append(f"{tier} {name}: measured {mine.get(name, 0)}, replayed {expected}")
    return found
