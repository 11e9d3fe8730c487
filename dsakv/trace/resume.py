"""How an interrupted run goes on.

``requests.jsonl`` is the log of what is complete: a request gets its line there, with the number of its records,
after its records are on disk. Going on means to keep exactly the records of these requests.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from dsakv.errors import InputError
from dsakv.trace.files import read_lines, replacing, shard_paths


@dataclass(frozen=True, slots=True)
class _Contents:
    requests: Counter[int]
    """Lines of each request."""
    whole: bool
    """The file ends with a newline, as a file does that further lines are appended to."""


def keep_finished(requests_path: Path, trace_dir: Path) -> tuple[frozenset[int], int]:
    """Bring the folder to the state in which only finished requests have left a mark.

    A request whose records are not all there counts as unfinished. Killed on the way, this can be done again.

    Returns:
        The finished requests, and the number of engine steps that their records go up to.

    Raises:
        InputError: a damaged line that is not the last one of its file.
        OSError: the disk is full or not writable.
    """
    declared: dict[int, int] = {}
    if requests_path.exists():
        for place, line in read_lines(requests_path):
            entry = _parse(place, line)
            declared[entry["request_id"]] = entry.get("records", 0)
    contents: dict[Path, _Contents] = {}
    written: Counter[int] = Counter()
    last_step: dict[int, int] = {}
    for shard in shard_paths(trace_dir):
        requests: Counter[int] = Counter()
        for place, line in read_lines(shard):
            record = _parse(place, line)
            requests[record["request_id"]] += 1
            last_step[record["request_id"]] = record.get("engine_step", -1)  # it only grows within a request
        contents[shard] = _Contents(requests, _ends_with_newline(shard))
        written.update(requests)
    finished = frozenset(request_id for request_id, records in declared.items() if written[request_id] == records)

    # The log goes first: no record may be dropped that it still declares.
    if requests_path.exists() and not (_ends_with_newline(requests_path) and declared.keys() <= finished):
        _rewrite(requests_path, finished)
    for shard, content in contents.items():
        if finished.isdisjoint(content.requests):
            shard.unlink()
        elif not (content.whole and content.requests.keys() <= finished):
            _rewrite(shard, finished)
    return finished, 1 + max((last_step[r] for r in finished & last_step.keys()), default=-1)


def _rewrite(path: Path, finished: frozenset[int]) -> None:
    """Keep the lines of finished requests."""
    with replacing(path) as file:
        for place, line in read_lines(path):
            if _parse(place, line)["request_id"] in finished:
                file.write(line + b"\n")


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _parse(place: str, line: bytes) -> dict[str, Any]:
    try:
        entry = orjson.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or not isinstance(entry.get("request_id"), int):
        raise InputError(f"{place}: the line is damaged", "the run cannot go on: start it over in another --trace-out")
    return entry
