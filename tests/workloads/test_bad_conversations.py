"""Bad input of the text workloads from the command line: message, hint, exit code, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from dsakv.cli import run

LONG = {
    **dict.fromkeys(("_id", "domain", "sub_domain", "difficulty", "length", "question", "context"), "x"),
    **{f"choice_{letter}": letter for letter in "ABCD"},
    "answer": "A",
}
TALK = {"id": "t", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}


def lines(*rows: object) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


class Case(NamedTuple):
    """A command line, the file ``in`` that it reads, and what it says."""

    command: str
    content: str | bytes | None
    message: str


SHAREGPT = "sharegpt --sharegpt-json in"
LONGBENCH = "longbenchv2 --longbenchv2-data in"
FILE = "file in"

CASES = [
    Case("file", None, "no file is named"),
    Case(FILE, None, "no such file: in"),
    Case("file ~nobodyhere/in", None, "no such file: ~nobodyhere/in"),
    Case("sharegpt --sharegpt-json ~nobodyhere/in", None, "no such file: ~nobodyhere/in"),
    Case(f"{FILE} --preset in", "a=" + "[" * 5000, "preset in is no TOML"),
    Case(f"{FILE} --preset in", "[serving]\nkv_blocks=" + "9" * 5000, "preset in is no TOML"),
    Case(f"{FILE} --preset in", '[burstgpt]\ncsv = "a\\u0000b"', "[burstgpt] csv holds a NUL character"),
    Case(SHAREGPT, None, "no such file: in"),
    Case("sharegpt --sharegpt-json model", None, "model is no regular file"),
    Case(f"{SHAREGPT} --sharegpt-turn-mode every", "", "--sharegpt-turn-mode must be "),
    Case(f"{FILE} more", "", "more"),
    Case(f"{FILE} --max-new-tokens-cap 3", "", "--max-new-tokens-cap"),
    *(Case(f"{name}", "\n", "in is empty") for name in (SHAREGPT, FILE)),
    Case(LONGBENCH, "[]", "no prompt is left to run"),
    # a row that is none
    *(
        Case(command, "[" + json.dumps(good) + ", " + bad + "]", f"in#1: {message}")
        for command, good, message in ((SHAREGPT, TALK, "no object"), (LONGBENCH, LONG, "no question of LongBench v2"))
        for bad in ("3", "null")
    ),
    *(
        Case(command, json.dumps(good) + "\n\n" + bad, f"in:3: {message}")
        for command, good, message in ((SHAREGPT, TALK, "no "), (LONGBENCH, LONG, "no question of LongBench v2"))
        for bad in ("{", "[]")
    ),
    *(Case(command, "[{}, {", "in is no JSON: Input data was truncated") for command in (SHAREGPT, LONGBENCH)),
    # ShareGPT
    Case(SHAREGPT, lines(TALK, {"id": "x"}), "in:2: no `conversations` or `messages`"),
    Case(
        SHAREGPT,
        lines({"conversations": [{"from": "human", "value": 3}]}),
        "in:1: message 0 lacks a role, or its text is none",
    ),
    Case(SHAREGPT, lines({"conversations": "q"}), "in:1: no `conversations` or `messages`"),
    Case(SHAREGPT, b'{"conversations": [{"from": "human", "value": "\xff"}]}', "in:1: no JSON"),
    Case(SHAREGPT, lines({"messages": [{"role": "nurse", "content": "x"}]}), "1 dropped: unknown role 'nurse'"),
    Case(f"{SHAREGPT} --max-new-tokens 509", lines(TALK), "1 dropped: no room beside the chat template"),
    Case(f"{SHAREGPT} --max-new-tokens 512", lines(TALK), "--max-new-tokens 512 leaves no room"),
    # LongBench v2
    *(
        Case(LONGBENCH, lines(LONG, row), f"in:2: no question of LongBench v2: {message}")
        for row, message in (
            (
                {key: value for key, value in LONG.items() if key != "context"},
                "Object missing required field `context`",
            ),
            (LONG | {"answer": "E"}, "Invalid enum value 'E'"),
            (LONG | {"answer": None}, "Expected `str`, got `null`"),
            (LONG | {"choice_B": 4}, "Expected `str`, got `int` - at `$.choice_B`"),
            (LONG | {"_id": 4}, "Expected `str`, got `int` - at `$._id`"),
        )
    ),
    # requests of one's own
    *(
        Case(FILE, b'{"prompt": "good"}\n\n' + (row if isinstance(row, bytes) else row.encode()), message)
        for row, message in (
            ('{"prompt": "cut', "in:3: Input data was truncated"),
            ("hello", "in:3: JSON is malformed"),
            ('["a"]', "in:3: Expected `object`, got `array`"),
            (b'{"prompt": "\xff"}', "in:3: 'utf-8' codec can't decode"),
            ('{"prompt": "\\ud800 and more"}', "in:3: a text holds \\ud800, half of a surrogate pair"),
            ("{}", "in:3 has none of prompt, messages and prompt_token_ids"),
            ('{"prompt": "a", "messages": []}', "in:3 has prompt and messages of"),
            ('{"prompt": ""}', "in:3: the prompt is empty"),
            ('{"messages": []}', "in:3: the prompt is empty"),
            ('{"prompt_token_ids": []}', "in:3: the prompt is empty"),
            ('{"messages": [{"role": "nurse", "content": "x"}]}', "in:3: the checkpoint's chat template refuses"),
            ('{"prompt_token_ids": [1, 260]}', "prompt in:3 holds token 260, the vocabulary has 260"),
            ('{"prompt_token_ids": [-1]}', "prompt in:3 holds token -1, the vocabulary"),
            ('{"prompt_token_ids": [1.5]}', "in:3: Expected `int`, got `float`"),
            ('{"prompt": "a", "arrival_s": -1}', "in:3: Expected `float` >= 0.0 - at `$.arrival_s`"),
            ('{"prompt": "a", "arrival_s": 1e999}', "in:3: Number out of range"),
            ('{"prompt": "a", "arrival_s": NaN}', "in:3: JSON is malformed"),
            ('{"prompt": "a", "arrival_s": "1"}', "in:3: Expected `float | null`, got `str`"),
            ('{"prompt": "a", "max_new_tokens": 0}', "in:3: Expected `int` >= 1"),
            ('{"prompt": "a", "max_new_tokens": 512}', "in:3: --max-new-tokens 512 leaves no room"),
            ('{"prompt": "a", "completion": ["b"]}', "in:3: Expected `str | null`, got `array`"),
        )
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.command} {str(case.content)[-50:]}")
def test_what_users_get_wrong(
    case: Case,
    small_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in os.environ:
        if name.startswith(("DSAKV_", "DS_TRACE_")) or name in ("CKPT_PATH", "CONFIG", "LIMIT"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_checkpoint, "model")
    if case.content is not None:
        Path("in").write_bytes(case.content.encode() if isinstance(case.content, str) else case.content)
    base = ["--ckpt-path", "model", "--device", "cpu", "--trace-out", "out", "--max-new-tokens", "4"]
    name, *options = case.command.split()
    assert run(["trace", name, *base, *options]) == 2
    error, hint = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert case.message in error
    assert hint.startswith("hint: ")
    assert not Path("out").exists()
