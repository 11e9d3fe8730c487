"""What is said of a conversion: ``conversion.json`` beside its result, and how digests are made."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from dsakv.convert.plan import Plan
from dsakv.errors import DsakvError
from dsakv.trace.files import replacing

RECORD = "conversion.json"
ANOTHER_FOLDER = "name another folder with --save-path, or remove this one"


class _File(Struct, frozen=True, kw_only=True):
    name: str
    bytes: int


class SourceFile(_File, frozen=True, kw_only=True):
    """A shard of the source."""

    mtime_ns: int
    header_sha256: str


class Order(Struct, frozen=True, kw_only=True):
    """What is converted and how. Equal orders have equal results."""

    model_parallel: int
    config_sha256: str
    piece_bytes: int
    sources: list[SourceFile]

    def differs(self, other: Order, *, times: bool = True) -> str | None:
        """In what respect, in the user's words; None where both are the same. ``times`` of files may be left aside."""
        if self.model_parallel != other.model_parallel:
            return f"--model-parallel {self.model_parallel}"
        ours, theirs = ((o if times else o.timeless()) for o in (self, other))
        if ours.sources != theirs.sources or ours.config_sha256 != theirs.config_sha256:
            return "another checkpoint, or this one before it changed"
        return None if ours == theirs else "another version of dsakv"

    def timeless(self) -> Order:
        return msgspec.structs.replace(self, sources=[msgspec.structs.replace(s, mtime_ns=0) for s in self.sources])


class ResultFile(_File, frozen=True, kw_only=True):
    """A rank's file; ``digest`` is the SHA-256 over the XXH3 values (64 bit) of its pieces, little endian."""

    digest: str


class Copied(_File, frozen=True, kw_only=True):
    """A file that was taken over as it is."""

    sha256: str


class Record(Struct, frozen=True, kw_only=True):
    """``conversion.json``, written when everything else is there."""

    order: Order
    files: list[ResultFile]
    copied: list[Copied]


def order_of(plan: Plan) -> Order:
    source = plan.source
    sources = [
        SourceFile(name=s.path.name, bytes=s.size, mtime_ns=s.mtime_ns, header_sha256=s.header_sha256)
        for s in source.shards
    ]
    return Order(
        model_parallel=len(plan.files),
        config_sha256=hashlib.sha256((source.directory / "config.json").read_bytes()).hexdigest(),
        piece_bytes=plan.piece_bytes,
        sources=sources,
    )


def digest(checksums: Sequence[int]) -> str:
    """Digest of a file by the XXH3 values of its pieces."""
    return hashlib.sha256(struct.pack(f"<{len(checksums)}Q", *checksums)).hexdigest()


def read_record(folder: Path) -> Record | None:
    """The record in ``folder``, None where there is none; DsakvError where it is damaged."""
    path = folder / RECORD
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DsakvError(f"{path} is damaged: {error}", ANOTHER_FOLDER) from error


def write_record(folder: Path, record: Record) -> None:
    """Write ``conversion.json``, whole or not at all. Raises OSError."""
    with replacing(folder / RECORD) as file:
        file.write(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
