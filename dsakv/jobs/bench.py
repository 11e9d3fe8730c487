"""`dsakv bench`: run the same prompts round after round, and say how fast it went, what moved, and what bounds it.

Times are those of the engine's own clock, which stands still while this loop looks at a step. An end of sequence does
not end a request: every one generates all its new tokens, so that rounds and configurations do the same work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import orjson
import torch

from dsakv import __version__
from dsakv.config import Config
from dsakv.console import Console
from dsakv.distributed import ALONE, World
from dsakv.engine.clock import VirtualClock
from dsakv.engine.engine import Engine
from dsakv.errors import DsakvError
from dsakv.jobs.bench_checks import Limits, bounds, rejections
from dsakv.jobs.bench_log import RoundLog
from dsakv.jobs.bench_machine import device_speed, machine, memory
from dsakv.jobs.bench_metrics import FORMULAS, round_metrics
from dsakv.jobs.bench_prompts import BenchPrompts, bench_requests, read_bench_prompts
from dsakv.jobs.bench_summary import drift, medians, summarize
from dsakv.jobs.loaded import LoadedModel
from dsakv.jobs.ranks import load_together
from dsakv.jobs.run import announce, check_kv, make_engine
from dsakv.jobs.streaming import check_weights
from dsakv.report.bench_report import render_bench, round_line, span
from dsakv.request import Request
from dsakv.settings import resolved_json
from dsakv.trace.files import check_target, default_path, write_result

SCHEMA_VERSION = 1
ELSEWHERE = "name a file in a directory that can be written to with --out-json"


def bench(config: Config, console: Console, world: World = ALONE) -> dict[str, Any]:
    """Benchmark what the configuration describes; print the results, write them, and return them.

    Raises:
        InputError: options, prompts or a checkpoint that do not work.
        DsakvError: the results cannot be written, or are rejected: then they are written and printed nevertheless.
    """
    check_kv(config)
    check_weights(config.weights)
    prompts = read_bench_prompts(config)
    out = Path(config.bench.out_json) if config.bench.out_json is not None else None
    check_target(out or default_path("bench") / "bench_results.json", ELSEWHERE, new=True)
    with closing(load_together(config, world, console)) as loaded:
        results = _measure(config, loaded, bench_requests(prompts, config, loaded), console, world)
    if out is None:
        folder = default_path("bench")
        write_result(folder / "config.json", resolved_json(config), ELSEWHERE)
        out = folder / "bench_results.json"
    data = orjson.dumps(results, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    write_result(out, data, ELSEWHERE)
    _show(results, out, config, console)
    if faults := results["rejected"]:
        raise DsakvError(
            f"the results are rejected, {len(faults)} of them cannot be right: {faults[0]}",
            f"do not use these figures; {out} lists what is wrong with them under rejected",
        )
    return results


def _measure(
    config: Config, loaded: LoadedModel, batch: BenchPrompts, console: Console, world: World
) -> dict[str, Any]:
    """The results as they are written."""
    announce(loaded, console)
    engine = make_engine(config, loaded, world, record=False, ignore_eos=True)
    engine.check(batch.requests)
    announce_prompts(batch, config, console)
    streamer = loaded.streamer
    placement = None if streamer is None else streamer.plan.describe() | {"direct": streamer.direct}
    before = 0.0 if streamer is None else streamer.disk_speed()
    logs = _run_rounds(engine, batch.requests, config, console)
    disk = [] if streamer is None or not before else [before, streamer.disk_speed()]
    device = None if streamer is None else device_speed(loaded.model.device)
    # What is impossible is impossible at the best speed that was seen.
    limits = Limits.of(max(disk, default=None), device, placement)
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dsakv_version": __version__,
        "torch_version": str(torch.__version__),
        "machine": machine(loaded.model.device) | {"ranks": world.size},
        "model": loaded.describe(),
        "prompts": batch.describe() | {"new_tokens": config.engine.max_new_tokens, "ignore_eos": True},
        "placement": placement,
        "kv_tiers": None if (tiers := engine.tiers(batch.requests)) is None else asdict(tiers),
        "formulas": FORMULAS,
        **_put_together(logs, disk, limits, config),
        "memory": memory(loaded.model.device),
        "config": orjson.loads(resolved_json(config)),
    }


def _run_rounds(engine: Engine, requests: list[Request], config: Config, console: Console) -> list[RoundLog]:
    """Rounds to warm up, then those that count, which are returned."""
    bench, new_tokens = config.bench, config.engine.max_new_tokens
    work = sum(len(request.prompt_token_ids) + new_tokens for request in requests)
    logs = []
    with console.progress(work * (bench.warmup_rounds + bench.rounds), "benchmark", "tokens") as advance:
        for number in range(-bench.warmup_rounds, bench.rounds):
            log = run_round(engine, requests, advance)
            if bench.verbose:
                name = f"round {number}" if number >= 0 else "warm-up round"
                console.info(f"{name}: {round_line(round_metrics(log))}")
            if number >= 0:
                logs.append(log)
    return logs


def run_round(engine: Engine, requests: list[Request], advance: Callable[[int], None]) -> RoundLog:
    """Run all requests once. ``advance`` is told of tokens as they are done, cached ones of a prompt aside."""
    clock = VirtualClock()
    steps = engine.run(requests, clock)
    log = RoundLog.begin(requests, clock.now())  # the KV cache has its room by now
    for step in steps:
        log.add(step, clock.now())
        advance(step.prompt_tokens + len(step.new_tokens))
    log.flush()
    return log


def _put_together(logs: Sequence[RoundLog], disk: Sequence[float], limits: Limits, config: Config) -> dict[str, Any]:
    """What is known of all rounds together."""
    rounds = [round_metrics(log) for log in logs]
    summary = summarize(rounds)
    middle = medians(summary)
    bound = {kind: bounds([log.of(kind) for log in logs], limits) for kind in ("prefill", "decode")}
    new_tokens, cold = config.engine.max_new_tokens, not config.bench.warmup_rounds
    faults = [
        fault
        for number, log in enumerate(logs)
        for fault in rejections(log, f"round {number}", new_tokens, limits, first=cold and number == 0)
    ]
    return {
        "rounds": rounds,
        "summary": summary,
        "links": middle["links"],
        "cache": {"experts": middle["experts"], "kv": middle["kv"]},
        "bound": asdict(limits) | bound,
        "drift": drift(rounds, disk) | {"disk_bytes_per_s": list(disk)},
        "rejected": faults,
    }


def announce_prompts(batch: BenchPrompts, config: Config, console: Console) -> None:
    facts = batch.describe()
    console.info(
        f"{span(facts)}, {config.engine.max_new_tokens:,} new tokens each whatever they are; "
        f"batches of {config.engine.batch_size}"
    )
    if batch.cut:
        console.warn(f"prompts cut to fit: {batch.cut} ({facts['cut_tokens']:,} tokens went, from the beginning)")


def _show(results: dict[str, Any], out: Path, config: Config, console: Console) -> None:
    if config.bench.json:
        console.print_data(orjson.dumps(results, option=orjson.OPT_INDENT_2).decode())
    else:
        console.print_table(render_bench(results))
    if results["drift"]["flag"]:
        drifted = results["drift"]
        changes = [
            f"{name} {change:+.0%}"
            for name, change in drifted["change"].items()
            if change is not None and abs(change) > drifted["threshold"]
        ]
        console.warn(f"the machine changed its pace during the run: {', '.join(changes)}")
    console.info(f"results: {out}")
