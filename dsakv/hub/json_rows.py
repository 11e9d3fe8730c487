"""Rows of a file that is one large JSON array."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import msgspec

from dsakv.errors import DsakvError, InputError


def array_rows(path: Path, name: str) -> Iterator[bytes]:
    """Each object of the array as one compact line of JSON, with its newline; numbers and texts stay as written.

    The array is mapped, not read, and its rows are views into it: memory is that of the longest row and what the
    system keeps of the file. ``name`` is what errors call it.

    Raises:
        InputError: no array, or something in it that is no object.
        DsakvError: the file cannot be read.
    """
    hint = "fetch another --revision: this program knows the file as one JSON array of objects"
    try:
        with open(path, "rb") as file:
            array = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:
        raise InputError(f"{name} is empty", hint) from error
    except OSError as error:
        raise DsakvError(f"cannot read {path}: {error.strerror}", "check the disk under HF_HOME") from error
    try:
        rows = msgspec.json.decode(array, type=list[msgspec.Raw])
    except msgspec.DecodeError as error:
        raise InputError(f"{name} is no JSON array: {error}", hint) from error
    for number, row in enumerate(rows):
        line = bytes(msgspec.json.format(row, indent=-1))
        if not line.startswith(b"{"):
            raise InputError(f"{name}: row {number} is no JSON object", hint)
        try:
            line.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: row {number} is no UTF-8", hint) from error
        yield line + b"\n"
