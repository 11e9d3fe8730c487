"""Checksums over all bytes of a Parquet file, beside those that Parquet has for its pages.

Parquet's own leave out the pages' headers and the footer, where one flipped bit may rename a column or have a page
decoded in another way. A sealed file holds in its footer, as plain metadata that other readers pass over,
``dsakv.row_groups`` (``size:crc32`` of each row group's bytes) and ``dsakv.footer`` (the crc32 of the footer, taken
with zeros in its own place).
"""

from __future__ import annotations

import re
import zlib
from typing import BinaryIO

from dsakv.errors import InputError

MAGIC = b"PAR1"
ROW_GROUPS = "dsakv.row_groups"
FOOTER = "dsakv.footer"
UNSET = "00000000"
# How Thrift's compact protocol writes the two strings of a metadata entry.
_FOOTER_ENTRY = re.compile(re.escape(FOOTER.encode()) + rb"\x18\x08([0-9a-f]{8})")
_GROUPS_ENTRY = re.compile(re.escape(ROW_GROUPS.encode()) + rb"\x18[\x80-\xff]*[\x00-\x7f]([0-9a-f: ]*)")
_HINT = "the file was changed or damaged after it was written"


class SealingFile:
    """What a Parquet writer writes to: sums up what goes by, and puts the sums into the footer."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file: BinaryIO | None = file
        self._at = 0
        self._crc = 0
        self._begin = len(MAGIC)
        self._groups: list[str] = []
        self._footer: bytearray | None = None

    def write(self, data: bytes) -> int:
        """Write all of ``data``; nothing after :meth:`drop`."""
        view = memoryview(data)
        if self._file is None:
            return len(view)
        if self._footer is not None:
            self._footer += view
        elif self._at == 0:
            self._file.write(view)  # the magic bytes come alone
        else:
            self._crc = zlib.crc32(view, self._crc)
            self._file.write(view)
        self._at += len(view)
        return len(view)

    def tell(self) -> int:
        """Bytes so far."""
        return self._at

    def flush(self) -> None:
        """Parquet asks for it; the file's owner flushes."""

    def close(self) -> None:
        """As :meth:`flush`."""

    def end_row_group(self) -> None:
        """What came since the last call is a row group."""
        self._groups.append(f"{self._at - self._begin}:{self._crc:08x}")
        self._begin, self._crc = self._at, 0

    def begin_footer(self) -> dict[str, str]:
        """The metadata to put into the footer, which is what comes from now on."""
        self._footer = bytearray()
        return {ROW_GROUPS: " ".join(self._groups), FOOTER: UNSET}

    def end_footer(self) -> None:
        """Write the footer with its sum in it."""
        if self._file is None or self._footer is None:
            raise ValueError("there is no footer to end")
        footer = bytes(self._footer)
        (entry,) = _FOOTER_ENTRY.finditer(footer)
        self._file.write(footer[: entry.start(1)] + f"{zlib.crc32(footer):08x}".encode() + footer[entry.end(1) :])

    def drop(self) -> None:
        """Let nothing through any more."""
        self._file = None


class Seal:
    """The checksums of one file, if it has any."""

    def __init__(self, file: BinaryIO, place: str) -> None:
        """Read and check the footer of ``file``.

        Raises:
            InputError: it is not what was written.
            OSError: it cannot be read.
        """
        self._file, self._place = file, place
        self._groups: list[tuple[int, int, int]] | None = None  # begin, size, crc of each row group
        size = file.seek(0, 2)
        file.seek(max(size - 8, 0))
        tail = file.read(8)
        length = int.from_bytes(tail[:4], "little")
        if len(tail) < 8 or tail[4:] != MAGIC or length + 12 > size:
            raise InputError(f"{place}: no whole Parquet file: it was cut off or damaged", _HINT)
        file.seek(size - 8 - length)
        footer = file.read(length) + tail
        entries = list(_FOOTER_ENTRY.finditer(footer))
        if not entries:
            return
        start, end = entries[0].span(1)
        sums = _GROUPS_ENTRY.search(footer)
        if len(entries) > 1 or sums is None or footer[start:end] != self._sum(footer, start, end):
            raise InputError(f"{place}: the footer is damaged", _HINT)
        begin = len(MAGIC)
        self._groups = []
        for text in sums[1].decode().split():
            count, crc = text.split(":")
            self._groups.append((begin, int(count), int(crc, 16)))
            begin += int(count)

    def check(self, row_group: int) -> None:
        """Check all bytes of a row group.

        Raises:
            InputError: they are not what was written.
            OSError: they cannot be read.
        """
        if self._groups is None:
            return
        begin, size, crc = self._groups[row_group]
        self._file.seek(begin)
        if zlib.crc32(self._file.read(size)) != crc:
            raise InputError(f"{self._place}: row group {row_group} is damaged", _HINT)

    @staticmethod
    def _sum(footer: bytes, start: int, end: int) -> bytes:
        return f"{zlib.crc32(footer[:start] + UNSET.encode() + footer[end:]):08x}".encode()
