"""One file from the hub, in the cache that ``huggingface_hub`` keeps, with its checksum verified.

The client downloads a file anew when an earlier attempt was interrupted. Files of half a gigabyte deserve better: the
bytes are fetched here, into a file that the next attempt goes on with, and only a whole and verified one becomes a blob
of the cache, from where ``hf_hub_download`` takes it as if it had fetched it.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsakv.console import MB, Console
from dsakv.errors import DsakvError
from dsakv.hub.client import Hub, Source, token
from dsakv.hub.failures import AGAIN, explained, http_error, is_passing
from dsakv.hub.locate import Located, locate, say_wait
from dsakv.trace.files import TEMP, disk_error, write_all

_ELSEWHERE = "free some space, or keep the cache elsewhere with HF_HOME; the download then goes on where it stopped"


@dataclass(frozen=True, slots=True)
class Download:
    """A verified file."""

    path: Path
    commit: str
    sha256: str
    bytes: int


class _BrokenOffError(Exception):
    """A body ended before its time."""


def download(source: Source, console: Console, hub: Hub | None = None) -> Download:
    """Fetch ``source``, or take it from the cache, and verify its checksum.

    An interrupted download goes on where it stopped. ``hub`` is that of the environment unless given.

    Raises:
        InputError: no such data set or model, revision or file.
        DsakvError: no access or network, a full disk, a file that is not what the hub announced.
    """
    hub = hub or Hub.from_environment()
    located = locate(source, hub, console)
    path = located.cached or _fetch(located, console, hub)
    try:
        return _verified(path, located, console)
    except OSError as error:
        raise DsakvError(f"cannot read {path}: {error.strerror or error}", "check the disk under HF_HOME") from error


def _verified(path: Path, located: Located, console: Console) -> Download:
    """The cached file with its SHA-256; one that is damaged is removed."""
    sha256, found = fingerprints(path)
    if located.checksum is None:
        console.warn(f"{located.source}: the cache does not tell its checksum, so it is used unverified")
    elif located.checksum not in (sha256, found):
        blob = path.parent / os.readlink(path) if path.is_symlink() else path
        path.unlink()
        blob.unlink(missing_ok=True)
        raise DsakvError(
            f"the cached file of {located.source} is damaged (checksum {found[:12]}, not {located.checksum[:12]}), "
            "and was removed",
            "run the command again: it downloads the file anew",
        )
    return Download(path, located.commit, sha256, path.stat().st_size)


def fingerprints(path: Path) -> tuple[str, str]:
    """SHA-256 and git blob id of a file, in hexadecimal."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        git = hashlib.sha1(b"blob %d\0" % os.fstat(file.fileno()).st_size, usedforsecurity=False)
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            git.update(chunk)
    return sha256.hexdigest(), git.hexdigest()


def _fetch(located: Located, console: Console, hub: Hub) -> Path:
    """Download into the cache; returns the path that the cache gives the file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # public, but lazily exported

    source, checksum = located.source, str(located.checksum)
    folder = repo_folder_name(repo_id=source.repo, repo_type=source.kind)
    blob, lock = hub.cache / folder / "blobs" / checksum, hub.cache / ".locks" / folder / f"{checksum}.lock"
    try:
        for path in (blob, lock):
            path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not blob.exists():
                partial = blob.with_name(f"{checksum}{TEMP}")
                _complete(partial, located, console, hub)
                _check_blob(partial, located)
                os.replace(partial, blob)
        with explained(source, hub):
            path = Path(
                hf_hub_download(
                    source.repo,
                    source.file,
                    repo_type=source.kind,
                    revision=source.revision,
                    cache_dir=hub.cache,
                    endpoint=hub.endpoint,
                    token=token() or False,
                )
            )
    except OSError as error:
        raise disk_error(error, hub.cache, _ELSEWHERE) from error
    if located.commit not in path.parts:
        raise DsakvError(f"{source.repo} changed while {source.file} was downloaded", "run the command again")
    return path


def _check_blob(partial: Path, located: Located) -> None:
    """Only what the hub announced enters the cache."""
    if located.checksum in fingerprints(partial):
        return
    size = partial.stat().st_size
    partial.unlink()
    raise DsakvError(
        f"what came for {located.source} is not what the hub announced: {size} bytes with another checksum than "
        f"{str(located.checksum)[:12]}",
        "run the command again; if it stays so, a proxy or mirror changes the file",
    )


def _complete(partial: Path, located: Located, console: Console, hub: Hub) -> None:
    """Append to ``partial`` what it lacks. Whatever is received stays there for the next attempt."""
    size = located.size
    with open(partial, "ab", buffering=0) as file:
        if size is not None and file.tell() > size:
            _restart(file)
        if (have := file.tell()) == size:
            return
        if size is not None:
            _check_space(hub.cache, size - have)
        if have:
            console.info(f"{located.source}: going on after {have / MB:.1f} MB of an earlier attempt")
        left = None if size is None else size - have
        with (
            console.megabytes(left, f"downloading {located.source.file}") as advance,
            explained(located.source, hub),
        ):
            _persist(file, located, console, hub, advance)


def _persist(file: io.FileIO, located: Located, console: Console, hub: Hub, advance: Callable[[int], None]) -> None:
    """Ask for the rest until it is there; the hub's ``waits`` start over with each request that brings something."""
    failures = 0
    while True:
        before = file.tell()
        try:
            return _receive(file, located, hub, advance)
        except (_BrokenOffError, http_error()) as error:
            failures = 1 if file.tell() > before else failures + 1
            if is_passing(error) and failures <= len(hub.waits):
                say_wait(error, hub.waits[failures - 1], console)
            elif isinstance(error, _BrokenOffError):
                raise DsakvError(f"the download of {located.source} broke off: {error}", AGAIN) from error
            else:
                raise


def _receive(file: io.FileIO, located: Located, hub: Hub, advance: Callable[[int], None]) -> None:
    """One request for what follows the end of ``file``."""
    from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status

    source, have = located.source, file.tell()
    url = hf_hub_url(source.repo, source.file, repo_type=source.kind, revision=located.commit, endpoint=hub.endpoint)
    headers = {"Accept-Encoding": "identity"}
    if secret := token():
        headers["Authorization"] = f"Bearer {secret}"
    if have:
        headers["Range"] = f"bytes={have}-"
    with get_session().stream("GET", url, headers=headers, timeout=hub.timeout) as response:
        if response.status_code == 416:  # the hub has nothing behind this: it was never part of the file
            _restart(file)
            raise _BrokenOffError(f"no bytes from {have} on")
        hf_raise_for_status(response)
        goes_on = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if have and not (response.status_code == 206 and goes_on):
            _restart(file)
        for chunk in response.iter_bytes():
            write_all(file, chunk)
            advance(len(chunk))
    if located.size is not None and file.tell() < located.size:
        raise _BrokenOffError(f"{file.tell()} of {located.size} bytes came")


def _restart(file: io.FileIO) -> None:
    file.truncate(0)
    file.seek(0)


def _check_space(cache: Path, needed: int) -> None:
    """Say before the work, not after it, that the disk is too small."""
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise DsakvError(
            f"the disk is too full: {needed / MB:.0f} MB are needed in {cache}, {free / MB:.0f} MB are free", _ELSEWHERE
        )
