"""What ``requests.jsonl`` knows and records do not: where needles stand, whose prefix a prompt shares."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import orjson

from dsakv.analysis.needles import Spans
from dsakv.analysis.scopes import Owners
from dsakv.errors import InputError
from dsakv.trace.files import read_lines
from dsakv.trace.open import TraceDir, requests_file


@dataclass(frozen=True, slots=True)
class SideFacts:
    """By request, for those that have any."""

    needles: Spans
    owners: Owners


def read_side_facts(trace: TraceDir) -> SideFacts:
    """Read ``requests.jsonl`` of the run; without one there are no facts.

    Raises:
        InputError: it is damaged.
        OSError: it cannot be read.
    """
    needles: dict[int | str, list[tuple[int, int]]] = {}
    owners: dict[int, list[tuple[int, int]]] = {}
    path = requests_file(trace.path)
    if path is not None:
        for place, line in read_lines(path):
            try:
                entry = orjson.loads(line)
                request = entry["request_id"]
                spans = _pairs(entry.get("needle_spans", []))
                shared = _pairs(entry.get("prefix_owners", []))
                if type(request) not in (int, str) or any(begin >= end for begin, end in spans):
                    raise ValueError("request_id is no id, or needle_spans are no ranges")
                if any(owner >= request for owner, _ in shared) or any(a >= b for a, b in pairwise(shared)):
                    raise ValueError("prefix_owners must ascend, and be earlier requests")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{place}: the line is damaged: {error!r}", "repair the file, or remove it") from None
            if spans:
                needles[request] = spans
            if shared:
                owners[request] = shared
    return SideFacts(needles, owners)


def _pairs(value: Any) -> list[tuple[int, int]]:
    pairs = [(first, second) for first, second in value]
    if any(type(number) is not int or not 0 <= number < 1 << 31 for pair in pairs for number in pair):
        raise ValueError("a pair does not hold two positions")
    return pairs
