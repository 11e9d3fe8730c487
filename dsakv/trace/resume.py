"""How an interrupted run goes on.

``requests.jsonl`` is the log of what is complete: a request gets its line there, with the number of its records,
after its records are on disk. Going on means to keep exactly the records of these requests.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import orjson

from dsakv.errors import InputError
from dsakv.trace.files import ends_with_newline, read_lines, replacing
from dsakv.trace.formats import format_of, read_records, shard_paths


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
    contents: dict[Path, Counter[int]] = {}  # records of each request
    written: Counter[int] = Counter()
    last_step: dict[int, int] = {}
    for shard in shard_paths(trace_dir):
        requests: Counter[int] = Counter()
        for place, record in read_records(shard, ("request_id", "engine_step")):
            if not _is_entry(record):
                raise _damaged(place)
            requests[record["request_id"]] += 1
            last_step[record["request_id"]] = record.get("engine_step", -1)  # it only grows within a request
        contents[shard] = requests
        written.update(requests)
    finished = frozenset(request_id for request_id, records in declared.items() if written[request_id] == records)

    # The log goes first: no record may be dropped that it still declares.
    if requests_path.exists() and not (ends_with_newline(requests_path) and declared.keys() <= finished):
        _rewrite(requests_path, finished)
    for shard, requests in contents.items():
        if finished.isdisjoint(requests):
            shard.unlink()
        elif not (format_of(shard).complete(shard) and requests.keys() <= finished):
            format_of(shard).keep(shard, finished)
    return finished, 1 + max((last_step[r] for r in finished & last_step.keys()), default=-1)


def _rewrite(path: Path, finished: frozenset[int]) -> None:
    """Keep the lines of finished requests."""
    with replacing(path) as file:
        for place, line in read_lines(path):
            if _parse(place, line)["request_id"] in finished:
                file.write(line + b"\n")


def _parse(place: str, line: bytes) -> dict[str, Any]:
    try:
        entry = orjson.loads(line)
    except ValueError:
        entry = None
    if not _is_entry(entry):
        raise _damaged(place)
    return dict(entry)


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("request_id"), int)


def _damaged(place: str) -> InputError:
    return InputError(f"{place}: the line is damaged", "the run cannot go on: start it over in another --trace-out")
