"""Prompts for `dsakv generate`, from the command line or a file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from dsakv.config import Config
from dsakv.errors import InputError
from dsakv.jobs.model import LoadedModel
from dsakv.request import Request


class Message(Struct, frozen=True):
    role: str
    content: str


class _Line(Struct, frozen=True):
    """A line of a ``.jsonl`` input; exactly one of the three must be there, other keys are left alone."""

    prompt: str | None = None
    messages: list[Message] | None = None
    prompt_token_ids: list[int] | None = None


def read_requests(config: Config, loaded: LoadedModel) -> list[Request]:
    """Requests of ``--prompt`` or ``--input-file``, numbered in order.

    Raises InputError where the file cannot be read, holds nothing, or a line is not what it should be.
    """
    if config.generate.prompt is not None:
        return [_request(0, loaded.tokenizer.encode_prompt(config.generate.prompt), config, "", config.generate.prompt)]
    path = Path(str(config.generate.input_file)).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}", "--input-file names a UTF-8 .txt or .jsonl file") from error
    if path.suffix == ".jsonl":
        requests = list(_from_jsonl(text, path, config, loaded))
    elif path.suffix == ".txt":
        blocks = [block for block in re.split(r"\n[ \t\r]*\n", text) if block.strip()]
        requests = [
            _request(i, loaded.tokenizer.encode_prompt(b.strip("\r\n")), config, "", b) for i, b in enumerate(blocks)
        ]
    else:
        raise InputError(f"{path} is neither .txt nor .jsonl", "rename it after what it holds")
    if not requests:
        raise InputError(f"{path} holds no prompt", "put prompts in, one a paragraph (.txt) or a line (.jsonl)")
    return requests


def _from_jsonl(text: str, path: Path, config: Config, loaded: LoadedModel) -> Iterator[Request]:
    request_id = 0
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            raw: dict[str, Any] = msgspec.json.decode(line, type=dict)
            item = msgspec.convert(raw, _Line)
        except msgspec.DecodeError as error:
            raise InputError(
                f"{place}: {error}", "a line is a JSON object with prompt, messages or prompt_token_ids"
            ) from error
        given = [name for name in _Line.__struct_fields__ if getattr(item, name) is not None]
        if len(given) != 1:
            raise InputError(
                f"{place} has {' and '.join(given) or 'none'} of prompt, messages and prompt_token_ids",
                "give one of them",
            )
        if not getattr(item, given[0]):
            raise InputError(f"{place}: the prompt is empty", "remove the line or fill it")
        try:
            if item.prompt is not None:
                ids = loaded.tokenizer.encode_prompt(item.prompt)
            elif item.messages is not None:
                ids = loaded.tokenizer.encode_messages([{"role": m.role, "content": m.content} for m in item.messages])
            else:
                ids = list(item.prompt_token_ids or [])
        except InputError as error:
            raise InputError(f"{place}: {error.message}", error.hint) from error
        yield _request(request_id, ids, config, str(raw.get("request_id", "")), item.prompt)
        request_id += 1


def _request(request_id: int, ids: list[int], config: Config, source_id: str, text: str | None) -> Request:
    return Request(request_id, ids, config.engine.max_new_tokens, source_id=source_id, prompt=text)
