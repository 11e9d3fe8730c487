"""`dsakv bench --compare A.json B.json`: two configurations in turn, so that both see the same machine.

Every round is a process of its own, A and then B, as often as ``--rounds`` says: nothing that one leaves in memory
helps or harms the other, and a machine that slows down slows down both. What counts is the ratio within each pair.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import orjson

from dsakv import __version__
from dsakv.config import SECTIONS, BenchConfig, Config
from dsakv.console import Console
from dsakv.errors import DsakvError, InputError
from dsakv.jobs.bench_summary import leaves, statistics
from dsakv.launch import find_place
from dsakv.report.bench_report import render_comparison, round_line
from dsakv.settings import resolved_json
from dsakv.trace.files import check_target, default_path, write_result

SCHEMA_VERSION = 1
MEANT = frozenset({"--compare", "--rounds", "--out-json", "--json", "--verbose"})
"""Flags that mean something beside ``--compare``."""
OWN = frozenset({"bench.rounds", "bench.out_json", "bench.compare", "bench.verbose", "bench.json"})
"""Keys that a comparison sets itself."""
OTHER_WORK = (
    *("model.ckpt_path", "model.name", "model.config", "engine.max_new_tokens", "engine.batch_size", "engine.seed"),
    *("bench.prompt", "bench.num_prompts", "bench.input_len"),
)
"""Beginnings of keys that change what is computed, not how fast."""
SIDES = ("a", "b")
LAST_LINES = 5
"""Lines of a failed round's log that are shown."""
ELSEWHERE = "name a file in a directory that can be written to with --out-json"


def check_flags(typed: Collection[str]) -> None:
    """Raise InputError for a flag that does nothing beside ``--compare``: the two files say everything else."""
    for flag in typed:
        if flag not in MEANT:
            raise InputError(
                f"{flag} does nothing with --compare, whose files hold the configurations",
                "leave it out, or make a new configuration with it: dsakv bench writes one",
            )


def compare(bench: BenchConfig, console: Console) -> dict[str, Any]:
    """Run the two configurations in turn; print, write and return how they compare.

    Raises:
        InputError: a file that holds no configuration, or one that cannot be run from its file.
        DsakvError: a round failed, or the results cannot be written.
    """
    if len(bench.compare) != len(SIDES):
        raise InputError(
            f"--compare takes two files, not {len(bench.compare)}", "give A.json and B.json, as bench writes them"
        )
    if find_place(os.environ) is not None:
        raise InputError("--compare starts its rounds itself", "run it without torchrun or srun")
    configs = {side: read_config(Path(path)) for side, path in zip(SIDES, bench.compare, strict=True)}
    differing = differences(configs["a"], configs["b"])
    if other := [name for name in differing if name.startswith(OTHER_WORK)]:
        console.warn(f"A and B do different work: {', '.join(other)} differ{'s' if len(other) == 1 else ''}")
    out = Path(bench.out_json or default_path("bench-compare") / "bench_compare.json")
    check_target(out, ELSEWHERE, new=True)
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with (
        tempfile.TemporaryDirectory(prefix="dsakv-compare-") as folder,
        console.progress(len(SIDES) * bench.rounds, "comparing", "rounds") as advance,
    ):
        for number in range(bench.rounds):
            for side, config in configs.items():
                figures = _run(config, side, Path(folder))
                rounds[side].append(figures)
                if bench.verbose:
                    console.info(f"pair {number}, {side.upper()}: {round_line(figures)}")
                advance(1)
    document = {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dsakv_version": __version__,
        **compared(rounds["a"], rounds["b"]),
        "differences": differing,
        **{
            side: {"path": path, "config": orjson.loads(resolved_json(configs[side])), "rounds": rounds[side]}
            for side, path in zip(SIDES, bench.compare, strict=True)
        },
    }
    data = orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    write_result(out, data, ELSEWHERE)
    if bench.json:
        console.print_data(data.decode().rstrip("\n"))
    else:
        console.print_table(render_comparison(document))
    console.info(f"results: {out}")
    return document


def read_config(path: Path) -> Config:
    """The configuration in a ``config.json``, or under ``config`` in a file of results.

    Raises InputError where there is none, or it lacks a password that was not written down.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise InputError(f"{path} is no file", "give a config.json or bench_results.json")
    try:
        document = msgspec.json.decode(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {error}", "give a config.json or bench_results.json") from error
    if isinstance(document, dict) and "config" in document:
        document = document["config"]
    elif isinstance(document, dict) and "schema_version" in document:
        raise InputError(f"{path} holds other results than those of bench", "give a config.json or bench_results.json")
    try:
        config = msgspec.convert(document, Config)
    except msgspec.ValidationError as error:
        raise InputError(
            f"{path} holds no configuration: {error}", "give a config.json or bench_results.json of this version"
        ) from error
    if "://***@" in (config.kv.remote or ""):
        raise InputError(
            f"{path} does not hold the password of {config.kv.remote}: it is never written down",
            "put the whole URL into a copy of the file, and remove that afterwards",
        )
    if config.launch.nnodes > 1:
        raise InputError(f"{path} is for {config.launch.nnodes} machines", "compare configurations of one machine")
    return config


def differences(a: Config, b: Config) -> dict[str, list[Any]]:
    """What the two configurations set differently, by ``section.key``; where results go and who runs what aside."""
    sides = [orjson.loads(resolved_json(config)) for config in (a, b)]  # without passwords
    kept = [name for name in sides[0] if name in SECTIONS["bench"]]
    return {
        f"{section}.{name}": [side[section][name] for side in sides]
        for section in kept
        for name in sides[0][section]
        if sides[0][section][name] != sides[1][section][name] and f"{section}.{name}" not in OWN
    }


def compared(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> dict[str, Any]:
    """Two lists of rounds, ran in pairs: statistics of every figure on both sides, and of its ratio in each pair."""
    flat_a, flat_b = [leaves(one) for one in a], [leaves(one) for one in b]
    names = [name for name in flat_a[0] if all(name in one for one in (*flat_a, *flat_b))]
    return {
        "pairs": len(a),
        "same_tokens": len({one["output_digest"] for one in (*a, *b)}) == 1,
        "figures": {
            name: {
                "a": statistics([one[name] for one in flat_a]),
                "b": statistics([one[name] for one in flat_b]),
                "ratio": statistics([_ratio(x[name], y[name]) for x, y in zip(flat_a, flat_b, strict=True)]),
            }
            for name in names
        },
    }


def _ratio(a: float | None, b: float | None) -> float | None:
    return b / a if a and b is not None else None


def _run(config: Config, side: str, folder: Path) -> dict[str, Any]:
    """The figures of one round of a configuration, in a process of its own."""
    document, out = folder / f"{side}-config.json", folder / f"{side}-results.json"
    bench = msgspec.structs.replace(config.bench, rounds=1, out_json=str(out), compare=(), json=False, verbose=False)
    out.unlink(missing_ok=True)  # of the round before
    document.write_bytes(msgspec.json.encode(msgspec.structs.replace(config, bench=bench)))
    document.chmod(0o600)  # a URL's password may stand in it
    command = [sys.executable, "-m", "dsakv.worker", "bench", str(document)]
    ran = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if ran.returncode:
        raise _failure(side, ran.returncode, ran.stderr)
    results: Mapping[str, Any] = orjson.loads(out.read_bytes())
    figures: dict[str, Any] = results["rounds"][0]
    return figures


def _failure(side: str, code: int, log: str) -> DsakvError:
    """What to say of a round that ended with ``code``: what it said itself, as far as it did."""
    lines = [line for line in log.splitlines() if line.strip()]
    kind = InputError if code == InputError.exit_code else DsakvError
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    hints = [line.removeprefix("hint: ") for line in lines if line.startswith("hint: ")]
    said = errors[-1] if errors else " | ".join(lines[-LAST_LINES:]) or "nothing"
    return kind(
        f"configuration {side.upper()} failed with exit code {code}: {said}",
        hints[-1] if hints else "run it by itself: its settings stand in the file",
    )
