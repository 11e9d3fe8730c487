"""Rows of a data set's file: one JSON array, or one JSON object a line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from dsakv.console import Console
from dsakv.errors import DsakvError, InputError
from dsakv.hub.client import Source
from dsakv.hub.json_rows import BAD_JSON, mapped_array

BOM = b"\xef\xbb\xbf"
Row = tuple[str, msgspec.Raw | bytes]
"""Where a row stands, and its JSON."""


def json_rows(path: Path, flag: str) -> Iterator[Row]:
    """The rows of a file, one at a time; ``flag`` is the option that names it.

    An array is mapped and not copied, however large it is; its rows are ``file#index`` from 0, lines are ``file:line``
    from 1. Empty lines are passed over.

    Raises InputError for a file that cannot be read, is empty, or is no JSON. What a row holds is not looked at.
    """
    hint = f"{flag} names a JSON array of objects, or a file of one object a line"
    try:
        with regular_file(path, flag).open("rb") as file:
            begin = len(BOM) if file.read(len(BOM)) == BOM else 0
            file.seek(begin)
            while (first := file.read(1)).isspace():
                pass
            if not first:
                raise InputError(f"{path} is empty", hint)
            if first != b"[":
                file.seek(begin)
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path}:{number}", line
                return
            rows = mapped_array(file, begin)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", f"check {flag}") from error
    except BAD_JSON as error:
        raise InputError(f"{path} is no JSON: {error}", f"is the file complete? {hint}") from error
    for index, row in enumerate(rows):
        yield f"{path}#{index}", row


def regular_file(name: str | Path, flag: str) -> Path:
    """The file that ``flag`` names, ``~`` expanded. Raises InputError where it is none, a pipe for example."""
    path = Path(os.path.expanduser(name))
    if not path.is_file():
        what = f"{path} is no regular file" if path.exists() else f"no such file: {path}"
        raise InputError(what, f"check {flag}, which names a file")
    return path


def from_hub(source: Source, folder: Path, flag: str) -> Path:
    """The hub's file, from its cache where it is there. Raises DsakvError where it cannot be had."""
    from dsakv.hub.download import download

    try:
        return download(source, Console()).path
    except DsakvError as error:
        hint = f"{error.hint}; or name a file with {flag} ({folder} holds none)"
        raise type(error)(error.message, hint) from error


def fetched_file(folder: Path, stem: str) -> Path | None:
    """The whole data set that ``fetch-data`` left in ``folder``, else the only limited one; None where there is none.

    Raises InputError where there are several limited ones.
    """
    whole = folder / f"{stem}.jsonl"
    if whole.is_file():
        return whole
    limited = sorted(folder.glob(f"{stem}_limit*.jsonl"))
    if len(limited) > 1:
        names = ", ".join(file.name for file in limited)
        raise InputError(f"{folder} holds several files: {names}", "name one of them")
    return limited[0] if limited else None
