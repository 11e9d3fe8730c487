"""Rows of a file that is one large JSON array."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from dsakv.errors import DsakvError, InputError

BAD_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises where it is no JSON of the type asked for, no UTF-8, or nested too deep."""


_HALF_PAIR = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)


def json_fault(error: Exception, raw: msgspec.Raw | bytes) -> str:
    """What one of ``BAD_JSON`` found in ``raw``; decoders take half of a surrogate pair for an unfinished text."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    half = _HALF_PAIR.search(bytes(raw))
    return f"a text holds {half[0][:6].decode()}, half of a surrogate pair" if half else str(error)


def mapped_array(file: BinaryIO, begin: int = 0) -> list[msgspec.Raw]:
    """The elements of the JSON array at ``begin`` of a file that is not empty: views into the mapped file, not copies.

    Raises ``BAD_JSON`` where there is no array, OSError where the file cannot be mapped.
    """
    array = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return msgspec.json.decode(array[begin:], type=list[msgspec.Raw])


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
            if not os.fstat(file.fileno()).st_size:
                raise InputError(f"{name} is empty", hint)
            rows = mapped_array(file)
    except OSError as error:
        raise DsakvError(f"cannot read {path}: {error.strerror}", "check the disk under HF_HOME") from error
    except BAD_JSON as error:
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
