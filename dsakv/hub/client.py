"""Which hub is asked, what is asked of it, and where its files are kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from dsakv.errors import InputError


@dataclass(frozen=True, slots=True)
class Source:
    """A file of a data set, or of a model, on the hub."""

    repo: str
    file: str
    revision: str
    """Commit, branch or tag."""
    kind: Literal["dataset", "model"] = "dataset"

    def __str__(self) -> str:
        return f"{self.repo}/{self.file}"

    def check(self) -> None:
        """Raises InputError where the revision cannot be the name of one."""
        check_revision(self.revision)

    @property
    def what(self) -> str:
        """What ``repo`` is, in words."""
        return {"dataset": "data set", "model": "model"}[self.kind]


@dataclass(frozen=True, slots=True)
class Hub:
    """A hub and the cache that it shares with every program of ``huggingface_hub``."""

    endpoint: str
    cache: Path
    offline: bool = False
    waits: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Seconds before each further attempt where a connection breaks or the hub is busy."""
    timeout: float = 10.0
    """Seconds without an answer after which a connection counts as broken."""

    @classmethod
    def from_environment(cls) -> Hub:
        """As ``huggingface_hub`` itself understands ``HF_ENDPOINT``, ``HF_HOME``, ``HF_HUB_OFFLINE`` and the rest.

        Raises InputError for an ``HF_ENDPOINT`` that is no address.
        """
        from huggingface_hub import constants

        try:
            parts = urlsplit(constants.ENDPOINT)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise InputError(
                f"HF_ENDPOINT is no address: {constants.ENDPOINT}", "such as https://huggingface.co, or leave it unset"
            )
        return cls(
            endpoint=constants.ENDPOINT,
            cache=Path(constants.HF_HUB_CACHE),
            offline=constants.is_offline_mode(),
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        )

    def page(self, source: Source) -> str:
        """Address of a data set's or a model's page."""
        return f"{self.endpoint}/{'datasets/' if source.kind == 'dataset' else ''}{source.repo}"


def token() -> str | None:
    """The token that requests carry: ``HF_TOKEN``, or that of ``hf auth login``.

    Raises InputError for one that cannot stand in a request; it is never said.
    """
    from huggingface_hub import constants, get_token

    found = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    if found is not None and not re.fullmatch(r"[!-~]+", found):
        raise InputError(
            "the token in HF_TOKEN, or of hf auth login, holds characters that no token has",
            "copy it again from the settings page of your account on the hub",
        )
    return found


def check_revision(revision: str) -> None:
    """Raises InputError where ``revision`` cannot be a commit, branch or tag."""
    if not re.fullmatch(r"[\w.+@/-]+", revision) or ".." in revision or revision.startswith(("/", "-")):
        raise InputError(f"--revision {revision} is no revision", "give a commit, a branch or a tag of the data set")


@contextmanager
def only_errors() -> Iterator[None]:
    """Keep the client's own log lines from stderr; what matters in them is said by dsakv."""
    from logging import ERROR

    import huggingface_hub

    before = huggingface_hub.logging.get_verbosity()
    huggingface_hub.logging.set_verbosity(ERROR)
    try:
        yield
    finally:
        huggingface_hub.logging.set_verbosity(before)
