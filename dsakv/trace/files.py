"""Files of a run: written so that a kill or a full disk leaves nothing half-written, and read back whole."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from dsakv.errors import DsakvError, InputError

TEMP = ".dsakv-tmp"
"""Ends the names of files and folders that are not complete."""


def run_files(trace_dir: Path) -> list[Path]:
    """The files of a run beside its shards, whether they are there or not."""
    return [
        *(trace_dir / name for name in ("run_meta.json", "summary.json")),
        *(trace_dir.parent / name for name in ("config.json", "requests.jsonl")),
    ]


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each line without its newline, and its place as ``file:line``.

    A last line that lacks its newline counts if it is whole JSON; otherwise a kill has cut it off. A file whose name
    ends in ``.zst`` is decompressed; what is wrong with it comes as the decompressor's exception.
    """
    with open(path, "rb") as raw, _decompressed(raw) if path.suffix == ".zst" else nullcontext(raw) as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n") or _is_json(line):
                yield f"{path}:{number}", line.removesuffix(b"\n")


def _decompressed(file: BinaryIO) -> AbstractContextManager[Iterable[bytes]]:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd.ZstdFile(file)


def _is_json(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except ValueError:
        return False
    return True


def ends_with_newline(path: Path) -> bool:
    """Whether lines can be appended to the file as it stands."""
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def write_all(file: io.FileIO, data: bytes) -> None:
    """Write all of ``data`` to an unbuffered file, which may take less than it is given at a time."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of ``path`` at the end: ``path`` is old or new, never half of one.

    Raises:
        OSError: the disk is full or not writable.
    """
    temp = path.with_name(f".{path.name}.{os.getpid()}{TEMP}")
    try:
        with open(temp, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise


def leftovers(folder: Path) -> list[Path]:
    """What :func:`replacing` leaves in a folder when it is killed."""
    return list(folder.glob(f".*.*{TEMP}"))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run in ``folder`` for this process alone; its ``config.json`` must be there.

    Raises:
        DsakvError: another process holds it.
        OSError: there is no run.
    """
    with open(folder / "config.json", "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DsakvError(
                f"another process is writing the run in {folder}",
                "wait for it, or name another folder with --trace-out",
            ) from None
        yield


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an indented JSON document, whole or not at all.

    Raises:
        OSError: the disk is full or not writable.
    """
    with replacing(path) as file:
        file.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def write_result(path: Path, data: bytes, hint: str) -> None:
    """Put ``data`` in the place of ``path``, whose folders are made where they lack.

    Raises:
        DsakvError: it cannot be written; ``hint`` says what to do.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        raise disk_error(error, path, hint) from error


def check_target(path: Path, hint: str, *, new: bool = False) -> None:
    """Say before the work, not after it, that results cannot be written to ``path``; ``new``: nor may replace others.

    Raises:
        InputError: it is a folder, or no regular file.
        DsakvError: its folder is none, or may not be written to; ``hint`` says what to do.
    """
    if path.is_dir():
        raise InputError(f"{path} is a directory", "name a file for the results")
    if new and path.is_file():
        raise DsakvError(f"{path} is there already", "name another file, or remove it")
    if path.exists() and not path.is_file():  # a device would be replaced, not written to
        raise InputError(f"{path} is no regular file", "name a file for the results; --json prints them")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise DsakvError(f"cannot write {path}: {folder} is not a writable directory", hint)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:  # to root all permissions are given, and some places take no files even so
        raise disk_error(error, path, hint) from error


def disk_error(error: OSError, path: Path, hint: str) -> DsakvError:
    """What to tell the user when writing ``path`` failed; a full disk is called by that name."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DsakvError(f"the disk is full: cannot write {path}", hint)
    return DsakvError(f"cannot write {path}: {error.strerror or error}", hint)


def default_path(what: str) -> Path:
    """A folder ``outputs/<what>_<time>`` that is not there yet."""
    first = path = Path("outputs") / f"{what}_{datetime.now():%Y%m%dT%H%M%S}"
    again = 2
    while path.exists():
        path = first.with_name(f"{first.name}-{again}")
        again += 1
    return path
