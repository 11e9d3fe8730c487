"""What the hub's client raises, in the user's words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from dsakv.errors import DsakvError, InputError
from dsakv.hub.client import Hub, Source, only_errors, token

AGAIN = "run the command again in a while: it goes on where it stopped"
UNREACHABLE = {"ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol"}
"""Errors of a connection that never was, by the names of their classes."""


def http_error() -> type[Exception]:
    """The base of every error of a request, answered or not.

    The HTTP library below ``huggingface_hub`` changes its name with the version: the public error leads to it.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return cast("type[Exception]", HfHubHTTPError.__bases__[0])


def status_of(error: BaseException) -> int | None:
    """The hub's status code; None where it gave no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_passing(error: BaseException) -> bool:
    """Whether another attempt may succeed: a connection that broke, a hub that is overloaded."""
    status = status_of(error)
    return type(error).__name__ not in UNREACHABLE if status is None else status >= 500


def reason(error: BaseException) -> str:
    """An error in a few words."""
    status = status_of(error)
    if status is not None:
        return f"status {status}"
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def explained(source: Source, hub: Hub) -> Iterator[None]:
    """Turn what a request for ``source`` raises into DsakvError, or InputError where the name of it is wrong.

    The client's own warnings stay off stderr meanwhile.
    """
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        with only_errors():
            yield
    except HFValidationError as error:
        raise InputError(f"{source.repo} is no name of a {source.what}", "such as owner/name") from error
    except LocalEntryNotFoundError as error:
        raise DsakvError(
            f"{hub.endpoint} answered, and then no longer: {reason(error.__cause__ or error)}", AGAIN
        ) from error
    except http_error() as error:
        raise _explain(error, source, hub) from error


def _explain(error: Exception, source: Source, hub: Hub) -> DsakvError:
    from huggingface_hub.errors import (
        GatedRepoError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = hub.page(source)
    if isinstance(error, GatedRepoError):
        return _gated(source, page)
    if isinstance(error, RevisionNotFoundError):
        return InputError(
            f"{source.repo} has no revision {source.revision}", f"choose a commit, branch or tag of {page}/commits"
        )
    if isinstance(error, RemoteEntryNotFoundError):
        return InputError(
            f"{source.repo} has no file {source.file} at revision {source.revision}", f"see {page}/tree/main"
        )
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"no {source.what} {source.repo} on {hub.endpoint}, or it is private",
            "check the name; a private one needs HF_TOKEN" if token() is None else "check the name, and HF_TOKEN",
        )
    status = status_of(error)
    if status is None and type(error).__name__ not in UNREACHABLE:
        return DsakvError(f"the connection to {hub.endpoint} broke: {reason(error)}", AGAIN)
    if status is None:
        return DsakvError(
            f"cannot reach {hub.endpoint}: {reason(error)}",
            "check the network and proxies; HF_HUB_OFFLINE=1 takes what was downloaded before, HF_ENDPOINT a mirror",
        )
    return _refused(status, _seconds(error), source, hub)


def _gated(source: Source, page: str) -> DsakvError:
    if token() is None:
        return DsakvError(
            f"{source.repo} is gated: only accounts that accepted its terms may download it",
            f"accept the terms at {page}, then set HF_TOKEN to a token of that account",
        )
    return DsakvError(
        f"{source.repo} is gated, and the account of your token has no access",
        f"accept the terms at {page} with that account; its token must be allowed to read gated data",
    )


def _refused(status: int, wait: str | None, source: Source, hub: Hub) -> DsakvError:
    """An answer that names no cause."""
    if status in (401, 403) and token() is None:
        return DsakvError(
            f"{hub.endpoint} refuses {source} without a token (status {status})",
            "set HF_TOKEN to a token of your account",
        )
    if status in (401, 403):
        return DsakvError(
            f"{hub.endpoint} refuses your token for {source} (status {status})",
            f"check HF_TOKEN: it may have expired, or lack the permission to read this {source.what}",
        )
    if status == 429:
        when = f"wait {wait} s" if wait else "wait some minutes"
        login = "" if token() else "; with HF_TOKEN more requests are allowed"
        return DsakvError(f"{hub.endpoint} takes no more requests for now (status 429)", f"{when}, then again{login}")
    if status >= 500:
        return DsakvError(f"{hub.endpoint} cannot serve {source} for now (status {status})", AGAIN)
    return DsakvError(
        f"{hub.endpoint} answers {source} with status {status}", "check HF_ENDPOINT and the proxies, or try again later"
    )


def _seconds(error: Exception) -> str | None:
    headers = getattr(getattr(error, "response", None), "headers", {})
    wait = headers.get("Retry-After", "")
    return wait if wait.isdigit() else None
