"""Prompts for `dsakv generate`, from the command line or a file."""

from __future__ import annotations

import re
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Prompt:
    """One input as it was given, and where it stands."""

    place: str
    line: _Line
    source_id: str = ""


def read_prompts(config: Config) -> list[Prompt]:
    """What ``--prompt`` or ``--input-file`` names, in order; needs no model.

    Raises InputError where the file cannot be read, holds nothing, or a line is not what it should be.
    """
    if config.generate.prompt is not None:
        return [Prompt("--prompt", _Line(prompt=config.generate.prompt))]
    path = Path(str(config.generate.input_file)).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}", "--input-file names a UTF-8 .txt or .jsonl file") from error
    if path.suffix == ".jsonl":
        prompts = [_parse(line, f"{path}:{number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    elif path.suffix == ".txt":
        blocks = [block.strip("\r\n") for block in re.split(r"\n[ \t\r]*\n", text) if block.strip()]
        prompts = [Prompt(str(path), _Line(prompt=block)) for block in blocks]
    else:
        raise InputError(f"{path} is neither .txt nor .jsonl", "rename it after what it holds")
    if not prompts:
        raise InputError(f"{path} holds no prompt", "put prompts in, one a paragraph (.txt) or a line (.jsonl)")
    return prompts


def _parse(text: str, place: str) -> Prompt:
    try:
        raw: dict[str, Any] = msgspec.json.decode(text, type=dict)
        line = msgspec.convert(raw, _Line)
    except msgspec.DecodeError as error:
        raise InputError(
            f"{place}: {error}", "a line is a JSON object with prompt, messages or prompt_token_ids"
        ) from error
    given = [name for name in _Line.__struct_fields__ if getattr(line, name) is not None]
    if len(given) != 1:
        raise InputError(
            f"{place} has {' and '.join(given) or 'none'} of prompt, messages and prompt_token_ids", "give one of them"
        )
    if not getattr(line, given[0]):
        raise InputError(f"{place}: the prompt is empty", "remove the line or fill it")
    return Prompt(place, line, str(raw.get("request_id", "")))


def to_requests(prompts: list[Prompt], config: Config, loaded: LoadedModel) -> list[Request]:
    """The prompts as the model sees them. Raises InputError where its tokenizer or chat template refuses one."""
    requests = []
    for request_id, prompt in enumerate(prompts):
        try:
            ids = _encode(prompt.line, loaded)
        except InputError as error:
            raise InputError(f"{prompt.place}: {error.message}", error.hint) from error
        new_tokens = config.engine.max_new_tokens
        requests.append(Request(request_id, ids, new_tokens, prompt.source_id, prompt.line.prompt))
    return requests


def _encode(line: _Line, loaded: LoadedModel) -> list[int]:
    if line.prompt is not None:
        return loaded.tokenizer.encode_prompt(line.prompt)
    if line.messages is not None:
        return loaded.tokenizer.encode_messages([{"role": m.role, "content": m.content} for m in line.messages])
    return list(line.prompt_token_ids or [])
