import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from dsakv import __version__
from dsakv.cli import TIERS_ONLY, guarded, run
from dsakv.config import SECTIONS, Config
from dsakv.errors import DsakvError, InputError
from dsakv.options import configured
from dsakv.settings import default_text, keys


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("DSAKV_", "DS_TRACE_")) or name in ("CKPT_PATH", "CONFIG", "LIMIT"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "80")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"dsakv {__version__}\n"


def test_without_arguments_comes_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "analyze" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "command", "without"),
    [
        ("generate --help", "generate", {"trace.resume"}),
        ("trace ruler --help", "trace ruler", {"trace.enable", "workload.max_new_tokens_cap"}),
        ("analyze --help", "analyze", set()),
        ("convert --help", "convert", set()),
        ("bench links --help", "bench links", TIERS_ONLY),
        ("bench --help", "bench", set()),
        (
            "fetch-data ruler --help",
            "fetch-data ruler",
            {"fetch.sharegpt_dataset", "fetch.split", "fetch.burstgpt_file"},
        ),
        (
            "fetch-data sharegpt --help",
            "fetch-data sharegpt",
            {"fetch.tasks", "fetch.lengths", "fetch.burstgpt_file"},
        ),
    ],
)
def test_help_shows_every_flag_whole_and_its_default(
    arguments: str, command: str, without: set[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = SECTIONS[command]
    assert run(arguments.split()) == 0
    narrow = capsys.readouterr().out
    for key in keys():
        if key.section in sections and key.path not in without:
            on, _, off = key.declaration.partition("/")
            assert f" {off if off and key.default_for(command) else on} " in narrow
    monkeypatch.setenv("COLUMNS", "250")
    assert run(arguments.split()) == 0
    wide = capsys.readouterr().out
    for key in keys():
        if key.section in sections and key.path not in without and "Default:" not in key.help:
            text = f"{key.help} Default: {default_text(key.default_for(command))}."
            if key.is_bool and key.default_for(command):
                text = f"Switch off: {text[0].lower()}{text[1:]}"
            assert text in wide


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ("trace", "Missing command.", "dsakv trace --help lists what it takes"),
        ("analyse", "No such command 'analyse'", "dsakv --help lists what it takes"),
        ("trace ruler extra", "unexpected extra argument", "dsakv trace ruler --help lists what it takes"),
        ("trace ruler --batch-sise 3", "--batch-sise", "did you mean --batch-size?"),
        ("trace ruler --batch-size", "--batch-size", "--help lists what it takes"),
        ("trace ruler --dataset ruler", "--dataset", "dsakv trace ruler"),
        ("--dataset ruler", "--dataset", "dsakv trace ruler"),
        ("trace ruler --split train", "--split", "--ruler-data"),
        ("trace ruler --kv-block-size 0", "--kv-block-size must be an integer >= 1", "default"),
        ("trace ruler --trace-sync-cuda --trace-no-sync-cuda", "contradict", "one of them"),
        ("generate --dtype float", "--dtype must be one of auto, float32, bfloat16, fp8", "float32"),
        ("generate --resume", "--resume", ""),
        ("convert --model-parallel 0", "--model-parallel must be an integer >= 1", "default"),
        ("fetch-data squad", "No such command 'squad'", "dsakv fetch-data --help lists what it takes"),
        ("fetch-data burstgpt --lengths 4096", "--lengths", "--help lists what it takes"),
        ("fetch-data ruler --lengths 4k", "--lengths must be a list of integers >= 1", "4096"),
        ("bench --rounds 2 links", "--rounds stands before links, where it does nothing", "dsakv bench links --help"),
        ("bench --no-json links", "--no-json stands before links", "put flags behind it"),
        ("bench --preset p.toml links", "--preset stands before links", "put flags behind it"),
        ("bench --mode mixed", "--mode", "--host-budget"),
        ("bench --cpu-cache-layers 40", "--cpu-cache-layers", "--host-budget says in bytes"),
        ("bench linkz", "No such command 'linkz'", "dsakv bench --help lists what it takes"),
        ("bench --compare a.json", "--compare", "--help lists what it takes"),
        ("bench --compare a.json b.json --seed 1", "--seed does nothing with --compare", "leave it out"),
        (
            "bench --compare a.json b.json --preset configs/kv_host.toml",
            "--preset does nothing with --compare",
            "leave it out",
        ),
        ("analyze --preset none.toml", "cannot read preset none.toml", "--preset"),
        ("analyze --lru-caps 128,", "--lru-caps must be a list of numbers > 0", "128,256,512,1024"),
    ],
)
def test_usage_errors(arguments: str, message: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments.split()) == 2
    caught = capsys.readouterr()
    first, second = caught.err.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert second.startswith("hint: ")
    assert hint in second
    assert caught.out == ""


def test_variables_are_read(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSAKV_ANALYZE_LRU_CAP", "5")
    assert run(["analyze"]) == 2
    assert capsys.readouterr().err == (
        "error: unknown variable DSAKV_ANALYZE_LRU_CAP\nhint: did you mean DSAKV_ANALYZE_LRU_CAPS?\n"
    )


def raising(error: BaseException) -> Callable[[], int]:
    def call() -> int:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (InputError("bad [value]", "give\nanother"), 2, ["error: bad [value]", "hint: give another"]),
        (DsakvError("no network", "try later"), 1, ["error: no network", "hint: try later"]),
        (
            ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn"),
            1,
            ["error: this command needs torch, which is not installed", "hint: python -m pip install torch"],
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/x"),
            1,
            ["error: out/x: No space left on device", "hint: free some space, or write to another disk"],
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "x"),
            1,
            ["error: x: Permission denied", "hint: name a place that you may write to, or change its permissions"],
        ),
        (OSError("odd"), 1, ["error: odd", "hint: check the path, and that its disk is there"]),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, []),
        (KeyboardInterrupt(), 130, ["interrupted"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_become_two_lines_and_a_code(
    error: BaseException, code: int, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(raising(error)) == code
    caught = capsys.readouterr()
    assert caught.err.splitlines() == lines
    assert caught.out == ""


@pytest.mark.parametrize("error", [ValueError("bug"), ModuleNotFoundError("dsakv.nope", name="dsakv.nope")])
def test_bugs_stay_bugs(error: Exception) -> None:
    with pytest.raises(type(error)):
        guarded(raising(error))


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), ("", False)])
def test_debug_shows_the_traceback(
    value: str, shown: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSAKV_DEBUG", value)
    assert guarded(raising(InputError("bad", "mend"))) == 2
    err = capsys.readouterr().err
    assert ("Traceback" in err) is shown
    assert err.endswith("error: bad\nhint: mend\n")


def test_stdout_that_is_full(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "dsakv", "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert ran.returncode == 1
    assert ran.stderr.splitlines() == [
        "error: No space left on device",
        "hint: free some space, or write to another disk",
    ]


def called_with(arguments: list[str], command: str) -> Config:
    """The Config that a command made by ``configured`` gets for these arguments."""
    seen: list[Config] = []
    app = typer.Typer()
    app.command()(configured(command)(seen.append))
    app(arguments, standalone_mode=False)
    return seen[0]


def test_flags_reach_the_config() -> None:
    given = (
        "--batch-size 4 --trace-no-sync-cuda --no-resume --tasks vt,cwe --dtype float32 --kv-block-size 16 "
        "--trace-store-scores --limit 3 --temperature 0"
    )
    config = called_with(given.split(), "trace ruler")
    assert (config.engine.batch_size, config.engine.kv_block_size, config.engine.temperature) == (4, 16, 0.0)
    assert (config.trace.sync_cuda, config.trace.resume, config.trace.store_scores) == (False, False, True)
    assert (config.workload.limit, config.ruler.tasks, config.model.dtype) == (3, ("vt", "cwe"), "float32")


def test_a_flag_undoes_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_TRACE_STORE_SCORES", "1")
    monkeypatch.setenv("DSAKV_TRACE_SYNC_CUDA", "0")
    assert called_with([], "trace ruler").trace.store_scores
    config = called_with(["--trace-no-store-scores", "--trace-sync-cuda"], "trace ruler")
    assert not config.trace.store_scores
    assert config.trace.sync_cuda


def test_a_preset_is_read(tmp_path: Path) -> None:
    preset = tmp_path / "p.toml"
    preset.write_text("[engine]\nseed = 7\nbatch_size = 2\n", encoding="utf-8")
    config = called_with(["--preset", str(preset), "--batch-size", "3"], "generate")
    assert (config.engine.seed, config.engine.batch_size, config.engine.max_new_tokens) == (7, 3, 200)
