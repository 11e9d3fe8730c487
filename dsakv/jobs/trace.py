"""`dsakv trace`: run a workload and record what every layer selected in every decode step."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import orjson
from rich import filesize

from dsakv.config import Config
from dsakv.console import Console
from dsakv.distributed import ALONE, World
from dsakv.engine.clock import VirtualClock, WallClock
from dsakv.errors import InputError
from dsakv.jobs.loaded import LoadedModel
from dsakv.jobs.ranks import load_together
from dsakv.jobs.run import announce, check_kv, how_to_analyze, inputs, make_engine, prefix_facts
from dsakv.jobs.streaming import check_weights
from dsakv.report.run_summary import Speed, render_run
from dsakv.request import Completion, Request, Step
from dsakv.settings import resolved_json
from dsakv.tokenizer import Tokenizer
from dsakv.trace.files import read_lines
from dsakv.trace.run_dir import RunDir
from dsakv.trace.serving import last_token_s
from dsakv.trace.size import expected_bytes
from dsakv.trace.writer import TraceWriter
from dsakv.workloads import Workload, build
from dsakv.workloads.arrival import arrange, check_arrival

LARGE = 5e9
"""Bytes from which on a trace is worth a word on how to make it smaller."""


def trace(name: str, config: Config, console: Console, world: World = ALONE) -> RunDir:
    """Run workload ``name`` and write its trace; print a summary and how to analyze it.

    Raises InputError for bad options, inputs and checkpoints, DsakvError for output that exists or cannot be written.
    """
    if not config.trace.enable:
        raise InputError("tracing is switched off (DS_TRACE_ENABLE or trace.enable)", "dsakv generate runs without it")
    check_arrival(config.serving)
    check_kv(config)
    check_weights(config.weights)
    stored = resolved_json(config)
    # What can fail for the output folder's sake does so before minutes are spent on loading a model.
    if config.trace.resume:
        RunDir.check_resumable(config.trace.out, stored, dataset=name)
    else:
        RunDir.check_free(config.trace.out)
    workload = build(name, config)
    with closing(load_together(config, world, console)) as loaded:
        return _run(workload, config, loaded, console, world)


def _run(workload: Workload, config: Config, loaded: LoadedModel, console: Console, world: World) -> RunDir:
    """As :func:`trace`, on a loaded model."""
    name, block_size, stored = workload.name, config.engine.kv_block_size, resolved_json(config)
    announce(loaded, console)
    engine = make_engine(config, loaded, world, record=True)
    if name == "ruler" and config.ruler.data is None and config.ruler.context_length > loaded.max_seq_len:
        console.warn(
            f"--context-length {config.ruler.context_length} is more than the model's {loaded.max_seq_len}: prompts "
            "are cut, and perhaps their needles with them"
        )
    requests, counts = _draw(workload, config, loaded, console)
    engine.check(requests)
    _say_size(requests, config, loaded, console)
    model = loaded.describe()
    facts: dict[str, Any] = {
        "dataset": name,
        "model": model,
        "inputs": counts,
        "requests_digest": _digest(requests),
    }
    resumed = RunDir.resume(config.trace.out, block_size, stored, **facts) if config.trace.resume else None
    waiting = requests if resumed is None else [r for r in requests if r.request_id not in resumed.finished]
    start = 0.0 if resumed is None else last_token_s(resumed.requests_path)
    clock = (WallClock if config.serving.clock == "wall" else VirtualClock)(start)
    steps = engine.run(waiting, clock)  # the KV cache finds its room before there is a folder
    run = resumed or RunDir.create(config.trace.out, name, block_size, stored)
    tiers = engine.tiers(waiting)
    kv_tiers = None if tiers is None else asdict(tiers)
    run.write_meta(**facts, kv_tiers=kv_tiers, seed=config.engine.seed, options=config.trace, world_size=world.size)
    console.info(f"tracing into {run.path}: {len(waiting)} of {len(requests)} requests to run")
    summary, speed = _record(steps, run, workload, requests, waiting, counts, config, loaded, console)
    scores = _scores(run, workload.score_groups)
    if moved := speed.moved():
        console.info(moved)
    console.print_table(render_run(run.trace_dir, summary, scores, speed, model, config.serving.clock))
    if not summary["unique_blocks"]["count"]:
        console.warn("nothing was recorded: a request of one new token has no decode step")
    elif config.trace.store_token_pos:
        console.info(how_to_analyze(run))
    return run


def _draw(
    workload: Workload, config: Config, loaded: LoadedModel, console: Console
) -> tuple[list[Request], dict[str, Any]]:
    """The workload's requests, and what became of its inputs."""
    requests: list[Request] = []
    drawn = workload.requests(loaded.tokenizer, loaded.max_seq_len)
    with console.progress(None, "preparing prompts", "prompts") as advance:
        for request in drawn:
            requests.append(request)
            advance(1)
    dropped = workload.dropped
    if config.workload.forced:
        requests = _with_known_answers(requests, loaded.tokenizer, dropped)
    requests = arrange(requests, config.serving, config.engine.seed)
    truncated = sum(request.truncated_tokens > 0 for request in requests)
    counts = inputs(len(requests), truncated, dict(dropped))
    if not requests:
        reasons = "; ".join(f"{number} dropped: {reason}" for reason, number in counts["dropped"].items())
        hint = "leave out --forced, or " if config.workload.forced else ""
        raise InputError(
            f"no prompt is left to run ({reasons or 'the workload has none'})",
            f"{hint}lower --max-new-tokens, raise --max-seq-len, or give other inputs",
        )
    if counts["truncated"]:
        gone = sum(request.truncated_tokens for request in requests)
        whole = gone + sum(len(request.prompt_token_ids) for request in requests)
        console.info(f"prompts cut to fit: {counts['truncated']} ({gone:,} of all {whole:,} prompt tokens went)")
    for reason, number in counts["dropped"].items():
        console.warn(f"inputs dropped: {number} ({reason})")
    return requests, counts


def _with_known_answers(requests: list[Request], tokenizer: Tokenizer, dropped: Counter[str]) -> list[Request]:
    """The requests with their answers as forced tokens, cut to their new tokens; others are counted and left out."""
    forced = []
    for request in requests:
        if request.completion is None:
            dropped["--forced, and no answer is known"] += 1
            continue
        answer = tokenizer.encode(request.completion)[: request.max_new_tokens]
        if answer:
            forced.append(replace(request, forced_token_ids=answer, max_new_tokens=len(answer)))
        else:
            dropped["--forced, and the known answer is empty"] += 1
    return forced


def _say_size(requests: list[Request], config: Config, loaded: LoadedModel, console: Console) -> None:
    size = expected_bytes(
        requests, len(loaded.model.layers), loaded.model.top_k, config.engine.kv_block_size, config.trace
    )
    console.info(f"expecting about {filesize.decimal(size)} of trace")
    if size > LARGE:
        other = "" if config.trace.format == "parquet" else "--trace-format parquet, "
        console.info(f"to make it smaller: {other}fewer --limit or --max-new-tokens, or --trace-sample-rate 0.1")


def _record(
    steps: Iterator[Step],
    run: RunDir,
    workload: Workload,
    requests: list[Request],
    waiting: list[Request],
    counts: dict[str, Any],
    config: Config,
    loaded: LoadedModel,
    console: Console,
) -> tuple[dict[str, Any], Speed]:
    """Write the trace of ``waiting``, those of the requests that are not finished yet; returns summary and speed."""
    by_id = {request.request_id: request for request in waiting}

    def text(completion: Completion) -> str:
        return loaded.tokenizer.decode(completion.token_ids)

    def score(completion: Completion) -> float | None:
        request = by_id[completion.request_id]
        return None if request.forced_token_ids else workload.score(request, text(completion))

    def work(request: Request) -> int:
        return len(request.prompt_token_ids) + request.max_new_tokens - (request.forced_token_ids is not None)

    speed = Speed()
    with (
        TraceWriter(
            run,
            config.trace,
            seed=config.engine.seed,
            requests=waiting,
            prefix=prefix_facts(requests, config),
            inputs=counts,
            text=text,
            score=score,
        ) as writer,
        console.progress(sum(map(work, waiting)), "tracing", "tokens") as advance,
    ):
        for step in steps:
            writer.write(step)
            speed.add(step)
            # What no step has to compute: tokens found in the cache, and those behind an end of sequence.
            spared = sum(
                c.cached_tokens + by_id[c.request_id].max_new_tokens - c.decode_steps - 1 for c in step.finished
            )
            advance(step.prompt_tokens + len(step.new_tokens) + spared)
    return writer.summary(), speed


def _digest(requests: list[Request]) -> str:
    """Tells whether requests are the same: prompts, known answers, new tokens and arrivals, in hex."""
    digest = blake2b(digest_size=16)
    for request in requests:
        facts = (len(request.prompt_token_ids), request.max_new_tokens, request.arrival_s, request.forced_token_ids)
        digest.update(repr(facts).encode())
        digest.update(np.asarray(request.prompt_token_ids, dtype="<u4").tobytes())
    return digest.hexdigest()


def _scores(run: RunDir, groups: Sequence[str]) -> dict[str, list[float]]:
    """Scores of all finished requests, those before an interruption too: by each of ``groups``, and of all."""
    scores: dict[str, list[float]] = defaultdict(list)
    every: list[float] = []
    for _, line in read_lines(run.requests_path):
        entry = orjson.loads(line)
        if "score" in entry:
            every.append(entry["score"])
            for group in groups:
                value = str(entry["metadata"][group])
                scores[value if len(groups) == 1 else f"{group}: {value}"].append(entry["score"])
    found = dict(sorted(scores.items()))
    return found | {"all": every} if len(found) > 1 else found
