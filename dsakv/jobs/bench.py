"""`dsakv bench`: run the same prompts round after round, and say how fast it went, what moved, and what bounds it.

Times are those of the engine's own clock, which stands still while this loop looks at a step. An end of sequence does
not end a request: every one generates all its new tokens, so that rounds and configurations do the same work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
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
from dsakv.jobs.bench_checks import Speeds, ahead_bytes, bounds, rejections
from dsakv.jobs.bench_log import Pass, RoundLog
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
from dsakv.trace.files import check_target, write_result
from dsakv.trace.run_dir import default_path

SCHEMA_VERSION = 1
ELSEWHERE = "name a file in a directory that can be written to with --out-json"


@dataclass(slots=True)
class Measured:
    """The rounds that count, and what is wrong with any of them."""

    rounds: list[dict[str, Any]]
    passes: list[Pass]
    faults: list[str]


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
    check_target(out or default_path("bench") / "bench_results.json", ELSEWHERE)
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
    _announce_prompts(batch, config, console)
    disk: list[float] = []

    def measure() -> None:
        if loaded.streamer is not None and (speed := loaded.streamer.disk_speed()):
            disk.append(speed)

    measure()
    placement = None if loaded.streamer is None else loaded.streamer.plan.describe()
    measured, speeds = _run_rounds(engine, batch.requests, config, console, placement, disk, measure)
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
        **_put_together(measured, disk, speeds),
        "memory": memory(loaded.model.device),
        "config": orjson.loads(resolved_json(config)),
    }


def _run_rounds(
    engine: Engine,
    requests: list[Request],
    config: Config,
    console: Console,
    placement: dict[str, Any] | None,
    disk: list[float],
    measure: Callable[[], None],
) -> tuple[Measured, Speeds]:
    """Rounds to warm up, then those that count, and the disk measured once more behind them."""
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
    measure()
    # What is impossible is impossible at the best speed that was seen.
    speeds = Speeds(
        disk_bytes_per_s=max(disk, default=None),
        device_bytes_per_s=device_speed(engine.model.device) if placement is not None else None,
        ahead_bytes=ahead_bytes(placement),
    )
    measured = Measured([], [], [])
    for number, log in enumerate(logs):
        measured.rounds.append(round_metrics(log))
        measured.passes += log.passes
        measured.faults += rejections(log, f"round {number}", new_tokens, speeds)
    return measured, speeds


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


def _put_together(measured: Measured, disk: Sequence[float], speeds: Speeds) -> dict[str, Any]:
    """What is known of all rounds together."""
    summary = summarize(measured.rounds)
    middle = medians(summary)
    bound = {
        kind: bounds([one for one in measured.passes if one.kind == kind], speeds) for kind in ("prefill", "decode")
    }
    return {
        "rounds": measured.rounds,
        "summary": summary,
        "links": middle["links"],
        "cache": {"experts": middle["experts"], "kv": middle["kv"]},
        "bound": {
            "disk_bytes_per_s": speeds.disk_bytes_per_s,
            "device_bytes_per_s": speeds.device_bytes_per_s,
            "ahead_bytes": speeds.ahead_bytes,
            **bound,
        },
        "drift": drift(measured.rounds, disk) | {"disk_bytes_per_s": list(disk)},
        "rejected": measured.faults,
    }


def _announce_prompts(batch: BenchPrompts, config: Config, console: Console) -> None:
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
        console.warn("the machine changed its pace during the run; drift in the results says by how much")
    console.info(f"results: {out}")
