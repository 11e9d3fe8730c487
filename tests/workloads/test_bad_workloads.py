"""Bad traces and texts through the command line: one line of error, one of hint, exit code, nothing written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest

from dsakv.cli import run

HEADER = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
ROW = "5,ChatGPT,20,3,23,API log\n"
LINE = '{"timestamp": 0, "input_length": 20, "output_length": 3, "hash_ids": [0]}\n'
BURST = "trace burstgpt --burstgpt-csv in --trace-out out --device cpu"
MOON = "trace mooncake --mooncake-jsonl in --trace-out out --device cpu"
RULER = "trace ruler --tasks niah_single_2 --context-length 1024 --trace-out out --device cpu"


class Case(NamedTuple):
    """A command line in a folder with the file ``in``; without content it is not there."""

    command: str
    message: str
    content: str | bytes | None = None


def burst(row: str, message: str) -> Case:
    return Case(BURST, f"in:3: {message}", HEADER + ROW + row)


def moon(line: str, message: str) -> Case:
    return Case(MOON, f"in:2: {message}", LINE + line)


def counts(input_length: object = 20, output_length: object = 3, timestamp: object = 0, ids: object = [0]) -> str:
    return (
        f'{{"timestamp": {timestamp}, "input_length": {input_length}, '
        f'"output_length": {output_length}, "hash_ids": {ids}}}'
    )


CASES = {
    "burstgpt: no file": Case(BURST, "no such file: in"),
    "burstgpt: folder": Case(BURST.replace(" in ", " . "), ". is no regular file"),
    "burstgpt: nothing given": Case(BURST.replace(" --burstgpt-csv in", ""), "no BurstGPT trace is given"),
    "burstgpt: empty": Case(BURST, "in is empty", ""),
    "burstgpt: other columns": Case(
        BURST, "has no column 'Request tokens', 'Response tokens'", "Timestamp,Model\n1,x\n"
    ),
    "burstgpt: other CSV": Case(BURST, "in has no column", "a,b\n1,2\n"),
    "burstgpt: header alone": Case(BURST, "in holds no request to run (it has no rows)", HEADER),
    "burstgpt: failures alone": Case(
        BURST, "in holds no request to run (2 dropped: failed in the trace", HEADER + "1,m,0,0,0,x\n2,m,5,0,5,x\n"
    ),
    "burstgpt: not UTF-8": Case(BURST, "in is not UTF-8", HEADER.encode() + b"5,Chat\xff,20,3,23,API log\n"),
    "burstgpt: open quote": Case(BURST, "not CSV", HEADER + '5,"Chat,20,3,23,API log\n'),
    "burstgpt: short row": burst("5,ChatGPT,20,3\n", "4 values where the first line names 6"),
    "burstgpt: long row": burst("5,ChatGPT,20,3,23,API log,\n", "7 values where the first line names 6"),
    "burstgpt: word": burst("5,ChatGPT,many,3,23,API log\n", "'many' is no number of tokens"),
    "burstgpt: blank": burst("5,ChatGPT,,3,23,API log\n", "'' is no number of tokens"),
    "burstgpt: negative": burst("5,ChatGPT,20,-3,23,API log\n", "'-3' is no number of tokens"),
    "burstgpt: half": burst("5,ChatGPT,20.5,3,23,API log\n", "'20.5' is no number of tokens"),
    "burstgpt: huge": burst("5,ChatGPT,1e30,3,23,API log\n", "'1e30' is no number of tokens"),
    "burstgpt: NaN": burst("nan,ChatGPT,20,3,23,API log\n", "'nan' is no number of seconds"),
    "burstgpt: infinite": burst("1e999,ChatGPT,20,3,23,API log\n", "'1e999' is no number of seconds"),
    "burstgpt: before time": burst("-1,ChatGPT,20,3,23,API log\n", "'-1' is no number of seconds"),
    "burstgpt: underscore": burst("5,ChatGPT,2_0,3,23,API log\n", "'2_0' is no number of tokens"),
    "azure: no date": Case(
        BURST, "in:2: '12.5' is no date and time", "TIMESTAMP,ContextTokens,GeneratedTokens\n12.5,3,4\n"
    ),
    "azure: month 13": Case(
        BURST, "in:2: time data", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-13-16 18:17:03.9,3,4\n"
    ),
    "mooncake: no file": Case(MOON, "no such file: in"),
    "mooncake: nothing given": Case(MOON.replace(" --mooncake-jsonl in", ""), "no Mooncake trace is given"),
    "mooncake: empty": Case(MOON, "in is empty", "\n"),
    "mooncake: failures alone": Case(MOON, "(1 dropped: failed in the trace", counts(output_length=0)),
    "mooncake: no JSON": moon("{hidden", "not a row of a Mooncake trace"),
    "mooncake: not UTF-8": Case(MOON, "in:1: not a row of a Mooncake trace", b'{"timestamp": "\xff"}'),
    "mooncake: missing": moon('{"timestamp": 1}', "not a row of a Mooncake trace: Object missing required field"),
    "mooncake: text": moon(counts(input_length='"20"'), "not a row of a Mooncake trace: Expected `int`, got `str`"),
    "mooncake: half": moon(counts(input_length=20.5), "not a row of a Mooncake trace: Expected `int`, got `float`"),
    "mooncake: truth": moon(counts(input_length="true"), "not a row of a Mooncake trace: Expected `int`, got `bool`"),
    "mooncake: negative": moon(counts(output_length=-1), "not a row of a Mooncake trace: Expected `int` >= 0"),
    "mooncake: huge": moon(counts(output_length=10**30), "not a row of a Mooncake trace: Expected `int` <="),
    "mooncake: before time": moon(counts(timestamp=-1), "not a row of a Mooncake trace: Expected"),
    "mooncake: endless time": moon(counts(timestamp="1e999"), "not a row of a Mooncake trace"),
    "mooncake: negative id": moon(counts(ids=[-1]), "not a row of a Mooncake trace: Expected `int` >= 0"),
    "mooncake: few ids": moon(counts(input_length=513), "1 hash_ids for 513 tokens, which are 2 blocks"),
    "mooncake: many ids": moon(counts(ids=[0, 1]), "2 hash_ids for 20 tokens, which are 1 blocks"),
    "corpus: no file": Case(f"{RULER} --corpus none", "no such file: none"),
    "corpus: folder": Case(f"{RULER} --corpus .", ". is no regular file"),
    "corpus: short": Case(f"{RULER} --corpus in", "the corpus in has only 5 characters", "short"),
    "corpus: no words": Case(f"{RULER} --corpus in", "has only 2 words", "x" * 3000 + " " + "y" * 3000),
    "corpus: burstgpt": Case(f"{BURST} --corpus none", "no such file: none", HEADER + ROW),
    "corpus: mooncake": Case(f"{MOON} --corpus in", "the corpus in has only", LINE),
    "arrival: no rate": Case(f"{BURST} --arrival poisson", "--arrival poisson needs a rate", HEADER + ROW),
    "arrival: idle rate": Case(
        f"{BURST} --request-rate 3", "--request-rate does nothing with --arrival auto (trace", HEADER + ROW
    ),
    "arrival: unknown": Case(f"{BURST} --arrival poison", "--arrival", HEADER + ROW),
    "no forced answers": Case(f"{BURST} --forced", "No such option: --forced", HEADER + ROW),
    "no new tokens": Case(f"{MOON} --max-new-tokens 3", "No such option: --max-new-tokens", LINE),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, message, content = CASES[name]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("in").write_bytes(content.encode() if isinstance(content, str) else content)
    assert run(command.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    error, hint = (next(line for line in lines if line.startswith(f"{label}: ")) for label in ("error", "hint"))
    assert message in error
    assert len(hint) > len("hint: ")
    assert not any("Traceback" in line for line in lines)
    assert not Path("out").exists()


@pytest.mark.parametrize("command", [BURST, MOON, f"{BURST} --corpus pipe", f"{RULER} --corpus pipe"])
def test_a_pipe_is_no_file(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody writes into it: reading would never end."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    if "--corpus" in command:
        Path("in").write_text(HEADER + ROW)
    else:
        command = command.replace(" in ", " pipe ")
    assert run(command.split()) == 2
    assert "error: pipe is no regular file" in capsys.readouterr().err
    assert not Path("out").exists()
