"""A plan for tiers, from a trace and a profile of links: what each size of blocks and hot tier would fetch in decode,
how long it would take, and what follows from that.

What is assumed, and stands in the results: decode starts cold, each layer has its hot blocks to itself, a miss waits
for its pool and nothing is computed meanwhile, and what is not read from a pool takes as long as it took without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from dsakv.analysis.kv_facts import read_kv_facts
from dsakv.analysis.kv_steps import kv_steps
from dsakv.analysis.links import TIERS, Link, LinkProfile, Pool, load_links
from dsakv.analysis.plan_answers import answers
from dsakv.analysis.plan_as_run import as_run
from dsakv.analysis.plan_facts import RunFacts, read_run_facts, step_time, tiers_took
from dsakv.analysis.plan_rows import SizePlan, hot_sizes, plan_size
from dsakv.config import AnalyzeConfig
from dsakv.errors import InputError
from dsakv.policies import POLICIES
from dsakv.trace.intake import Intake
from dsakv.trace.open import TraceDir
from dsakv.trace.units import to_units

SIZES = (1, 16, 64, 256)
"""Block sizes to plan with, where none are asked for, beside the trace's own."""
_BLOCKS = 4
"""A block is not so large that requests have fewer of them than this, unless it is asked for."""
ASSUMED = (
    "decode starts with nothing hot (first reads count, and weigh the more the fewer steps requests have), each layer "
    "has its hot blocks to itself, the layers of a step follow each other, and a miss waits for its pool while nothing "
    "is computed; what a cache takes to look blocks up and to choose which leave comes on top"
)


def check_plan(config: AnalyzeConfig) -> LinkProfile:
    """What can be said before a trace is read; the links to plan with.

    Raises:
        InputError: links, policies or numbers that mean nothing.
    """
    for name in config.plan_policies:
        if name not in POLICIES:
            raise InputError(f"--plan-policies: there is no policy {name}", f"choose from {', '.join(POLICIES)}")
    if not config.plan_policies or not config.plan_hot:
        raise InputError("--plan-policies and --plan-hot need at least one entry", "leave them out for the defaults")
    return load_links(config.links)


def plan_passes(config: AnalyzeConfig) -> int:
    """How often :func:`plan_trace` reads a trace."""
    return 1 + len(set(config.block_sizes) or {0, *SIZES})


def plan_trace(
    trace: TraceDir,
    config: AnalyzeConfig,
    links: LinkProfile,
    advance: Callable[[int], None],
    kv_tiers: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The plan for one trace; ``advance`` is called with the bytes just read. ``kv_tiers`` is what the analysis found
    of the run's own tiers.

    Raises:
        InputError: a bad record in strict mode, a trace that does not hold every decode step or says too little.
        DsakvError: a file that cannot be read.
    """
    kv_facts = read_kv_facts(trace)
    run = read_run_facts(trace, advance)
    took_us = tiers_took(trace, len(run.engine_step))
    base = step_time(run, config.base_tpot_ms, took_us, kv_facts.forced)
    own = kv_facts.block_size or SIZES[2]
    sizes = []
    for size in _block_sizes(config, run, own):
        plan = SizePlan(size, hot_sizes(config.plan_hot, run, size, own), config.plan_policies, run)
        intake = Intake(config.on_error, engine_steps=True)
        batches = kv_steps(to_units(trace.shards), kv_facts, size, intake, advance=advance)
        sizes.append(plan_size(plan, batches, links, base))
    made = {
        "links": {
            "name": links.name,
            "measured": links.measured,
            **{tier: _plain(links.pool(tier)) for tier in TIERS},
            "hbm": _plain(links.hbm),
        },
        "assumed": ASSUMED,
        "base": {
            "tpot_ms": base.mean_ms,
            "requests": base.mean_batch,
            "per_request_ms": base.per_request_ms,
            "source": base.source,
            "other_machine": _other_machine(trace.run_meta or {}, links, config),
        },
        "run": _run(run, config),
        "budget_percent": config.plan_budget,
        "block_tables": kv_facts.has_tables,
        "sizes": sizes,
        "as_run": as_run(trace.run_meta or {}, kv_tiers, links, len(run.engine_step)),
    }
    return made | {"answers": answers(made, run, base, config.plan_hbm)}


def _other_machine(run_meta: Mapping[str, Any], links: LinkProfile, config: AnalyzeConfig) -> bool:
    """Whether steps of a CPU would be compared with links that no CPU has."""
    model = run_meta.get("model")
    on_cpu = isinstance(model, dict) and str(model.get("device", "")).startswith("cpu")
    return on_cpu and not links.measured and not config.base_tpot_ms


def _plain(links: Pool | Link | None) -> Any:
    """As it will come back from the results' file."""
    return msgspec.json.decode(msgspec.json.encode(links))


def _run(run: RunFacts, config: AnalyzeConfig) -> dict[str, Any]:
    return {
        "decode_steps": len(run.engine_step),
        "requests": len(run.tokens),
        "tokens_per_request": float(run.tokens.mean()),
        "layers": run.layers,
        "row_bytes": run.row_bytes,
        "index_key_bytes": run.key_bytes,
        "kv_bytes_at_once": run.kv_bytes_at_once,
        "hbm_bytes": config.plan_hbm or run.kv_bytes_at_once,
    }


def _block_sizes(config: AnalyzeConfig, run: RunFacts, own: int) -> list[int]:
    """Those asked for, else the trace's own, or the one it is analyzed at, and the usual ones of which requests have
    several.
    """
    if config.block_sizes:
        return sorted(set(config.block_sizes))
    most = float(run.tokens.mean()) / _BLOCKS
    own = config.block_size or own
    return sorted({own, *(size for size in SIZES if size <= most)})
