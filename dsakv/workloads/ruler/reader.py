"""RULER items from JSONL files, as RULER's generator and its re-publications write them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dsakv.errors import InputError
from dsakv.hub.json_rows import BAD_JSON, json_fault
from dsakv.workloads.rows import json_rows


@dataclass(frozen=True, slots=True)
class Item:
    """One RULER item: the prompt is ``text`` with ``answer_prefix`` behind it."""

    task: str
    source_id: str
    text: str
    answer_prefix: str
    answers: tuple[str, ...]
    index: int | str | None = None
    """The row's own ``index``, which is not unique."""
    haystack: str | None = None
    """What text a generated item is hidden in, where it is one of ours and not RULER's own."""


class _Row(msgspec.Struct):
    # `question` is left alone on purpose: for the QA tasks it lacks the documents that `input` holds.
    input: str
    answer_prefix: str = ""
    outputs: list[str] | str | None = None
    answer: list[str] | str | None = None
    index: int | str | None = None


def find_files(path: Path) -> dict[str, list[Path]]:
    """RULER's JSONL files under ``path`` by task: the file's name, or its folder's for ``validation*.jsonl``.

    Raises InputError where there are none.
    """
    hint = "give --ruler-data a RULER .jsonl file or a directory of them"
    if path.is_dir():
        files = sorted(path.rglob("*.jsonl"))
    elif path.exists():
        files = [path]
    else:
        raise InputError(f"no such file or directory: {path}", hint)
    if not files:
        raise InputError(f"no .jsonl file under {path}", hint)
    tasks: dict[str, list[Path]] = {}
    for file in files:
        task = file.resolve().parent.name if file.stem.startswith("validation") else file.stem
        tasks.setdefault(task, []).append(file)
    return tasks


def read_items(task: str, file: Path) -> Iterator[Item]:
    """The items of one file, in order; empty lines are passed over.

    Raises InputError naming ``file:line`` for a row that is no RULER row.
    """
    for place, line in json_rows(file, "--ruler-data"):
        yield _item(task, place, line)


def _item(task: str, place: str, line: msgspec.Raw | bytes) -> Item:
    hint = "a RULER row is one JSON object with `input` (text) and `outputs` (list of texts)"
    try:
        row = msgspec.json.decode(line, type=_Row)
    except BAD_JSON as error:
        raise InputError(f"{place}: not a RULER row: {json_fault(error, line)}", hint) from error
    gold = row.answer if row.outputs is None else row.outputs
    answers = (gold,) if isinstance(gold, str) else tuple(gold or ())
    if not answers or not all(answers):
        raise InputError(f"{place}: no gold answer in `outputs` or `answer`, or an empty one", hint)
    if not row.input:
        raise InputError(f"{place}: `input` is empty", hint)
    return Item(task, place, row.input, row.answer_prefix, answers, row.index)
