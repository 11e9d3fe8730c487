"""Requests of one's own: every kind of line, and every bad one with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsakv.config import Config, EngineConfig, FileConfig, WorkloadConfig
from dsakv.errors import InputError
from dsakv.request import Request
from dsakv.tokenizer import Tokenizer
from dsakv.workloads import build


def requests(path: Path, tokenizer: Tokenizer, max_seq_len: int = 512, **options: Any) -> list[Request]:
    config = Config(
        file=FileConfig(path=str(path)), workload=WorkloadConfig(**options), engine=EngineConfig(max_new_tokens=6)
    )
    return list(build("file", config).requests(tokenizer, max_seq_len))


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return path


def test_every_kind_of_line(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "v"}]
    path = write(
        tmp_path / "own.jsonl",
        {"prompt": "hello", "completion": " there", "arrival_s": 7.5, "more": 1},
        {"messages": chat, "max_new_tokens": 3, "arrival_s": 5, "id": 0},
        {"prompt_token_ids": [1, 2, 3], "request_id": "mine", "arrival_s": 9},
    )
    first, second, third = requests(path, byte_tokenizer)
    assert first.prompt_token_ids == byte_tokenizer.encode_prompt("hello")
    assert (first.completion, first.max_new_tokens, first.source_id) == (" there", 6, f"{path}:1")
    assert second.prompt_token_ids == byte_tokenizer.encode_messages(chat)
    assert (second.completion, second.max_new_tokens, second.source_id) == (None, 3, "0")
    assert (third.prompt_token_ids, third.source_id) == ([1, 2, 3], "mine")
    assert [r.arrival_s for r in (first, second, third)] == [2.5, 0, 4]


def test_long_prompts_are_cut_to_their_own_room(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    ids = list(range(60))
    path = write(
        tmp_path / "own.jsonl",
        {"prompt_token_ids": ids},
        {"prompt_token_ids": ids, "max_new_tokens": 10},
        {"prompt": "x" * 60},
        {"messages": [{"role": "user", "content": "x" * 60}]},
    )
    found = requests(path, byte_tokenizer, 30, truncate="head")
    assert [len(r.prompt_token_ids) for r in found] == [24, 20, 24, 24]
    assert found[0].prompt_token_ids == ids[-24:]
    assert [r.truncated_tokens for r in found] == [36, 40, 39, 39]
    assert len(requests(path, byte_tokenizer, limit=2)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ', "own.jsonl:2: "),
        ("[1]", "own.jsonl:2: "),
        ('{"prompt": ""}', "own.jsonl:2: the prompt is empty"),
        ('{"prompt_token_ids": []}', "own.jsonl:2: the prompt is empty"),
        ('{"messages": []}', "own.jsonl:2: the prompt is empty"),
        ('{"prompt": "a", "messages": []}', "own.jsonl:2 has prompt and messages"),
        ('{"completion": "a"}', "own.jsonl:2 has none of prompt"),
        ('{"prompt": "a", "arrival_s": -1}', "own.jsonl:2: .*arrival_s"),
        ('{"prompt": "a", "arrival_s": NaN}', "own.jsonl:2: "),
        ('{"prompt": "a", "arrival_s": 1e400}', "own.jsonl:2: "),
        ('{"prompt": "a", "max_new_tokens": 0}', "own.jsonl:2: .*max_new_tokens"),
        ('{"prompt": "a", "completion": 5}', "own.jsonl:2: .*completion"),
        ('{"prompt_token_ids": ["a"]}', "own.jsonl:2: .*prompt_token_ids"),
        ('{"messages": [{"role": "user"}]}', "own.jsonl:2: .*content"),
        ('{"messages": [{"role": "critic", "content": "x"}]}', "own.jsonl:2: .*refuses the messages"),
        ('{"prompt": "a", "max_new_tokens": 512}', "own.jsonl:2: .*leaves no room"),
    ],
)
def test_bad_lines(byte_tokenizer: Tokenizer, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        requests(path, byte_tokenizer)


def test_bad_files(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    with pytest.raises(InputError, match="no such file"):
        requests(path, byte_tokenizer)
    with pytest.raises(InputError, match="no file is named"):
        build("file", Config())
    path.write_text(" \n\n")
    with pytest.raises(InputError, match="is empty"):
        requests(path, byte_tokenizer)
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match=r"own\.jsonl:1: "):
        requests(path, byte_tokenizer)
    path.write_text('[{"prompt": "a"}')
    with pytest.raises(InputError, match="is no JSON"):
        requests(path, byte_tokenizer)
