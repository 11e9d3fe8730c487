"""Downloads by the real client library from a hub on this machine."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download

from dsakv.console import Console
from dsakv.errors import DsakvError, InputError
from dsakv.hub.client import Hub, Source
from dsakv.hub.download import Download, download
from dsakv.trace.files import TEMP
from tests.hub.server import COMMIT, Repo, Server, serving

CONTENT = random.Random(1).randbytes(600_000)
BRANCH = Source("owner/set", "data/file.bin", "main")
PINNED = Source("owner/set", "data/file.bin", COMMIT)
TOKEN = "hf_secretsecretsecret"


@pytest.fixture
def repo(server: Server) -> Repo:
    repo = server.repos["owner/set"] = Repo({"data/file.bin": CONTENT, "other.bin": b"other"})
    return repo


def fetched(source: Source, hub: Hub) -> tuple[Download, str]:
    """What is downloaded, and what is said meanwhile."""
    log = StringIO()
    return download(source, Console(StringIO(), log), hub), log.getvalue()


def failed(source: Source, hub: Hub, kind: type[DsakvError] = DsakvError) -> DsakvError:
    with pytest.raises(DsakvError) as caught:
        fetched(source, hub)
    assert type(caught.value) is kind
    assert caught.value.hint
    assert TOKEN not in caught.value.message + caught.value.hint
    return caught.value


def partials(hub: Hub) -> list[Path]:
    return list(hub.cache.rglob(f"*{TEMP}"))


@pytest.mark.parametrize("source", [BRANCH, PINNED], ids=["branch", "commit"])
@pytest.mark.parametrize("lfs", [True, False], ids=["large", "small"])
def test_a_file_is_downloaded_once(source: Source, lfs: bool, repo: Repo, server: Server, hub: Hub) -> None:
    repo.lfs = lfs
    found, log = fetched(source, hub)
    assert found.path.read_bytes() == CONTENT
    assert found.path.is_relative_to(hub.cache)
    assert (found.commit, found.bytes) == (COMMIT, len(CONTENT))
    assert found.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert log.splitlines()[-1].startswith("downloading data/file.bin: 1/1 MB")
    asked = len(server.requests)
    again, log = fetched(source, hub)
    assert (again, log) == (found, "")
    assert len(server.requests) - asked == (source is BRANCH)  # what a branch is now, and no body
    assert server.ranges() == [None]


def test_the_cache_is_that_of_the_client(repo: Repo, server: Server, hub: Hub) -> None:
    """What dsakv downloaded, others find, and the other way round."""
    found, _ = fetched(BRANCH, hub)
    get = partial(hf_hub_download, BRANCH.repo, repo_type="dataset", cache_dir=hub.cache, endpoint=hub.endpoint)
    assert get(BRANCH.file, local_files_only=True) == str(found.path)
    get("other.bin")
    bodies = server.count("GET")
    assert fetched(replace(BRANCH, file="other.bin"), hub)[0].path.read_bytes() == b"other"
    assert server.count("GET") == bodies


def test_offline_takes_what_the_cache_has(repo: Repo, server: Server, hub: Hub) -> None:
    online, _ = fetched(BRANCH, hub)
    asked = len(server.requests)
    offline = replace(hub, offline=True)
    assert fetched(BRANCH, offline) == (online, "")
    assert fetched(PINNED, offline) == (online, "")
    for source in (replace(BRANCH, file="other.bin"), replace(BRANCH, revision="v1")):
        error = failed(source, offline)
        assert f"{source} at revision {source.revision} is not in the cache" in error.message
        assert "HF_HUB_OFFLINE" in error.hint
    assert len(server.requests) == asked


def test_an_interrupted_download_goes_on(repo: Repo, server: Server, hub: Hub) -> None:
    impatient = replace(hub, waits=())
    repo.cuts = [200_000, 100_000]
    assert "broke" in failed(PINNED, impatient).message
    (partial,) = partials(hub)
    assert partial.read_bytes() == CONTENT[:200_000]
    failed(PINNED, impatient)
    found, log = fetched(PINNED, impatient)
    assert found.path.read_bytes() == CONTENT
    assert "going on after 0.3 MB of an earlier attempt" in log
    assert server.ranges() == [None, "bytes=200000-", "bytes=300000-"]
    assert not partials(hub)


def test_a_connection_that_breaks_is_taken_up_again(repo: Repo, server: Server, hub: Hub) -> None:
    """However often, as long as each attempt brings something."""
    repo.cuts = [100_000] * 4
    found, log = fetched(PINNED, hub)
    assert found.path.read_bytes() == CONTENT
    assert log.count("the connection broke; trying again in 0 s") == 4
    assert server.ranges()[-1] == "bytes=400000-"


def test_ctrl_c_leaves_what_was_received(repo: Repo, server: Server, hub: Hub) -> None:
    class Interrupting(Console):
        def info(self, text: str) -> None:
            raise KeyboardInterrupt

    repo.cuts = [150_000]
    with pytest.raises(KeyboardInterrupt):
        download(PINNED, Interrupting(StringIO(), StringIO()), hub)
    assert [path.stat().st_size for path in partials(hub)] == [150_000]
    assert fetched(PINNED, hub)[0].path.read_bytes() == CONTENT


@pytest.mark.parametrize("size", [1, 600_000, 700_000], ids=["start", "all", "more than all"])
def test_a_hub_without_ranges_starts_over(size: int, repo: Repo, server: Server, hub: Hub) -> None:
    repo.ranges = False
    blobs = hub.cache / "datasets--owner--set" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{repo.etag('data/file.bin')}{TEMP}").write_bytes(CONTENT[:size].ljust(size, b"x"))
    assert fetched(PINNED, hub)[0].path.read_bytes() == CONTENT


def test_a_body_that_ends_early(repo: Repo, server: Server, hub: Hub) -> None:
    repo.short = 200_000
    error = failed(PINNED, hub)
    assert error.message == "the download of owner/set/data/file.bin broke off: 200000 of 600000 bytes came"
    assert [path.stat().st_size for path in partials(hub)] == [200_000]
    repo.short = None
    assert fetched(PINNED, hub)[0].path.read_bytes() == CONTENT


@pytest.mark.parametrize("body", [CONTENT[:-1] + b"?", CONTENT + b"?"], ids=["other", "longer"])
def test_a_body_that_is_not_what_was_announced(body: bytes, repo: Repo, server: Server, hub: Hub) -> None:
    repo.served["data/file.bin"] = body
    assert "is not what the hub announced" in failed(PINNED, hub).message
    assert not partials(hub)
    repo.served.clear()
    assert fetched(PINNED, hub)[0].path.read_bytes() == CONTENT


@pytest.mark.parametrize("lfs", [True, False], ids=["large", "small"])
def test_a_damaged_cache_is_told_and_mended(lfs: bool, repo: Repo, server: Server, hub: Hub) -> None:
    repo.lfs = lfs
    path = fetched(PINNED, hub)[0].path
    with open(path, "r+b") as file:
        file.write(b"damage")
    error = failed(PINNED, hub)
    assert "is damaged" in error.message
    assert "again" in error.hint
    assert fetched(PINNED, hub)[0].path.read_bytes() == CONTENT


def test_a_cache_without_links_is_verified_too(repo: Repo, server: Server, hub: Hub) -> None:
    path = fetched(PINNED, hub)[0].path
    blob = path.resolve()
    path.unlink()
    blob.rename(path)
    assert fetched(PINNED, hub)[0].path == path
    path.write_bytes(b"damage")
    failed(PINNED, hub)
    path.write_bytes(CONTENT)
    assert "unverified" in fetched(PINNED, replace(hub, offline=True))[1]


def test_the_token_goes_to_the_hub_alone(repo: Repo, server: Server, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repo.tokens = (TOKEN,)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving() as storage:
        storage.repos["owner/set"] = Repo(repo.files)
        repo.redirect = storage.address.replace("127.0.0.1", "localhost")
        assert fetched(PINNED, hub)[0].path.read_bytes() == CONTENT
        assert server.count("GET") == storage.count("GET") == 1
        assert all(headers["authorization"] == f"Bearer {TOKEN}" for _, _, headers in server.requests)
        assert not any("authorization" in headers for _, _, headers in storage.requests)


def test_a_token_that_is_none(repo: Repo, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\x01é")
    assert "characters that no token has" in failed(PINNED, hub, InputError).message


ACCESS: dict[str, tuple[Callable[[Repo], object], str, str]] = {
    "gated": (lambda repo: vars(repo).update(gated=True, tokens=("other",)), "is gated", "accept the terms at http"),
    "private": (lambda repo: vars(repo).update(tokens=("other",)), "", "HF_TOKEN"),
    "refused": (lambda repo: repo.statuses.append(403), "(status 403)", "HF_TOKEN"),
}


@pytest.mark.parametrize("token", ["", TOKEN], ids=["no token", "wrong token"])
@pytest.mark.parametrize("case", ACCESS)
def test_no_access(
    case: str, token: str, repo: Repo, server: Server, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, message, hint = ACCESS[case]
    spoil(repo)
    monkeypatch.setenv("HF_TOKEN", token)
    missing = case == "private" and not token  # the hub does not tell such a one from one that is not there
    error = failed(PINNED, hub, InputError if missing else DsakvError)
    assert ("or it is private" if missing else message) in error.message
    assert hint in error.hint
    assert ("your token" in error.message + error.hint or "that account" in error.hint) or not token
    assert server.count("GET") == 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (replace(PINNED, repo="owner/none"), "no data set owner/none on http"),
        (replace(PINNED, revision="v9"), "owner/set has no revision v9"),
        (replace(PINNED, file="none.bin"), "owner/set has no file none.bin"),
        (replace(PINNED, repo="a/b/c"), "a/b/c is no name of a data set"),
        (replace(PINNED, repo="a b"), "a b is no name of a data set"),
        (replace(PINNED, revision="../../x"), "--revision ../../x is no revision"),
        (replace(PINNED, revision="x y"), "--revision x y is no revision"),
    ],
)
def test_what_is_not_there(source: Source, message: str, repo: Repo, hub: Hub) -> None:
    assert failed(source, hub, InputError).message.startswith(message)


@pytest.mark.parametrize("status", [500, 503])
def test_a_busy_hub_is_asked_again(status: int, repo: Repo, server: Server, hub: Hub) -> None:
    repo.statuses = [status, 0, status]  # the question, its answer, the body
    found, log = fetched(PINNED, hub)
    assert found.path.read_bytes() == CONTENT
    assert log.count(f"the hub answers with status {status}; trying again in 0 s") == 2
    repo.statuses = [status] * 2
    error = failed(replace(BRANCH, file="other.bin"), hub)
    assert f"for now (status {status})" in error.message
    assert "again" in error.hint


def test_a_hub_that_limits_requests(repo: Repo, server: Server, hub: Hub) -> None:
    repo.statuses, repo.headers = [429], {"Retry-After": "120"}
    error = failed(PINNED, hub)
    assert "no more requests" in error.message
    assert error.hint == "wait 120 s, then again; with HF_TOKEN more requests are allowed"


def test_something_that_is_no_hub(repo: Repo, hub: Hub) -> None:
    repo.plain = True
    error = failed(PINNED, hub)
    assert "does not answer as a Hugging Face hub does" in error.message
    assert "HF_ENDPOINT" in error.hint


def test_no_network(hub: Hub) -> None:
    endpoint = "http://127.0.0.1:9"
    error = failed(PINNED, replace(hub, endpoint=endpoint))
    assert error.message.startswith(f"cannot reach {endpoint}: ")
    assert "HF_HUB_OFFLINE=1" in error.hint


def test_a_hub_that_never_answers(hub: Hub) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent_hub = replace(hub, endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.05)
        error = failed(PINNED, silent_hub)
    assert "broke" in error.message


def test_a_disk_that_is_too_small(repo: Repo, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 100_000

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    error = failed(PINNED, hub)
    assert error.message.startswith("the disk is too full: 1 MB are needed")
    assert "HF_HOME" in error.hint


def test_a_cache_that_cannot_be_written(repo: Repo, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = failed(PINNED, replace(hub, cache=tmp_path / "file"))
    assert error.message.startswith(f"cannot write {tmp_path / 'file'}")


def test_no_partial_file_has_the_name_of_a_whole_one(repo: Repo, hub: Hub) -> None:
    repo.short = 10
    failed(PINNED, hub)
    names = [path.name for path in hub.cache.rglob("*") if path.is_file()]
    assert repo.etag("data/file.bin") not in names
    assert not any(os.path.islink(path) for path in hub.cache.rglob("*"))
