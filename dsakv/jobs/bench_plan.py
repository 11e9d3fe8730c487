"""``dsakv bench plan``: where weights and KV will be, what moves in each step, and how long that takes at least."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from typing import Any, cast

from torch import nn

from dsakv.config import Config
from dsakv.console import Console
from dsakv.distributed import ALONE
from dsakv.engine.engine import Engine
from dsakv.jobs.bench import announce_prompts
from dsakv.jobs.bench_checks import Limits, physical_bound
from dsakv.jobs.bench_machine import device_speed
from dsakv.jobs.bench_prompts import BenchPrompts, bench_requests, read_bench_prompts
from dsakv.jobs.model import PreparedModel, prepared_model
from dsakv.jobs.run import announce, check_kv, make_engine
from dsakv.jobs.streaming import check_weights
from dsakv.kv.paged import kv_bytes
from dsakv.request import Request
from dsakv.weights.placement import WeightsPlan
from dsakv.weights.speed import disk_speed
from dsakv.weights.stream import Planned


def bench_plan(config: Config, console: Console) -> dict[str, Any]:
    """The plan for the benchmark that the configuration describes. The limits that bound it are measured now.

    Raises InputError for options, prompts, budgets or a checkpoint that do not work, DsakvError where a file fails.
    """
    check_kv(config)
    check_weights(config.weights)
    prompts = read_bench_prompts(config)
    with prepared_model(config.model, ALONE, console, config.weights) as prepared:
        if prepared.planned is None:
            return _document(prepared, config, console, bench_requests(prompts, config, prepared.loaded), None)
        with closing(prepared.planned.files):
            batch = bench_requests(prompts, config, prepared.loaded)
            return _document(prepared, config, console, batch, prepared.planned)


def _document(
    prepared: PreparedModel, config: Config, console: Console, batch: BenchPrompts, planned: Planned | None
) -> dict[str, Any]:
    announce(prepared.loaded, console)
    announce_prompts(batch, config, console)
    requests = batch.requests
    engine = make_engine(config, prepared.loaded, ALONE, record=False)
    engine.check(requests)
    return {
        "model": prepared.loaded.describe(),
        "weight_bytes": sum(p.numel() * p.element_size() for p in cast(nn.Module, engine.model).parameters()),
        "budgets": {"host": config.weights.host_budget, "device": config.weights.device_budget},
        "weights": None if planned is None else planned.plan.describe(),
        "kv": _kv(engine, requests),
        "bound": None if planned is None else _bound(planned, config.engine.batch_size, requests),
    }


def _kv(engine: Engine, requests: list[Request]) -> dict[str, Any]:
    """What the KV cache takes, and which part of it lives where."""
    blocks = engine.n_blocks(requests)
    rows, index_keys = kv_bytes(engine.model, blocks * engine.options.block_size)
    tiers = engine.tiers(requests)
    layers = len(engine.model.layers)
    return {
        "blocks": blocks,
        "row_bytes": rows,
        "index_key_bytes": index_keys,
        "hot_bytes": rows if tiers is None else tiers.hot_blocks * tiers.block_bytes * layers,
        "local_bytes": 0 if tiers is None else tiers.local_blocks * tiers.block_bytes * layers,
        "tiers": None if tiers is None else asdict(tiers),
    }


def _bound(planned: Planned, batch_size: int, requests: list[Request]) -> dict[str, Any]:
    """The least that a pass takes, with all of its experts in place and with none of them."""
    plan = planned.plan
    limits = Limits(
        disk_bytes_per_s=disk_speed(planned.files) if plan.reads else None,
        device_bytes_per_s=device_speed(planned.device),
    )
    longest = max(len(request.prompt_token_ids) for request in requests) * min(batch_size, len(requests))
    return {
        "disk_bytes_per_s": limits.disk_bytes_per_s,
        "device_bytes_per_s": limits.device_bytes_per_s,
        "direct": planned.files.direct,
        "decode_step": _pass(plan, min(batch_size, len(requests)), limits),
        "prefill_pass": _pass(plan, longest, limits),
    }


def _pass(plan: WeightsPlan, tokens: int, limits: Limits) -> dict[str, Any]:
    """What a pass of so many tokens moves, and milliseconds that it takes at least."""
    # A token needs so many different experts; what is not kept is read, unless all are, once they have been.
    fewest = max(0, plan.experts_per_token - plan.expert_slots)
    most = 0 if plan.expert_slots == plan.n_experts else min(plan.n_experts, tokens * plan.experts_per_token)
    disk = [plan.pass_disk_bytes + n * plan.expert_disk_bytes for n in (fewest, most)]
    device = [plan.pass_device_bytes + n * plan.expert_device_bytes for n in (fewest, most)]
    us = [physical_bound(*pair, limits) for pair in zip(disk, device, strict=True)]
    return {
        "tokens": tokens,
        "disk_bytes": disk,
        "device_bytes": device,
        "at_least_ms": [None if one is None else one / 1e3 for one in us],
    }
