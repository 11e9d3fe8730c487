"""`dsakv generate`: complete prompts, from the command line, a file or a chat."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import Any

import orjson

from dsakv.config import Config
from dsakv.console import Console
from dsakv.distributed import ALONE, World
from dsakv.engine.engine import Engine
from dsakv.errors import InputError
from dsakv.jobs.loaded import LoadedModel
from dsakv.jobs.prompts import read_prompts, to_requests
from dsakv.jobs.ranks import load_together
from dsakv.jobs.run import PrefixLog, announce, check_kv, how_to_analyze, inputs, make_engine
from dsakv.jobs.streaming import check_weights
from dsakv.policies.placement import Tiers
from dsakv.report.run_summary import Speed, render_tiers
from dsakv.request import Completion, Request, Step
from dsakv.settings import resolved_json
from dsakv.tokenizer import StreamDecoder
from dsakv.trace.run_dir import RunDir
from dsakv.trace.tiers import Traffic
from dsakv.trace.writer import TraceWriter


def generate(config: Config, console: Console, world: World = ALONE) -> None:
    """Complete what the configuration names; text goes to stdout as it comes, ``--json`` prints a line a completion.

    Raises InputError for options and inputs that do not work, DsakvError for output that cannot be written.
    """
    given = config.generate
    sources = [given.prompt is not None, given.input_file is not None, given.interactive]
    if sum(sources) != 1:
        raise InputError(
            "nothing to generate from" if not any(sources) else "more than one source of prompts",
            "give one of --prompt TEXT, --input-file FILE, --interactive",
        )
    if given.interactive and given.json:
        raise InputError("--json does not go with --interactive", "leave one of them out")
    if given.interactive and given.raw:
        raise InputError("--raw does not go with --interactive", "a chat needs the template: leave one out")
    check_kv(config)
    check_weights(config.weights)
    if config.trace.enable:
        RunDir.check_free(config.trace.out)
    elif config.trace.out is not None:
        console.warn("--trace-out does nothing without --trace-enable")
    prompts = [] if given.interactive else read_prompts(config)  # a bad file is told of before weights are read
    with closing(load_together(config, world, console)) as loaded:
        announce(loaded, console)
        engine = make_engine(config, loaded, world, record=config.trace.enable)
        requests = to_requests(prompts, config, loaded)
        engine.check(requests)
        tiers = None if given.interactive else engine.tiers(requests)
        with _tape(config, loaded, tiers, world, console, inputs(len(requests))) as tape:
            if given.interactive:
                _chat(engine, config, loaded, console, tape)
            elif given.json:
                _print_lines(engine, requests, loaded, console, tape)
            else:
                _stream(engine, requests, loaded, console, tape)
        if tape.traffic:
            console.info_table(render_tiers(tape.traffic.transfers()))
        if moved := tape.speed.moved():
            console.info(moved)


class _Tape:
    """The trace of the run, or nothing where tracing is off."""

    def __init__(self, writer: TraceWriter | None, log: PrefixLog, counts: dict[str, Any]) -> None:
        self._writer, self._log, self._counts = writer, log, counts
        self.traffic = Traffic()
        self.speed = Speed()

    def steps(self, engine: Engine, requests: list[Request]) -> Iterator[Step]:
        """The steps that complete ``requests``, recorded on the way."""
        if self._writer is not None:
            for request in requests:
                # A chat's turns come one by one; the requests of a file were counted before the run.
                self._counts["kept"] = max(self._counts["kept"], request.request_id + 1)
                self._writer.expect(request, self._log.facts(request))
        for step in engine.run(requests):
            self.traffic.add(step.traffic)
            self.speed.add(step)
            if self._writer is not None:
                self._writer.write(step)
            yield step


@contextmanager
def _tape(
    config: Config, loaded: LoadedModel, tiers: Tiers | None, world: World, console: Console, counts: dict[str, Any]
) -> Iterator[_Tape]:
    log = PrefixLog(config.engine.kv_block_size, config.trace.prefix_key_tokens)
    if not config.trace.enable:
        yield _Tape(None, log, counts)
        return
    run = RunDir.create(config.trace.out, "generate", config.engine.kv_block_size, resolved_json(config))
    run.write_meta(
        dataset="generate",
        model=loaded.describe(),
        seed=config.engine.seed,
        options=config.trace,
        inputs=counts,
        kv_tiers=None if tiers is None else asdict(tiers),
        world_size=world.size,
    )

    def text(completion: Completion) -> str | None:
        return loaded.text(completion.token_ids)

    try:
        with TraceWriter(
            run,
            config.trace,
            seed=config.engine.seed,
            requests=[],
            prefix={},
            inputs=counts,
            text=text,
            resumable=False,
        ) as writer:
            yield _Tape(writer, log, counts)
    finally:
        if config.generate.interactive:
            run.update_inputs(counts)
    console.info(f"trace in {run.path}; {how_to_analyze(run)}")


def _print_lines(engine: Engine, requests: list[Request], loaded: LoadedModel, console: Console, tape: _Tape) -> None:
    """One JSON line a completion, as they finish."""
    work = sum(request.max_new_tokens for request in requests)
    with console.progress(work, "generating", "tokens") as advance:
        for step in tape.steps(engine, requests):
            for completion in step.finished:
                line = {
                    "request_id": completion.request_id,
                    "prompt_tokens": completion.prompt_tokens,
                    "token_ids": completion.token_ids,
                    "text": loaded.text(completion.token_ids),
                    "finish_reason": completion.finish_reason,
                    "ttft_ms": round(completion.ttft_ms, 3),
                    "tpot_ms": None if completion.tpot_ms is None else round(completion.tpot_ms, 3),
                }
                console.print_data(orjson.dumps(line).decode())
                advance(requests[completion.request_id].max_new_tokens - completion.decode_steps - 1)
            advance(len(step.new_tokens))


def _stream(engine: Engine, requests: list[Request], loaded: LoadedModel, console: Console, tape: _Tape) -> str:
    """Print completions in the order of their prompts, the first unfinished one as its tokens come; return the text."""
    eos = loaded.eos_token_ids
    decoders = {request.request_id: StreamDecoder(loaded.tokenizer) for request in requests}
    order = [request.request_id for request in requests]
    pending = dict.fromkeys(order, "")
    printed: list[str] = []
    done: set[int] = set()
    begin, generated = time.perf_counter(), 0
    for step in tape.steps(engine, requests):
        generated += len(step.new_tokens)
        for request_id, token in step.new_tokens:
            if token not in eos:
                pending[request_id] += decoders[request_id].push(token)
        for completion in step.finished:
            pending[completion.request_id] += decoders[completion.request_id].flush()
            done.add(completion.request_id)
        while order:
            if text := pending[order[0]]:
                console.print_model_text(text)
                printed.append(text)
                pending[order[0]] = ""
            if order[0] not in done:
                break
            console.print_data("\n" if len(order) > 1 else "")
            order.pop(0)
    seconds = time.perf_counter() - begin
    console.info(f"{generated} tokens in {seconds:.2f} s ({generated / seconds:.1f} tokens/s)")
    return "".join(printed)


def _chat(engine: Engine, config: Config, loaded: LoadedModel, console: Console, tape: _Tape) -> None:
    """Read messages until /exit or the end of input; the conversation goes on until /clear."""
    messages: list[dict[str, str]] = []
    request_id = 0
    while (line := _read_line()) is not None and line.strip() != "/exit":
        if line.strip() == "/clear":
            messages.clear()
            continue
        if not line.strip():
            continue
        asked = [*messages, {"role": "user", "content": line}]
        ids = loaded.tokenizer.encode_messages(asked)
        request = Request(request_id, ids, config.engine.max_new_tokens, prompt=line)
        try:
            engine.check([request])
        except InputError as error:  # too long: the chat itself can go on
            console.warn(f"{error.message}; /clear starts over")
            continue
        reply = _stream(engine, [request], loaded, console, tape)
        messages = [*asked, {"role": "assistant", "content": reply}]
        request_id += 1


def _read_line() -> str | None:
    """The next line of input without its end; None at the end of input, and where it is closed."""
    if sys.stdin is None:
        return None
    try:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)  # input() would put it on stdout, among the data
            return input()
        line = sys.stdin.readline()
    except EOFError:
        print(file=sys.stderr)
        return None
    except UnicodeDecodeError as error:
        raise InputError(f"the input is no UTF-8: {error}", "convert it, or set PYTHONUTF8=1 if it is") from error
    return line.rstrip("\r\n") if line else None
