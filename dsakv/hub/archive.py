"""Files of a gzipped tar archive, read as a stream: nothing is ever unpacked to a path that the archive names."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dsakv.errors import DsakvError, InputError


def members(
    path: Path, wanted: Collection[str], name: str, advance: Callable[[int], None], warn: Callable[[str], None]
) -> Iterator[tuple[str, IO[bytes]]]:
    """Each regular file of ``wanted`` in the order of the archive, with its content, to be read before the next.

    A member counts under its path in the archive (``./`` aside); links, devices and paths that lead elsewhere are
    passed over. Reading stops with the last one wanted. ``advance`` gets the bytes of the archive as they are read,
    ``name`` is what errors call it.

    Raises:
        InputError: a wanted file is not there.
        DsakvError: the archive is damaged or cannot be read, also while a content is being read from it.
    """
    waiting = set(wanted)
    seen: list[str] = []
    with (
        reading(name),
        open(path, "rb") as file,
        gzip.GzipFile(fileobj=_Counted(file, advance), mode="rb") as unzipped,  # unlike tarfile's own it checks sums
        tarfile.open(fileobj=unzipped, mode="r|") as archive,
    ):
        for member in archive:
            place = _normal(member.name)
            if place is None:
                warn(f"{name}: passed over {member.name!r}, which leads out of the archive")
            elif place in waiting and not member.isreg():
                warn(f"{name}: passed over {place}, which is no regular file")
            elif member.isreg():
                seen.append(place)
                if place in waiting and (content := archive.extractfile(member)) is not None:
                    waiting.discard(place)
                    yield place, content
            if not waiting:
                return
    raise InputError(f"{name} has no {', '.join(sorted(waiting))}", f"it holds {_listed(seen)}")


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what a damaged archive raises, here and in contents that are read, into DsakvError."""
    try:
        yield
    # Beside its own errors, tarfile lets those of headers that make no sense through.
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile, ValueError, OverflowError) as error:
        raise DsakvError(
            f"{name} is a damaged archive: {error or 'it ends too early'}",
            "fetch another --revision: the file is what the hub has, its checksum fits",
        ) from error


def _normal(path: str) -> str | None:
    """A member's path without ``.`` and doubled slashes; None where it leads out of the archive."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return None if path.startswith("/") or ".." in parts else "/".join(parts)


def _listed(paths: Iterable[str]) -> str:
    """Many files in few words: their names, and the folders where there are such."""
    names = dict.fromkeys(path.rpartition("/")[2] for path in paths)
    folders = dict.fromkeys(path.rpartition("/")[0] for path in paths)
    return f"{_few(names, 12)} in {_few(folders, 20)}" if names else "no file"


def _few(words: Iterable[str], most: int) -> str:
    ordered = sorted(words, key=lambda word: (len(word), word))
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


class _Counted(io.RawIOBase):
    """A file that tells how much of it was read."""

    def __init__(self, file: IO[bytes], advance: Callable[[int], None]) -> None:
        self._file = file
        self._advance = advance

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._advance(len(data))
        return data
