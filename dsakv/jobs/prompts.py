"""Prompts from the command line or a file, for `dsakv generate` and `dsakv bench`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from dsakv.config import Config
from dsakv.errors import InputError
from dsakv.jobs.loaded import LoadedModel
from dsakv.request import Request
from dsakv.workloads.prompt_lines import PromptLine, parse_line


@dataclass(frozen=True, slots=True)
class Prompt:
    """One input as it was given, and where it stands."""

    place: str
    line: PromptLine
    source_id: str = ""


def read_prompts(config: Config) -> list[Prompt]:
    """What ``--prompt`` or ``--input-file`` names, in order; needs no model.

    Raises InputError where the file cannot be read, holds nothing, or a line is not what it should be.
    """
    if config.generate.prompt is not None:
        return [Prompt("--prompt", PromptLine(prompt=config.generate.prompt))]
    path = Path(os.path.expanduser(str(config.generate.input_file)))
    text = read_text(path, "--input-file names a UTF-8 .txt or .jsonl file")
    if path.suffix == ".jsonl":
        prompts = parse_lines(text, path)
    elif path.suffix == ".txt":
        blocks = [block.strip("\r\n") for block in re.split(r"\n[ \t\r]*\n", text) if block.strip()]
        prompts = [Prompt(str(path), PromptLine(prompt=block)) for block in blocks]
    else:
        raise InputError(f"{path} is neither .txt nor .jsonl", "rename it after what it holds")
    if not prompts:
        raise InputError(f"{path} holds no prompt", "put prompts in, one a paragraph (.txt) or a line (.jsonl)")
    return prompts


def read_text(path: Path, hint: str) -> str:
    """The text of a file of prompts. Raises InputError, with ``hint``, where it cannot be read or is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # no UTF-8, or a NUL in the path
        raise InputError(f"cannot read {path}: {error}", hint) from error


def parse_lines(text: str, path: Path) -> list[Prompt]:
    """The prompts of a ``.jsonl`` file. Raises InputError, which names the line, for one that is none."""
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _parse(text: str, place: str) -> Prompt:
    line = parse_line(place, text.encode(), PromptLine)
    return Prompt(place, line, "" if line.request_id is None else str(line.request_id))


def to_requests(prompts: list[Prompt], config: Config, loaded: LoadedModel) -> list[Request]:
    """The prompts as the model sees them. Raises InputError where its tokenizer or chat template refuses one."""
    requests = []
    for request_id, prompt in enumerate(prompts):
        try:
            ids = _encode(prompt.line, loaded, raw=config.generate.raw)
        except InputError as error:
            raise InputError(f"{prompt.place}: {error.message}", error.hint) from error
        new_tokens = config.engine.max_new_tokens
        requests.append(Request(request_id, ids, new_tokens, prompt.source_id, prompt.line.prompt))
    return requests


def _encode(line: PromptLine, loaded: LoadedModel, *, raw: bool) -> list[int]:
    if line.prompt_token_ids is not None:
        return list(line.prompt_token_ids)  # a checkpoint without tokenizer takes them too
    if not raw:
        return line.encode(loaded.tokenizer)
    if line.prompt is None:
        raise InputError("messages need the chat template, which --raw leaves out", "give a prompt, or no --raw")
    return loaded.tokenizer.encode_raw(line.prompt)
