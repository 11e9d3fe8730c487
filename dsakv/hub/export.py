"""Files that are written from what was downloaded, each beside a note of where it comes from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO

import msgspec

from dsakv.errors import DsakvError
from dsakv.trace.files import disk_error, replacing, write_json

_ELSEWHERE = "name another folder with --out, or make room"


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """What an exported file is made of."""

    repo: str
    file: str | None
    """File of the repository; None for rows that the ``datasets`` library reads from whatever files there are."""
    commit: str
    limit: int | None
    """Rows at most."""
    split: str | None = None


class Note(Origin, frozen=True, kw_only=True):
    """What stands in ``<file>.source.json``."""

    revision: str
    """As it was asked for."""
    source_sha256: str | None
    sha256: str
    bytes: int
    rows: int
    fetched_at: str


@dataclass(slots=True)
class Export:
    """A file that is being written."""

    file: BinaryIO
    rows: int = 0
    size: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    _note: Note | None = None

    def write(self, data: bytes, rows: int = 1) -> None:
        """Append ``data``, which holds so many rows."""
        self.file.write(data)
        self.digest.update(data)
        self.rows += rows
        self.size += len(data)

    @property
    def note(self) -> Note:
        """What is said of the file once it is complete."""
        assert self._note is not None
        return self._note


def note_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.source.json")


def up_to_date(target: Path, origin: Origin) -> Note | None:
    """The note of ``target``, if it stands there unchanged and comes from ``origin``."""
    try:
        note = msgspec.json.decode(note_path(target).read_bytes(), type=Note)
        fits = all(getattr(note, name) == getattr(origin, name) for name in Origin.__struct_fields__)
        if not fits or target.stat().st_size != note.bytes:
            return None
        digest = hashlib.sha256()
        with open(target, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):  # then it is written anew
        return None
    return note if digest.hexdigest() == note.sha256 else None


def check_target(target: Path) -> None:
    """Say before a download, not after it, that its file has nowhere to go.

    Raises DsakvError.
    """
    folder = next(path for path in target.absolute().parents if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise DsakvError(f"cannot write {target}: {folder} is not a writable directory", _ELSEWHERE)
    if target.exists() and not target.is_file():
        raise DsakvError(f"cannot write {target}: something that is no file has that name", _ELSEWHERE)


@contextmanager
def exporting(target: Path, origin: Origin, revision: str, source_sha256: str | None) -> Iterator[Export]:
    """A file that becomes ``target``, with its note, when it is complete; until then ``target`` stays as it was.

    Raises DsakvError where the disk is full or not writable.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as file:
            export = Export(file)
            yield export
        export._note = Note(
            **msgspec.structs.asdict(origin),
            revision=revision,
            source_sha256=source_sha256,
            sha256=export.digest.hexdigest(),
            bytes=export.size,
            rows=export.rows,
            fetched_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        write_json(note_path(target), msgspec.structs.asdict(export.note))
    except OSError as error:
        raise disk_error(error, target, _ELSEWHERE) from error
