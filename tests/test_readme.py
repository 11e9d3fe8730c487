"""The README keeps its word: its commands run, and its flags, keys, variables and fields are the program's."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from dsakv.cli import run
from dsakv.config import Config
from dsakv.models.shapes import dsa_shape_of, read_config
from dsakv.settings import NOT_KEYS, keys, resolve
from dsakv.trace import schema

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRACED = ("ruler", "longbenchv2", "sharegpt", "burstgpt", "mooncake", "file", "selfcheck")
COMMANDS = ("generate", *(f"trace {name}" for name in TRACED), "analyze", "convert", "bench links", "bench")
NETWORKED = tuple(f"fetch-data {name}" for name in ("ruler", "longbenchv2", "sharegpt", "burstgpt"))
"""Commands that only blocks marked ``sh`` may hold."""
OLD_VARIABLES = ("CKPT_PATH", "CONFIG", "LIMIT", "HF_CKPT_PATH", "SAVE_PATH", "EXPERTS", "MP")
SHELL = re.compile(r"[|<>&;$`(]")
"""What makes a line one for the shell; others are run in this process, which has torch loaded.

Torch's launcher leaves files open until its process ends, so that ranks are started in one of their own.
"""


def blocks(*languages: str) -> list[str]:
    """Fenced blocks of the README in these languages, in order."""
    fenced = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [body for language, body in fenced if language in languages]


def command_lines(*languages: str) -> Iterator[str]:
    for body in blocks(*languages):
        for line in body.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                yield line


def flags_of(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The flags that a command's help shows."""
    assert run([*command.split(), "--help"]) == 0
    return set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory like a fresh checkout, with the installed commands on the path."""
    for name in os.environ:
        if name.startswith(("DSAKV_", "DS_TRACE_")) or name in OLD_VARIABLES:
            monkeypatch.delenv(name)
    monkeypatch.setenv("DSAKV_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DSAKV_MODEL_NAME", "tiny-random")  # the default model would be downloaded
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    work = tmp_path / "work"
    work.mkdir()
    (work / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(work)
    return work


@pytest.mark.slow
def test_the_commands_run(checkout: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = list(command_lines("bash"))
    named = {found[1] for line in lines if (found := re.search(r"dsakv ((?:trace |bench )?\w+)", line))}
    assert named == set(COMMANDS)
    for line in lines:
        plain = re.fullmatch(r"(?:(DSAKV_\w+)=(\w+) )?dsakv (.*)", line)
        if plain is None or SHELL.search(line):
            shell = ["bash", "-euo", "pipefail", "-c", line]
            code = subprocess.run(shell, stdin=subprocess.DEVNULL, check=False).returncode
        else:
            name, value, rest = plain.groups()
            with monkeypatch.context() as variables:
                if name:
                    variables.setenv(name, value)
                code = run(shlex.split(rest))
        caught = capfd.readouterr()
        assert code == 0, f"{line}\n{caught.err}"
        assert caught.out or ">" in line, f"{line} prints nothing"

    tour = checkout / "outputs" / "tour"
    drawing = next(body for body in blocks("text") if body.startswith("outputs/tour/\n"))
    drawn = set(re.findall(r"^ +(\S+\.jsonl?) ", drawing, re.MULTILINE))
    assert drawn == {path.name for path in tour.rglob("*") if path.is_file()} - {"analysis.json"}
    for result in orjson.loads((checkout / "sizes.json").read_bytes())["results"]:
        for rule in result["recommendations"]:
            assert f"`{rule['rule']}`" in README
    assert b"<svg" in (checkout / "tour.html").read_bytes()


def test_flags_stand_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    flags = {command: flags_of(command, capsys) for command in (*COMMANDS, *NETWORKED)}
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", prose))
    assert named
    assert named <= set().union(*flags.values())
    for line in command_lines("bash", "sh"):
        if found := re.search(rf"dsakv ({'|'.join(flags)})( .*)?$", line):
            assert set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", found[2] or "")) <= flags[found[1]], line


def test_keys_sections_and_variables_exist(tmp_path: Path) -> None:
    known = NOT_KEYS | {key.variable for key in keys()} | {key.old_env for key in keys() if key.old_env}
    assert set(re.findall(r"\b(?:DSAKV|DS_TRACE)_[A-Z_]*[A-Z]\b(?!<)", README)) <= known
    sentence = re.search(r"The sections are (.*?)\. ", README, re.DOTALL)
    assert sentence
    assert re.findall(r"`(\w+)`", sentence[1]) == list(Config.__struct_fields__)
    assert blocks("toml")
    for number, preset in enumerate(blocks("toml")):
        path = tmp_path / f"{number}.toml"
        path.write_text(preset, encoding="utf-8")
        assert resolve("analyze", {}, {}, path) != resolve("analyze", {}, {}, None)


def test_the_table_of_fields_is_that_of_the_trace() -> None:
    table = README.partition("| field | meaning |")[2].partition("\n\n")[0]
    named = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert len(named) == len(set(named))
    every = {"store_scores": False, "store_block_ids": True, "store_token_pos": True}
    assert set(named) == {*schema.record(every), *schema.record({**every, "store_scores": True})}
    for parts in (schema.PREFIX, schema.TIER):
        assert all(f"`{name}`" in table for name in parts)


def test_files_that_are_named_exist() -> None:
    for name in re.findall(r"\b(?:configs|scripts|tests)/[\w.]+", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`((?:workloads/)[\w/]+\.py)`", README):
        assert (ROOT / "dsakv" / name).exists(), name


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_a_preset_says_how_to_use_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = re.search(r"^#   dsakv (\w+(?: ruler)?) --preset configs/(\S+)(.*)$", path.read_text(), re.MULTILINE)
    assert found
    command, name, rest = found.groups()
    assert name == path.name
    assert set(re.findall(r"--[a-z-]+", rest)) <= flags_of(command, capsys)
    assert resolve(command, {}, {}, path) != resolve(command, {}, {}, None)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.name)
def test_a_model_shape_is_read(path: Path) -> None:
    raw = read_config(path)
    shape = dsa_shape_of(raw, path.name)
    assert (shape.n_layers, shape.index_topk, shape.max_seq_len) == (61, 2048, 163840)
