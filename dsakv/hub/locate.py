"""Where a file of the hub is: its commit, its checksum, and whether the cache has it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from dsakv.console import Console
from dsakv.errors import DsakvError
from dsakv.hub.client import Hub, Source, token
from dsakv.hub.failures import explained, http_error, is_passing, status_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Located:
    """A file at a commit."""

    source: Source
    commit: str
    checksum: str | None
    """What the hub announces: the SHA-256 of large files, the git blob id of others; None where neither is known."""
    size: int | None = None
    cached: Path | None = None
    """The file, where the cache has it."""


def locate(source: Source, hub: Hub, console: Console) -> Located:
    """Find ``source``. A commit that the cache holds needs no network; a branch or tag is looked up.

    Offline, the cache also says which commit a branch was at when it was last downloaded.

    Raises:
        InputError: no such data set or model, revision or file.
        DsakvError: no access, no network, or offline and not in the cache.
    """
    source.check()
    cached = _cached(source, hub)
    if cached is not None and (hub.offline or (cached.checksum and is_commit(source.revision))):
        return cached
    if hub.offline:
        raise DsakvError(
            f"{source} at revision {source.revision} is not in the cache {hub.cache}, and HF_HUB_OFFLINE is set",
            "unset HF_HUB_OFFLINE to download it, or copy the cache from a machine that has it",
        )
    found = _ask(source, hub, console)
    cached = _cached(replace(source, revision=found.commit), hub)
    if cached is None:
        return found
    return Located(source, found.commit, found.checksum, found.size, cached.cached)


def is_commit(revision: str) -> bool:
    """Whether ``revision`` names a commit in full, so that it never means anything else."""
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def patiently(call: Callable[[], T], hub: Hub, console: Console) -> T:
    """``call``, again after each of the hub's ``waits`` while it fails in a way that passes."""
    for wait in hub.waits:
        try:
            return call()
        except http_error() as error:
            if not is_passing(error):
                raise
            say_wait(error, wait, console)
    return call()


def say_wait(error: Exception, wait: float, console: Console) -> None:
    """Say that the hub failed for now, and wait."""
    status = status_of(error)
    what = "the connection broke" if status is None else f"the hub answers with status {status}"
    console.info(f"{what}; trying again in {wait:g} s")
    time.sleep(wait)


def _cached(source: Source, hub: Hub) -> Located | None:
    from huggingface_hub import try_to_load_from_cache

    with explained(source, hub):
        found = try_to_load_from_cache(
            source.repo, source.file, cache_dir=hub.cache, revision=source.revision, repo_type=source.kind
        )
    if not isinstance(found, str):
        return None
    path = Path(found)
    # snapshots/<commit>/<file>, a link to blobs/<checksum> unless the file system knows none.
    commit = path.parts[-len(source.file.split("/")) - 1]
    name = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    return Located(source, commit, checksum_of(name), cached=path)


def _ask(source: Source, hub: Hub, console: Console) -> Located:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with explained(source, hub):
        url = hf_hub_url(
            source.repo, source.file, repo_type=source.kind, revision=source.revision, endpoint=hub.endpoint
        )
        found = patiently(
            lambda: get_hf_file_metadata(url, token=token() or False, timeout=hub.timeout, endpoint=hub.endpoint),
            hub,
            console,
        )
    commit, checksum = found.commit_hash or "", checksum_of(found.etag or "")
    if not is_commit(commit) or checksum is None:
        raise DsakvError(
            f"{hub.endpoint} does not answer as a Hugging Face hub does: no commit or checksum for {source}",
            "check HF_ENDPOINT, and that no proxy or login page answers in its place",
        )
    return Located(source, commit, checksum, found.size)


def checksum_of(name: str) -> str | None:
    """An ETag or blob name as a checksum, where it is one."""
    return name if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name) else None
