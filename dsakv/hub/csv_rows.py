"""Rows of a CSV file, as they stand there."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from dsakv.errors import DsakvError, InputError

_HINT = "fetch another file or --revision: this program knows BurstGPT as a CSV file with a header"


def csv_rows(path: Path, name: str, columns: Collection[str]) -> Iterator[bytes]:
    """The header, then each row, with their line ends. ``name`` is what errors call the file.

    Raises:
        InputError: no header with these ``columns``, a row of another width, or no CSV.
        DsakvError: the file cannot be read.
    """
    held: list[bytes] = []

    def texts(lines: Iterable[bytes]) -> Iterator[str]:
        for number, line in enumerate(lines):
            held.append(line)
            yield line.decode("utf-8-sig" if number == 0 else "utf-8")

    try:
        with open(path, "rb") as file:
            reader = csv.reader(texts(file), strict=True)
            header = next(reader, [])
            if missing := [column for column in columns if column not in header]:
                shown = ",".join(header)[:80] or "nothing"
                raise InputError(f"{name} has no column {', '.join(missing)}; its first line is {shown}", _HINT)
            yield b"".join(held).removeprefix(b"\xef\xbb\xbf")
            held.clear()
            for row in reader:
                if row and len(row) != len(header):
                    raise InputError(
                        f"{name}:{reader.line_num}: {len(row)} fields where the header has {len(header)}", _HINT
                    )
                if row:
                    line = b"".join(held)
                    yield line if line.endswith(b"\n") else line + b"\n"
                held.clear()
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{name} is no CSV: {error}", _HINT) from error
    except OSError as error:
        raise DsakvError(f"cannot read {path}: {error.strerror}", "check the disk under HF_HOME") from error
