"""What the files of a run know of its KV cache and records do not: block tables, what requests came to, the tiers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from dsakv.errors import InputError
from dsakv.trace.files import read_lines
from dsakv.trace.open import TraceDir, requests_file

LARGEST_ID = 1 << 28
"""Block ids are below this; arrays have a place for each."""
_TOKENS = 1 << 31


@dataclass(frozen=True, slots=True)
class RequestKv:
    """A finished request."""

    prompt_tokens: int
    decode_steps: int
    forced: bool
    """Its answer was known and read in chunks: nothing was decoded."""
    runs: tuple[tuple[int, int], ...] | None
    """Its block table as (first block, number of blocks), in the order of its tokens; None where it is not known."""

    @property
    def tokens(self) -> int:
        """Tokens whose KV was computed."""
        return self.prompt_tokens + self.decode_steps


@dataclass(frozen=True, slots=True)
class KvFacts:
    """What is known of a run; without files nothing is."""

    requests: Mapping[int | str, RequestKv]
    """By request; those that did not finish are missing."""
    block_size: int | None
    """Tokens of a block of the tables."""
    layers: int | None
    sample_rate: float
    """Share of the decode steps that were recorded."""

    @property
    def has_tables(self) -> bool:
        """Whether it is known which blocks requests share."""
        return any(request.runs is not None for request in self.requests.values())

    @property
    def forced(self) -> int:
        """Requests with known answers."""
        return sum(request.forced for request in self.requests.values())

    @property
    def first_free_id(self) -> int:
        """Above every block id of the tables."""
        return max((first + count for one in self.requests.values() for first, count in one.runs or ()), default=0)


def read_kv_facts(trace: TraceDir) -> KvFacts:
    """Read ``requests.jsonl`` and what ``run_meta.json`` says.

    Raises:
        InputError: a file is damaged, or there are block tables and no block size.
        OSError: it cannot be read.
    """
    meta = trace.run_meta or {}
    requests: dict[int | str, RequestKv] = {}
    path = requests_file(trace.path)
    if path is not None:
        for place, line in read_lines(path):
            try:
                name, request = _request(orjson.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{place}: the line is damaged: {error!r}", "repair the file, or remove it") from None
            requests[name] = request
    meta_path = trace.path / "run_meta.json"
    model, options = _section(meta_path, meta, "model"), _section(meta_path, meta, "trace")
    rate = options.get("sample_rate", 1.0)
    if type(rate) not in (int, float) or not 0 < rate <= 1:
        raise InputError(f'{meta_path}: "sample_rate" is {rate!r}, not a share', "repair the file")
    facts = KvFacts(
        requests,
        _count(meta_path, meta, "block_size_tokens", _TOKENS),
        _count(meta_path, model, "n_layers", 1 << 16),
        rate,
    )
    if facts.block_size is None and facts.has_tables:
        raise InputError(
            f"{path} has block tables, and nothing tells the size of their blocks",
            f"{meta_path} would, with block_size_tokens",
        )
    for name, request in requests.items():
        held = sum(count for _, count in request.runs or ()) * (facts.block_size or 1)
        if request.runs is not None and held < request.tokens:
            raise InputError(
                f"{path}: the kv_blocks of request {name} hold {held} tokens, it has {request.tokens}",
                "repair the file, or remove it",
            )
    return facts


def _request(entry: Any) -> tuple[int | str, RequestKv]:
    name = entry["request_id"]
    if type(name) not in (int, str):
        raise ValueError("request_id is no id")
    prompt_tokens, decode_steps, forced = entry["prompt_tokens"], entry["decode_steps"], entry.get("forced", False)
    for number in (prompt_tokens, decode_steps):
        if type(number) is not int or not 0 <= number < _TOKENS:
            raise ValueError("prompt_tokens or decode_steps is no number of tokens")
    if type(forced) is not bool:
        raise ValueError("forced is neither true nor false")
    runs = None
    if entry.get("kv_blocks") is not None:
        runs = tuple((first, count) for first, count in entry["kv_blocks"])
        for first, count in runs:
            if type(first) is not int or type(count) is not int or first < 0 or count < 1:
                raise ValueError("kv_blocks are no runs of blocks")
        spans = sorted(runs)
        ends = [first + count for first, count in spans]
        if any(end > LARGEST_ID for end in ends):
            raise ValueError("kv_blocks has a block that no cache is large enough for")
        if any(first < end for end, (first, _) in zip(ends, spans[1:], strict=False)):
            raise ValueError("kv_blocks has a block twice")
    return name, RequestKv(prompt_tokens, decode_steps, forced, runs)


def _section(path: Path, meta: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = meta.get(name)
    if section is not None and not isinstance(section, dict):
        raise InputError(f'{path}: "{name}" is no JSON object', "repair the file")
    return section or {}


def _count(path: Path, section: Mapping[str, Any], name: str, limit: int) -> int | None:
    value = section.get(name)
    if value is not None and (type(value) is not int or not 1 <= value < limit):
        raise InputError(f'{path}: "{name}" is {value!r}, not a positive integer', "repair the file")
    return value
