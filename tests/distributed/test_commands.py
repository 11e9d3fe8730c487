"""`dsakv` over ranks, as a user runs it: real processes over gloo."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from dsakv.cli import run
from dsakv.errors import PEER_LOST

ROOT = Path(__file__).parents[2]
OPTIONS = ["--max-new-tokens", "6", "--temperature", "0"]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}


@pytest.fixture
def prompts_file(tmp_path: Path, prompts: list[list[int]]) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt_token_ids": ids}) + "\n" for ids in prompts))
    return path


def start(environ: dict[str, str], *arguments: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dsakv", *map(str, arguments)],
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def token_ids(lines: str) -> dict[int, list[int]]:
    rows = [json.loads(line) for line in lines.splitlines()]
    return {row["request_id"]: row["token_ids"] for row in rows}


def facts(run_dir: Path) -> list[tuple[Any, ...]]:
    """What a trace says of selections, without times."""
    lines = [line for path in sorted(run_dir.glob("block*/trace_*.jsonl")) for line in path.read_text().splitlines()]
    keys = ("request_id", "layer_id", "step_idx", "seq_len_current", "selected_token_pos", "engine_step")
    return sorted(tuple(json.loads(line)[key] for key in keys) for line in lines)


def test_generate_over_two_ranks_says_and_traces_what_one_does(
    environ: dict[str, str],
    small_checkpoint: Path,
    prompts_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["generate", "--ckpt-path", small_checkpoint, "--input-file", prompts_file, "--json", *OPTIONS]
    command += ["--batch-size", 3, "--trace-enable", "--trace-out"]
    assert run([*map(str, command), str(tmp_path / "one")]) == 0
    ranks = start(environ | {"MP": "2"}, *command, tmp_path / "two")
    out, err = ranks.communicate()
    assert ranks.returncode == 0, err
    assert token_ids(out) == token_ids(capsys.readouterr().out)
    assert facts(tmp_path / "two") == facts(tmp_path / "one")
    assert len(facts(tmp_path / "two")) == 6 * 5 * 3
    meta = json.loads((tmp_path / "two" / "block64" / "run_meta.json").read_text())
    assert (meta["world_size"], meta["rank"]) == (2, 0)
    assert [line.split()[0] for line in err.splitlines()[:3]] == ["starting", "loading", "model"]
    assert err.count("loading") == 1  # the other rank says nothing
    assert not list(tmp_path.glob("dsakv-ranks-*"))


def test_bench_over_two_ranks_generates_what_one_does(
    environ: dict[str, str], small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command: list[object] = ["bench", "--ckpt-path", small_checkpoint, "--input-len", 20, "--rounds", 2, "--json"]
    command += [*OPTIONS, "--num-prompts", 3, "--batch-size", 2]
    assert run([*map(str, command), "--out-json", str(tmp_path / "alone.json")]) == 0
    alone = json.loads(capsys.readouterr().out)
    ranks = start(environ, *command, "--out-json", tmp_path / "ranks.json", "--model-parallel", 2)
    out, err = ranks.communicate()
    assert ranks.returncode == 0, err
    shared = json.loads(out)
    assert {one["output_digest"] for one in (*alone["rounds"], *shared["rounds"])} == {
        alone["rounds"][0]["output_digest"]
    }
    assert shared["rounds"][0]["output_tokens"] == 3 * 6
    assert (alone["machine"]["ranks"], shared["machine"]["ranks"]) == (1, 2)


def test_a_chat_goes_on_over_ranks_until_it_ends(environ: dict[str, str]) -> None:
    """That /exit ends a chat as the end of input does, a single process shows: the ranks are told the same then."""
    command = ["generate", "--interactive", "--model-parallel", 2, *OPTIONS]
    ranks = start(environ, *command, stdin=subprocess.PIPE, errors="replace")
    said, err = ranks.communicate("hello\n\n/clear\nhello\nmore\n")
    assert ranks.returncode == 0, err
    assert err.count("tokens/s") == 3
    first, second, _ = said.splitlines()
    assert first == second  # /clear has begun anew


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"the command ended without saying {text}")


def workers(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    children = psutil.Process(process.pid).children()
    return {int(child.environ()["RANK"]): child for child in children if "dsakv.worker" in child.cmdline()}


@pytest.fixture
def long_run(environ: dict[str, str], tmp_path: Path) -> subprocess.Popen[str]:
    """A trace over two ranks that would go on for minutes, at work."""
    command = ["trace", "ruler", "--tasks", "vt", "--limit", 60, "--context-length", 2048, "--model-parallel", 2]
    process = start(environ, *command, "--trace-out", tmp_path / "run")
    wait_for(process, "tracing into")
    return process


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_the_run(victim: int, long_run: subprocess.Popen[str]) -> None:
    ranks = workers(long_run)
    assert ranks.keys() == {0, 1}
    ranks[victim].send_signal(signal.SIGKILL)
    out, err = long_run.communicate()
    assert (long_run.returncode, out) == (1, "")
    error, hint = err.splitlines()[-2:]
    assert error == f"error: rank {victim} died: signal SIGKILL"
    assert not any(rank.is_running() for rank in ranks.values())
    if victim == 1:
        found = re.fullmatch(r"hint: its log is (.*)", hint)
        assert found
        assert Path(found[1]).is_file()
        folder = next(path for path in Path(found[1]).parents if path.name.startswith("dsakv-ranks-"))
        assert not (folder / "config.json").exists()  # which may hold the password of a remote pool
    assert "Traceback" not in err


def test_ctrl_c_leaves_a_run_to_resume(long_run: subprocess.Popen[str], tmp_path: Path) -> None:
    ranks = workers(long_run)
    long_run.send_signal(signal.SIGINT)
    out, err = long_run.communicate()
    assert (long_run.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted"
    assert err.count("interrupted") == 1
    assert "Traceback" not in err
    assert not any(rank.is_running() for rank in ranks.values())
    assert (tmp_path / "run" / "block64" / "run_meta.json").is_file()
    assert not list(tmp_path.glob("dsakv-ranks-*"))


def test_an_error_is_said_once(environ: dict[str, str]) -> None:
    ranks = start(environ, "generate", "--prompt", "hello", "--model-parallel", 3)
    out, err = ranks.communicate()
    assert (ranks.returncode, out) == (2, "")
    error, hint = err.splitlines()[-2:]
    assert "n_routed_experts 8 does not divide among 3 ranks" in error
    assert hint == "hint: use fewer ranks"
    assert err.count("error:") == 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_two_machines_meet(environ: dict[str, str]) -> None:
    command = ["generate", "--prompt", "hello", "--json", *OPTIONS, "--model-parallel", 2, "--nnodes", 2]
    command += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--node-rank"]
    machines = [start(environ, *command, number) for number in (0, 1)]
    said = [machine.communicate() for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert len(token_ids(said[0][0])[0]) == 6
    assert said[1][0] == ""
    assert said[1][1].startswith("starting 1 rank, waiting for the other machines at 127.0.0.1:")


def test_slurm_starts_the_ranks_itself(environ: dict[str, str]) -> None:
    port = str(free_port())
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1", "MASTER_PORT": port}
    tasks = [
        start(environ | step | {"SLURM_PROCID": str(rank)}, "generate", "--prompt", "hello", "--json", *OPTIONS)
        for rank in (0, 1)
    ]
    said = [task.communicate() for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert len(token_ids(said[0][0])[0]) == 6
    assert said[1] == ("", "")


def test_a_task_whose_rank_0_fails_says_nothing(environ: dict[str, str]) -> None:
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1", "MASTER_PORT": str(free_port())}
    tasks = [
        start(
            environ | step | {"SLURM_PROCID": str(rank)},
            *("generate", "--prompt", "x" * 70_000, "--json", *OPTIONS),
        )
        for rank in (0, 1)
    ]
    said = [task.communicate() for task in tasks]
    assert [task.returncode for task in tasks] == [2, PEER_LOST]
    assert "exceeds the limit" in said[0][1]
    assert said[1] == ("", "")
