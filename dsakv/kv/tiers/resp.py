"""Commands in Redis' protocol, laid out so that large payloads are sent from where they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

Piece: TypeAlias = "bytes | memoryview"
Command: TypeAlias = "Sequence[Piece]"

JOINED_BYTES = 1 << 16
"""Smaller pieces of a pipeline are sent together; joining larger ones costs more than a call each."""


def command(*words: bytes) -> bytes:
    """A command of few bytes."""
    return b"*%d\r\n%b" % (len(words), b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words))


def set_command(key: bytes, value: memoryview) -> Command:
    head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, len(value))
    return head, value, b"\r\n"


def joined(commands: Sequence[Command]) -> Iterator[Piece]:
    """The pieces of ``commands`` in as few buffers as is worth it. Large payloads are sent from where they are."""
    small: list[Piece] = []
    size = 0
    for pieces in commands:
        for piece in pieces:
            if len(piece) >= JOINED_BYTES // 4:
                if small:
                    yield b"".join(small)
                yield piece
                small, size = [], 0
                continue
            small.append(piece)
            size += len(piece)
            if size >= JOINED_BYTES:
                yield b"".join(small)
                small, size = [], 0
    if small:
        yield b"".join(small)
