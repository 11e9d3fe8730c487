"""The command line: flags become a Config, one library call does the work, its result is printed.

Heavy imports stand inside the commands, so that help and errors answer at once and without torch.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Annotated, cast

import typer

from dsakv import __version__
from dsakv.config import Config
from dsakv.errors import DsakvError, PeerLostError
from dsakv.options import configured, configured_group
from dsakv.settings import nearest
from dsakv.threads import wait_briefly

if TYPE_CHECKING:
    from dsakv.distributed import World

app = typer.Typer(
    help="Run DeepSeek Sparse Attention models, record what they select, decide where the KV cache may live.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
trace_app = typer.Typer(help="Run a workload and record what the indexer selects.")
app.add_typer(trace_app, name="trace")
fetch_app = typer.Typer(help="Download a data set from the Hugging Face hub and write it as plain files.")
app.add_typer(fetch_app, name="fetch-data")
bench_app = typer.Typer()
app.add_typer(bench_app, name="bench")

# Typer carries its own click or stands on the real one: its public BadParameter leads to the base of either.
UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__bases__[0])

INTERRUPTED = 130
ALWAYS_TRACED = {"trace.enable"}
RETIRED_FLAGS = {
    "--dataset": "the workload is a subcommand now: dsakv trace ruler, longbenchv2, sharegpt, burstgpt",
    "--split": "leave it out: RULER prompts are generated, or read from the files that --ruler-data names",
}
"""Flags of older scripts, and what takes their place."""


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dsakv {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


@app.command()
@configured("generate", without={"trace.resume"})
def generate(config: Config) -> None:
    """Complete prompts, from the command line, a file or a chat."""
    _run("generate", config)


@trace_app.command("ruler")
@configured("trace ruler", without=ALWAYS_TRACED | {"workload.max_new_tokens_cap"})
def trace_ruler(config: Config) -> None:
    """Trace RULER: needles, variable tracking, common and frequent words at any context length."""
    _trace("ruler", config)


REPLAYED = ALWAYS_TRACED | {"workload.forced", "workload.truncate", "engine.max_new_tokens"}
"""Keys that mean nothing to a trace of lengths: it has no answers, and no text with a middle."""


@trace_app.command("longbenchv2")
@configured("trace longbenchv2", without=ALWAYS_TRACED | {"workload.max_new_tokens_cap", "workload.corpus"})
def trace_longbenchv2(config: Config) -> None:
    """Trace LongBench v2: questions with four choices on long documents."""
    _trace("longbenchv2", config)


@trace_app.command("sharegpt")
@configured("trace sharegpt", without=ALWAYS_TRACED | {"workload.max_new_tokens_cap", "workload.corpus"})
def trace_sharegpt(config: Config) -> None:
    """Trace ShareGPT: conversations of users with assistants."""
    _trace("sharegpt", config)


@trace_app.command("burstgpt")
@configured("trace burstgpt", without=REPLAYED)
def trace_burstgpt(config: Config) -> None:
    """Trace BurstGPT: its arrivals and lengths, with prompts of real text."""
    _trace("burstgpt", config)


@trace_app.command("mooncake")
@configured("trace mooncake", without=REPLAYED)
def trace_mooncake(config: Config) -> None:
    """Trace Mooncake: its arrivals, lengths and shared prefixes, with prompts of real text."""
    _trace("mooncake", config)


def _trace(workload: str, config: Config) -> None:
    _run(f"trace {workload}", config)


def _run(job: str, config: Config) -> None:
    if code := start_job(job, config):
        raise typer.Exit(code)


def start_job(job: str, config: Config) -> int:
    """Do ``job`` in this process, or on the ranks that it asks for; returns the exit code."""
    from dsakv.launch import find_place, ranks_to_start, start_ranks

    n_ranks = ranks_to_start(config, os.environ)
    if n_ranks > 1:
        return start_ranks(job, config, n_ranks)
    try:
        run_job(job, config)
    except PeerLostError as error:
        place = find_place(os.environ)
        if place is None or place.rank == 0:
            raise
        return error.exit_code  # only rank 0 talks
    return 0


def run_job(job: str, config: Config) -> None:
    """Do ``job`` (``generate``, ``bench`` or ``trace <workload>``) as the rank that this process is."""
    from dsakv.console import Console
    from dsakv.launch import find_place

    console = Console()
    place = find_place(os.environ)
    if place is None or place.rank == 0:
        console.info("loading ...")  # PyTorch alone takes seconds
    from dsakv.jobs.bench import bench
    from dsakv.jobs.generate import generate
    from dsakv.jobs.ranks import run_on_ranks
    from dsakv.jobs.trace import trace

    def work(world: World) -> None:
        if job == "generate":
            generate(config, console, world)
        elif job == "bench":
            bench(config, console, world)
        else:
            trace(job.removeprefix("trace "), config, console, world)

    run_on_ranks(work, config, place, ignore_eos=job == "bench")


@trace_app.command("file")
@configured("trace file", without=ALWAYS_TRACED | {"workload.max_new_tokens_cap", "workload.corpus"})
def trace_file(config: Config) -> None:
    """Trace requests of your own, from a file of JSON lines."""
    _trace("file", config)


@trace_app.command("selfcheck")
@configured("trace selfcheck", only={"trace.out", "trace.format"})
def trace_selfcheck(config: Config) -> None:
    """Write a small sample trace, without a model, and validate what can be read back from it."""
    from dsakv.console import Console
    from dsakv.trace.selfcheck import selfcheck

    report = selfcheck(config.trace.out, config.trace.format)
    checks = sum(report.checks.values())
    Console().print_data(f"{report.trace_dir}: {report.records} records in {report.files} files passed {checks} checks")


@app.command()
@configured("analyze")
def analyze(config: Config) -> None:
    """Turn a trace into locality, working-set and cache figures, and into advice where the KV cache may live."""
    import orjson

    from dsakv.console import Console
    from dsakv.jobs.analyze import analyze as run_analyze
    from dsakv.report.terminal import render

    console = Console()
    outcome = run_analyze(config.analyze, console)
    if config.analyze.json:
        console.print_data(orjson.dumps(outcome.document, option=orjson.OPT_INDENT_2).decode())
    else:
        console.print_table(render(outcome.document))


@app.command()
@configured("convert")
def convert(config: Config) -> None:
    """Turn a Hugging Face checkpoint into a file for each rank, with the names of DeepSeek's own code."""
    from dsakv.console import Console
    from dsakv.jobs.convert import convert as run_convert

    console = Console()
    for path in run_convert(config.convert, console):
        console.print_data(str(path))


NOT_PLANNED = {f"bench.{name}" for name in ("warmup_rounds", "rounds", "out_json", "compare", "verbose")} | {
    f"engine.{name}" for name in ("temperature", "top_p", "prefill_chunk")
}
"""Keys of a benchmark that change nothing about where things are."""
TIERS_ONLY = {f"kv.{name}" for name in ("hot_capacity", "policy", "scope", "local", "write", "start")}
"""Keys of tiers that links have nothing to do with."""


@bench_app.callback(invoke_without_command=True)
@configured_group("bench")
def bench(config: Config, typed: Collection[str]) -> None:
    """Run prompts round after round and measure: latencies, throughput, what moved between disk, memory and device."""
    if not config.bench.compare:
        _run("bench", config)
        return
    from dsakv.console import Console
    from dsakv.jobs.bench_compare import check_flags, compare

    check_flags(typed)
    compare(config.bench, Console())


@bench_app.command("plan")
@configured("bench plan", without=NOT_PLANNED)
def bench_plan(config: Config) -> None:
    """Say what will live where, what each step moves and how long that takes at least. No weight is loaded."""
    import orjson

    from dsakv.console import Console
    from dsakv.jobs.bench_plan import bench_plan as plan
    from dsakv.report.bench_plan_report import render

    console = Console()
    document = plan(config, console)
    if config.bench.json:
        console.print_data(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())
    else:
        console.print_table(render(document))


@bench_app.command("links")
@configured("bench links", without=TIERS_ONLY)
def bench_links(config: Config) -> None:
    """Measure the links between KV pools and the device, for analyze --plan, and how fast disk and memory are."""
    from dsakv.console import Console
    from dsakv.jobs.bench_links import bench_links as measure
    from dsakv.report.links_report import render

    console = Console()
    measured = measure(config, console)
    console.print_table(render(measured.profile, measured.batches, measured.disk, measured.memory))


FETCHED = {"fetch.out", "fetch.limit", "fetch.revision"}
"""Keys that every data set has."""


@fetch_app.command("ruler")
@configured("fetch-data ruler", only=FETCHED | {"fetch.tasks", "fetch.lengths"})
def fetch_ruler(config: Config) -> None:
    """Fetch RULER's own prompts (622 MB are downloaded) as JSON lines, a file for each task and length."""
    _fetch("ruler", config)


@fetch_app.command("longbenchv2")
@configured("fetch-data longbenchv2", only=FETCHED)
def fetch_longbenchv2(config: Config) -> None:
    """Fetch LongBench v2, 503 questions on long documents (465 MB are downloaded), as JSON lines."""
    _fetch("longbenchv2", config)


@fetch_app.command("sharegpt")
@configured("fetch-data sharegpt", only=FETCHED | {"fetch.sharegpt_dataset", "fetch.split"})
def fetch_sharegpt(config: Config) -> None:
    """Fetch ShareGPT conversations as JSON lines."""
    _fetch("sharegpt", config)


@fetch_app.command("burstgpt")
@configured("fetch-data burstgpt", only=FETCHED | {"fetch.burstgpt_file"})
def fetch_burstgpt(config: Config) -> None:
    """Fetch BurstGPT, arrival times and lengths of real requests, as CSV."""
    _fetch("burstgpt", config)


def _fetch(name: str, config: Config) -> None:
    from dsakv.console import Console
    from dsakv.jobs.fetch import fetch

    console = Console()
    for path in fetch(name, config.fetch, console):
        console.print_data(str(path))


def main() -> None:
    """Entry point of the ``dsakv`` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal's encoding lacks is shown as an escape
            stream.reconfigure(errors="backslashreplace")
    wait_briefly(os.environ)
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code. Bugs come out as the exceptions they are."""
    return guarded(lambda: app(list(arguments) or ["--help"], prog_name="dsakv", standalone_mode=False))


def guarded(call: Callable[[], int | None]) -> int:
    """Exit code of ``call``; errors of the user and of the machine are said in two lines on stderr."""
    try:
        code = call() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except DsakvError as error:
        return _fail(error.message, error.hint, error.exit_code)
    except UsageError as error:
        return _fail(*_usage(error), error.exit_code)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in ("", "dsakv"):
            raise
        return _fail(f"this command needs {package}, which is not installed", f"python -m pip install {package}", 1)
    except BrokenPipeError:
        _give_up_stdout()
        return 1
    except MemoryError as error:
        return _fail(
            f"out of memory: {error}", "ask for less at a time: larger blocks, shorter sequences, fewer workers", 1
        )
    except OSError as error:
        _give_up_stdout()
        place = "" if error.filename is None else f"{error.filename}: "
        return _fail(f"{place}{error.strerror or error}", _disk_hint(error), 1)
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return code


def _fail(message: str, hint: str, code: int) -> int:
    """Say what is wrong and what to do next, each on one line. Called while the error is being handled."""
    if os.environ.get("DSAKV_DEBUG", "0") not in ("", "0"):
        traceback.print_exc()
    for label, text in (("error", message), ("hint", hint)):
        print(f"{label}: {' '.join(text.split())}", file=sys.stderr)
    return code


def _usage(error: typer.BadParameter) -> tuple[str, str]:
    """Message and hint of a command line that does not parse."""
    command = error.ctx.command_path if error.ctx else "dsakv"
    hint = f"{command} --help lists what it takes"
    flag = getattr(error, "option_name", None)
    if flag is None:
        return error.format_message(), hint
    near = getattr(error, "possibilities", None)
    if flag in RETIRED_FLAGS:
        hint = RETIRED_FLAGS[flag]
    elif near:
        hint = f"did you mean {nearest(flag, near)}?"
    return error.message, hint


def _disk_hint(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, or write to another disk"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "name a place that you may write to, or change its permissions"
    return "check the path, and that its disk is there"


def _give_up_stdout() -> None:
    """Drop what stdout cannot take: Python would fail once more when it flushes at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
