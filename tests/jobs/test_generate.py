"""`dsakv generate` from the command line: prompts of every kind, text and JSON, a chat, with and without a trace."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dsakv.cli import run
from dsakv.tokenizer import Tokenizer, load_tokenizer
from dsakv.trace.validate import validate

FIELDS = ["request_id", "prompt_tokens", "token_ids", "text", "finish_reason", "ttft_ms", "tpot_ms"]
NEW = 15
TEXTS = ["short", "two\nlines, and more tokens than the indexer selects", "ünïcödé \U0001f980 " * 8, "x" * 200]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("DSAKV_", "DS_TRACE_")) or name in ("CKPT_PATH", "CONFIG", "LIMIT"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def tokenizer(small_checkpoint: Path) -> Tokenizer:
    return load_tokenizer(small_checkpoint)


class Shell:
    """Runs `dsakv generate` on a checkpoint."""

    def __init__(self, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._checkpoint = checkpoint
        self._capsys = capsys
        self.err = ""

    def __call__(self, *options: object, code: int = 0) -> str:
        """What a run leaves on stdout."""
        start = ["generate", "--ckpt-path", str(self._checkpoint), "--device", "cpu", "--max-new-tokens", str(NEW)]
        assert run([*start, *map(str, options)]) == code
        caught = self._capsys.readouterr()
        self.err = caught.err
        return caught.out

    def json(self, *options: object) -> list[dict[str, Any]]:
        """The JSON lines of a run, by request."""
        found = [json.loads(line) for line in self(*options, "--json").split("\n")[:-1]]
        return sorted(found, key=lambda line: int(line["request_id"]))


@pytest.fixture
def generate(small_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(small_checkpoint, capsys)


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Prompts of every kind."""
    return jsonl(
        tmp_path / "mixed.jsonl",
        {"prompt": TEXTS[0], "request_id": "mine"},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXTS[1]}]},
        {"prompt_token_ids": [65, 66, 259, 0] * 30},
        {"prompt": TEXTS[3], "messages": None, "comment": "another key"},
    )


def test_json_lines(generate: Shell, mixed: Path, tokenizer: Tokenizer) -> None:
    out = generate("--input-file", mixed, "--batch-size", 3, "--json")
    lines = [json.loads(line) for line in out.split("\n")[:-1]]  # text may hold what splitlines() splits at
    assert out == "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
    assert sorted(line["request_id"] for line in lines) == [0, 1, 2, 3]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXTS[1]}]
    prompts = [
        tokenizer.encode_prompt(TEXTS[0]),
        tokenizer.encode_messages(messages),
        [65, 66, 259, 0] * 30,
        tokenizer.encode_prompt(TEXTS[3]),
    ]
    for line in lines:
        assert list(line) == FIELDS
        assert line["prompt_tokens"] == len(prompts[line["request_id"]])
        assert line["text"] == tokenizer.decode(line["token_ids"])
        assert line["ttft_ms"] > 0
        assert line["tpot_ms"] > 0
        assert (len(line["token_ids"]) == NEW) == (line["finish_reason"] == "length")
    assert "warning: the model's weights are random" in generate.err


def test_one_token_has_no_time_per_output_token(generate: Shell) -> None:
    (line,) = generate.json("--prompt", "hello", "--max-new-tokens", 1)
    assert line["tpot_ms"] is None
    assert len(line["token_ids"]) <= 1


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_tokens_do_not_depend_on_batch_or_trace(
    generate: Shell, mixed: Path, tmp_path: Path, temperature: float
) -> None:
    def tokens(*options: object) -> list[tuple[list[int], str]]:
        found = generate.json("--input-file", mixed, "--temperature", temperature, *options)
        return [(line["token_ids"], line["finish_reason"]) for line in found]

    expected = tokens()
    assert len(expected) == 4
    for batch_size in (1, 3):
        assert tokens("--batch-size", batch_size) == expected
        for further in ([], ["--trace-store-scores", "--prefill-tail", "4"]):
            out = tmp_path / f"{batch_size}{len(further)}"
            traced = ["--batch-size", batch_size, "--trace-enable", "--trace-out", out, "--kv-block-size", 16]
            assert tokens(*traced, *(option.replace("--prefill", "--trace-prefill") for option in further)) == expected
            report = validate(out / "block16")
            assert report.requests == 4
            log = [json.loads(line) for line in (out / "requests.jsonl").read_bytes().splitlines()]
            assert {entry["request_id"]: entry["source_id"] for entry in log} == {0: "mine", 1: "", 2: "", 3: ""}
            for name in ("run_meta.json", "summary.json"):
                stored = json.loads((out / "block16" / name).read_text())
                assert stored["inputs"] == {"kept": 4, "truncated": 0, "dropped": {}}


def test_seeds(generate: Shell) -> None:
    def tokens(seed: int) -> Any:
        return generate.json("--prompt", "hello", "--temperature", 1, "--seed", seed)[0]["token_ids"]

    assert tokens(1) == tokens(1) != tokens(2)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_streamed_text_is_the_decoded_completions_in_the_order_of_the_prompts(
    generate: Shell, mixed: Path, batch_size: int
) -> None:
    options = ["--input-file", mixed, "--seed", 5, "--batch-size", batch_size]
    texts = [line["text"] for line in generate.json(*options)]
    assert generate(*options) == "\n\n".join(texts) + "\n"
    assert generate.err.splitlines()[-1].endswith("tokens/s)")


def test_one_prompt(generate: Shell, tmp_path: Path) -> None:
    (line,) = generate.json("--prompt", TEXTS[2])
    assert generate("--prompt", TEXTS[2]) == line["text"] + "\n"
    assert generate("--input-file", jsonl(tmp_path / "one.jsonl", {"prompt": TEXTS[2]})) == line["text"] + "\n"


@pytest.mark.parametrize(
    "text",
    [
        "\n\n".join(TEXTS),
        "\n \t\n\n" + "\n\n\n \n".join(TEXTS) + "\n\n\n",
        "\ufeff" + "\r\n\r\n".join(TEXTS) + "\r\n",
    ],
)
def test_a_text_file_is_split_at_blank_lines(generate: Shell, tmp_path: Path, text: str) -> None:
    expected = generate.json("--input-file", jsonl(tmp_path / "p.jsonl", *({"prompt": text} for text in TEXTS)))
    (tmp_path / "p.txt").write_text(text, encoding="utf-8", newline="")
    found = generate.json("--input-file", tmp_path / "p.txt")
    for line in (*expected, *found):
        del line["ttft_ms"], line["tpot_ms"]
    assert found == expected


def test_the_end_of_sequence_is_left_out(
    generate: Shell, mixed: Path, small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every token of a free run, made an end of sequence, cuts the run where it first appears."""
    free = generate.json("--input-file", mixed, "--temperature", 0)
    copy = tmp_path / "model"
    shutil.copytree(small_checkpoint, copy)
    for stop in (free[0]["token_ids"][6], free[2]["token_ids"][0], free[3]["token_ids"][-1]):
        (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
        stopping = Shell(copy, capsys)
        found = stopping.json("--input-file", mixed, "--temperature", 0, "--batch-size", 2)
        for line, whole in zip(found, free, strict=True):
            tokens = whole["token_ids"]
            assert whole["finish_reason"] == "length"
            assert line["finish_reason"] == ("stop" if stop in tokens else "length")
            assert line["token_ids"] == (tokens[: tokens.index(stop)] if stop in tokens else tokens)
        texts = [line["text"] for line in found]
        assert stopping("--input-file", mixed, "--temperature", 0) == "\n\n".join(texts) + "\n"


def test_a_prompt_too_long_is_refused_and_leaves_nothing(generate: Shell, tmp_path: Path) -> None:
    rows = [{"prompt_token_ids": [1] * (512 - NEW)}, {"prompt_token_ids": [1] * (513 - NEW)}]
    out = tmp_path / "run"
    path = jsonl(tmp_path / "p.jsonl", *rows)
    assert generate("--input-file", path, "--json", "--trace-enable", "--trace-out", out, code=2) == ""
    error, hint = generate.err.splitlines()[-2:]
    assert error == "error: prompt 1 has 498 tokens; with 15 new ones it exceeds the limit of 512"
    assert hint.startswith("hint: shorten the prompt")
    assert not out.exists()
    assert len(generate.json("--input-file", jsonl(path, rows[0]), "--trace-enable", "--trace-out", out)) == 1


def test_the_default_folder_of_a_trace(generate: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generate("--prompt", "hello", "--trace-enable")
    (out,) = (tmp_path / "outputs").iterdir()
    assert out.name.startswith("generate_")
    assert f"next: dsakv analyze --input outputs/{out.name}" in generate.err
    assert json.loads((out / "block64" / "run_meta.json").read_text())["dataset"] == "generate"
    assert json.loads((out / "config.json").read_text())["generate"]["prompt"] == "hello"


# The chat


class Keyboard(io.StringIO):
    """Input that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def chat(generate: Shell, monkeypatch: pytest.MonkeyPatch, typed: io.TextIOBase, *options: object) -> str:
    monkeypatch.setattr("sys.stdin", typed)
    return generate("--interactive", "--temperature", 0, *options)


def replies(generate: Shell, tmp_path: Path, *turns: str) -> list[str]:
    """The model's replies in one conversation, each asked for with the whole conversation so far."""
    messages: list[dict[str, str]] = []
    said = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        path = jsonl(tmp_path / "conversation.jsonl", {"messages": messages})
        said.append(generate.json("--input-file", path, "--temperature", 0)[0]["text"])
        messages.append({"role": "assistant", "content": said[-1]})
    return said


def test_a_chat_goes_on_until_it_is_cleared(generate: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = replies(generate, tmp_path, "hello", "and then?")
    (alone,) = replies(generate, tmp_path, "and then?")
    assert alone != second
    typed = io.StringIO("hello\n\n  \nand then?\n/clear\nand then?\n /exit \nnever read\n")
    assert chat(generate, monkeypatch, typed) == f"{first}\n{second}\n{alone}\n"
    assert typed.read() == "never read\n"


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n/exit"])
def test_a_chat_ends_with_its_input(generate: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    (first,) = replies(generate, tmp_path, "hello")
    assert chat(generate, monkeypatch, io.StringIO("hello" + end)) == f"{first}\n"


def test_no_input_is_no_chat(generate: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chat(generate, monkeypatch, io.StringIO()) == ""


def test_the_prompt_of_a_terminal_is_no_data(generate: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = replies(generate, tmp_path, "hello")
    assert chat(generate, monkeypatch, Keyboard("hello\n")) == f"{first}\n"
    assert generate.err.count("> ") == 2
    assert generate.err.endswith("\n")


def test_a_conversation_too_long_can_be_cleared(
    generate: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = replies(generate, tmp_path, "hello")
    typed = io.StringIO("hello\n" + "long " * 120 + "\n/clear\nhello\n")
    assert chat(generate, monkeypatch, typed) == f"{first}\n{first}\n"
    assert "warning: prompt 1 has " in generate.err
    assert "/clear starts over" in generate.err


def test_a_chat_is_traced_turn_by_turn(generate: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    options = ["--trace-enable", "--trace-out", out, "--kv-block-size", 4, "--trace-store-text"]
    chat(generate, monkeypatch, io.StringIO("hello\nand then?\n" + "long " * 120 + "\n"), *options)
    report = validate(out / "block4")
    log = [json.loads(line) for line in (out / "requests.jsonl").read_bytes().splitlines()]
    assert report.requests == len(log) == 2
    assert [entry["prompt"] for entry in log] == ["hello", "and then?"]
    assert not log[0]["prefix_cache_hit"]
    assert log[1]["prefix_cached_blocks"] == log[0]["prompt_tokens"] // 4  # the first prompt comes again
    for name in ("run_meta.json", "summary.json"):
        assert json.loads((out / "block4" / name).read_text())["inputs"]["kept"] == 2


def test_input_that_is_no_utf_8(generate: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello \xff\n"), encoding="utf-8"))
    assert generate("--interactive", code=2) == ""
    error, hint = generate.err.splitlines()[-2:]
    assert error.startswith("error: the input is no UTF-8")
    assert hint.startswith("hint: ")
