"""Prompts for `dsakv bench`: given ones, as they stand and without a BOS, or made-up ones."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsakv.config import BenchConfig, Config
from dsakv.errors import InputError
from dsakv.jobs.loaded import LoadedModel
from dsakv.jobs.prompts import Prompt, parse_lines, read_text
from dsakv.request import Request
from dsakv.workloads.prompt_lines import PromptLine

MOST_TOKENS = 20_000_000
"""Of all made-up prompts: more take minutes to make."""


@dataclass(frozen=True, slots=True)
class BenchPrompts:
    """The requests of a round, and what became of their prompts."""

    requests: list[Request]
    source: str

    @property
    def cut(self) -> int:
        """Prompts that lost their beginning."""
        return sum(request.truncated_tokens > 0 for request in self.requests)

    def describe(self) -> dict[str, Any]:
        """The prompts' part of the results."""
        sizes = [len(request.prompt_token_ids) for request in self.requests]
        return {
            "source": self.source,
            "count": len(sizes),
            "tokens": sum(sizes),
            "shortest": min(sizes),
            "longest": max(sizes),
            "cut": self.cut,
            "cut_tokens": sum(request.truncated_tokens for request in self.requests),
        }


def read_bench_prompts(config: Config) -> list[Prompt]:
    """The prompts that are given, none where they are to be made up; needs no model.

    Raises InputError for options that do nothing or do not go together, and for a file that cannot be used.
    """
    given, defaults = config.bench, BenchConfig()
    if given.prompt is not None and given.prompts is not None:
        raise InputError("--prompt and --prompts name two sources of prompts", "give one of them")
    flag = "--prompt" if given.prompt is not None else "--prompts" if given.prompts is not None else None
    if flag and given.input_len != defaults.input_len:
        raise InputError(
            f"--input-len does nothing with {flag}: it is the length of made-up prompts", "leave one of them out"
        )
    if given.prompt is not None:
        if given.num_prompts:
            raise InputError("--num-prompts does nothing with --prompt, which is one", "leave one of them out")
        prompts = [Prompt("--prompt", PromptLine(prompt=given.prompt))]
    elif given.prompts is not None:
        prompts = _from_file(Path(os.path.expanduser(given.prompts)), given.num_prompts)
    else:
        prompts = []
    count = len(prompts) or given.num_prompts or config.engine.batch_size
    if config.engine.batch_size > count:
        raise InputError(
            f"--batch-size {config.engine.batch_size} is never reached: a round has {count} prompt"
            f"{'' if count == 1 else 's'}",
            "lower it, or give more prompts",
        )
    room = config.model.max_seq_len - config.engine.max_new_tokens
    if config.model.max_seq_len and room < 1:
        raise _no_room(config, config.model.max_seq_len)
    return prompts


def _from_file(path: Path, wanted: int) -> list[Prompt]:
    text = read_text(path, "--prompts names a UTF-8 file of one prompt a line, or .jsonl")
    if path.suffix == ".jsonl":
        prompts = parse_lines(text, path)
    else:
        lines = [(f"{path}:{number}", line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1)]
        prompts = [Prompt(place, PromptLine(prompt=line)) for place, line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{path} holds no prompt", "put prompts in, one a line")
    if wanted > len(prompts):
        raise InputError(
            f"--num-prompts {wanted}, but {path} holds {len(prompts)}", "lower it, or leave it out for all"
        )
    return prompts[:wanted] if wanted else prompts


def bench_requests(prompts: list[Prompt], config: Config, loaded: LoadedModel) -> BenchPrompts:
    """The requests of a round; made up where ``prompts`` is empty. Long prompts keep their tail.

    Raises InputError where a prompt has no token or cannot be encoded, or where the model has no room for any.
    """
    new_tokens = config.engine.max_new_tokens
    room = loaded.max_seq_len - new_tokens
    if room < 1:
        raise _no_room(config, loaded.max_seq_len)
    if not prompts:
        return BenchPrompts(_made_up(config, loaded, room), "random tokens")
    encoded = [(prompt.source_id, _encode(prompt, loaded), prompt.line.prompt) for prompt in prompts]
    source = str(config.bench.prompts) if config.bench.prompts is not None else "--prompt"
    requests = [
        Request(number, ids[-room:], new_tokens, name, text, truncated_tokens=max(0, len(ids) - room))
        for number, (name, ids, text) in enumerate(encoded)
    ]
    return BenchPrompts(requests, source)


def _encode(prompt: Prompt, loaded: LoadedModel) -> list[int]:
    line = prompt.line
    try:
        if line.prompt_token_ids is not None:
            ids = list(line.prompt_token_ids)
        elif line.prompt is not None:
            ids = loaded.tokenizer.encode(line.prompt)
        else:
            ids = loaded.tokenizer.encode_messages(line.chat())
    except InputError as error:
        raise InputError(f"{prompt.place}: {error.message}", error.hint) from error
    if not ids:
        raise InputError(f"{prompt.place}: the prompt has no token", "remove it, or fill it")
    return ids


def _made_up(config: Config, loaded: LoadedModel, room: int) -> list[Request]:
    """Ids drawn from the seed, all different prompts; no special token among them, whose meaning could end a text."""
    tokenizer, eos = loaded.text_tokenizer, loaded.eos_token_ids
    known = loaded.model.vocab_size if tokenizer is None else min(loaded.model.vocab_size, tokenizer.vocab_size)
    usual = [i for i in range(known) if i not in eos and not (tokenizer and tokenizer.is_special(i))]
    if not usual:
        raise InputError("the model's vocabulary holds special tokens alone", "give prompts with --prompts")
    draw = random.Random(config.engine.seed)
    count, asked = config.bench.num_prompts or config.engine.batch_size, config.bench.input_len
    length, new_tokens = min(asked, room), config.engine.max_new_tokens
    if count * length > MOST_TOKENS:
        raise InputError(
            f"{count:,} made-up prompts of {length:,} tokens are more than {MOST_TOKENS:,} tokens in all",
            "lower --batch-size, --num-prompts or --input-len",
        )
    return [
        Request(number, draw.choices(usual, k=length), new_tokens, truncated_tokens=asked - length)
        for number in range(count)
    ]


def _no_room(config: Config, limit: int) -> InputError:
    return InputError(
        f"--max-new-tokens {config.engine.max_new_tokens} leaves no room for a prompt: a sequence has {limit} at most",
        "lower it, or raise --max-seq-len as far as the model allows",
    )
