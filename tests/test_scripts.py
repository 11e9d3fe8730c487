"""The shell scripts are thin: they find the command, and pass arguments and variables on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "datasets/download_ruler.sh": "fetch-data ruler",
    "datasets/download_longbench_v2.sh": "fetch-data longbenchv2",
    "datasets/download_sharegpt.sh": "fetch-data sharegpt",
    "datasets/download_burstgpt.sh": "fetch-data burstgpt",
    "run_trace_ruler.sh": "trace ruler",
    "run_trace_longbenchv2.sh": "trace longbenchv2",
    "run_trace_sharegpt.sh": "trace sharegpt",
    "run_trace_burstgpt.sh": "trace burstgpt",
}
FAKE = """#!/usr/bin/env bash
echo "$0|$PWD|$*|${LIMIT:-}|${DS_TRACE_OUT:-}"
[[ " $* " != *" ${FAILS:-none} "* ]] || exit "${CODE:-1}"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The scripts in a folder with a space in its name, and a fake command on the path."""
    root = tmp_path / "check out"
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    install(tmp_path / "tools" / "dsakv")
    return root


def install(place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(FAKE)
    place.chmod(0o755)


def call(checkout: Path, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{checkout.parent / 'tools'}{os.pathsep}/usr/bin{os.pathsep}/bin"
    command = [str(checkout / "scripts" / script), *arguments]
    environ = {"PATH": path, **variables}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environ, cwd="/")


def test_every_script_is_known() -> None:
    found = {str(path.relative_to(ROOT / "scripts")) for path in (ROOT / "scripts").rglob("*.sh")}
    assert found == {*COMMANDS, "dsakv.sh", "run_all_traces.sh"}


@pytest.mark.parametrize("script", COMMANDS)
def test_a_script_calls_the_command(checkout: Path, script: str) -> None:
    """Through the command on the path where the checkout has no environment of its own, from any folder."""
    for place in (checkout.parent / "tools" / "dsakv", checkout / ".venv" / "bin" / "dsakv"):
        install(place)
        ran = call(checkout, script, "--out", "else where", LIMIT="5", MP="8")
        called, folder, arguments, limit, _ = ran.stdout.strip().split("|")
        assert (checkout / called).resolve() == place
        assert (folder, limit) == (str(checkout), "5")
        assert arguments == f"{COMMANDS[script]} --out else where"


def test_all_traces_run_though_one_fails(checkout: Path) -> None:
    assert call(checkout, "run_all_traces.sh").returncode == 0
    ran = call(checkout, "run_all_traces.sh", "--limit", "2", FAILS="sharegpt")
    assert [line.split("|")[2] for line in ran.stdout.splitlines()] == [
        f"trace {name} --limit 2" for name in ("ruler", "longbenchv2", "sharegpt", "burstgpt")
    ]
    assert (ran.returncode, ran.stderr.splitlines()[-1]) == (1, "failed: sharegpt")
    ran = call(checkout, "run_all_traces.sh", DS_TRACE_OUT="a b", FAILS="sharegpt", CODE="130")
    assert ran.returncode == 130
    assert [line.split("|")[4] for line in ran.stdout.splitlines()] == ["a b/ruler", "a b/longbenchv2", "a b/sharegpt"]


def test_without_the_command_a_script_says_so(checkout: Path) -> None:
    (checkout.parent / "tools" / "dsakv").unlink()
    ran = call(checkout, "run_trace_ruler.sh")
    assert ran.returncode == 1
    assert [line.split(":")[0] for line in ran.stderr.splitlines()] == ["error", "hint"]


@pytest.mark.parametrize("script", [*COMMANDS, "dsakv.sh", "run_all_traces.sh"])
def test_a_script_parses(script: str) -> None:
    ran = subprocess.run(["bash", "-n", str(ROOT / "scripts" / script)], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_script_really_traces(checkout: Path, small_checkpoint: Path) -> None:
    command = checkout / ".venv" / "bin" / "dsakv"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" -m dsakv "$@"\n')
    command.chmod(0o755)
    row = json.dumps({"input": "where is it?", "outputs": ["here"], "answer_prefix": ""}) + "\n"
    (checkout / "rows.jsonl").write_text(row * 3)
    options = "--limit 1 --ruler-data rows.jsonl --max-new-tokens 3 --device cpu --trace-out out"
    variables = {"CKPT_PATH": str(small_checkpoint), "LIMIT": "2", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = call(checkout, "run_trace_ruler.sh", *options.split(), **variables)
    assert ran.returncode == 0, ran.stderr
    assert len((checkout / "out" / "requests.jsonl").read_text().splitlines()) == 1
