"""What stands beside the weights: config, tokenizer, templates, encoder, licence. It is copied as it is, never run."""

from __future__ import annotations

import filecmp
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from dsakv.convert.journal import JOURNAL
from dsakv.convert.record import RECORD, Copied
from dsakv.errors import DsakvError, InputError
from dsakv.settings import is_unicode
from dsakv.trace.files import leftovers, replacing

WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf", ".h5",
    ".msgpack", ".onnx", ".npz", ".pkl",
)  # fmt: skip
"""Ends of names that are weights in one form or another, or list them. All else is copied, hidden names aside."""
_OWN = (RECORD, JOURNAL)
_CHUNK = 1 << 20


def companions(directory: Path) -> list[Path]:
    """Paths of the files to copy, relative to ``directory``, in order. Links to files are files.

    Raises InputError for a link that leads nowhere or to a folder, and for what is neither file nor folder.
    """
    return sorted(_walk(directory, directory))


def companion_bytes(directory: Path) -> int:
    """Their size together."""
    return sum((directory / path).stat().st_size for path in companions(directory))


def copy_companions(directory: Path, target: Path) -> list[Copied]:
    """Copy them into ``target``, each whole or not at all, and remove what a killed attempt has left of them.

    Raises:
        DsakvError: one of them cannot be read.
        OSError: the disk is full or not writable.
    """
    paths = companions(directory)
    for folder in {(target / path).parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in leftovers(folder):
            leftover.unlink()
    return [_copy(directory, path, target) for path in paths]


def differing(directory: Path, target: Path) -> Path | None:
    """The first companion that is missing in ``target`` or has other bytes there."""
    for path in companions(directory):
        if not (target / path).is_file() or not filecmp.cmp(directory / path, target / path, shallow=False):
            return path
    return None


def _copy(directory: Path, path: Path, target: Path) -> Copied:
    fingerprint, size = hashlib.sha256(), 0
    with replacing(target / path) as file:
        for chunk in _chunks(directory / path):
            file.write(chunk)
            fingerprint.update(chunk)
            size += len(chunk)
    return Copied(name=path.as_posix(), bytes=size, sha256=fingerprint.hexdigest())


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except OSError as error:
        raise DsakvError(
            f"cannot read {path}: {error.strerror}", "check its permissions and its disk, then convert again"
        ) from error


def _walk(root: Path, folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith(".") or entry.name.endswith(WEIGHTS):
                continue
            if folder == root and entry.name in _OWN:
                continue
            if not is_unicode(entry.name):
                raise InputError(f"{str(path)!r} has a name that is no UTF-8", "rename or remove it")
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(root, path)
            elif entry.is_file():
                yield path.relative_to(root)
            else:
                raise InputError(
                    f"{path} is no file that could be copied (a broken link, a link to a folder, a pipe)",
                    "download it again, or remove it",
                )
