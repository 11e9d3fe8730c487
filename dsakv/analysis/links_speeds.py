"""How fast bytes move that are no blocks: from disk, and between memories. They stand in a profile beside its links."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PathKind = Literal["file", "checkpoint", "temporary"]


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """Of reads of one size by so many threads."""

    request_bytes: int
    threads: int
    gb_s: float
    """10^9 bytes a second, the median."""


@dataclass(frozen=True, slots=True)
class DiskSpeeds:
    """Of sequential reads from a disk into memory."""

    path_kind: PathKind
    """What was read: a file or checkpoint that the user named, or a file made for it."""
    direct: bool
    """Whether past the page cache; else through it, emptied of these files before."""
    source_bytes: int
    read_bytes: int
    """Bytes that each reading took at most."""
    gb_s: tuple[tuple[int, int, float], ...]
    """The fields of :class:`DiskSpeed` for each size and number of threads."""
    best: DiskSpeed


@dataclass(frozen=True, slots=True)
class MemorySpeeds:
    """Of copies of ``bytes`` between memories, 10^9 bytes copied a second, the median."""

    bytes: int
    host_to_host: float
    host_to_device: float | None = None
    """From pinned memory, as the other way; None without a CUDA device."""
    device_to_host: float | None = None
