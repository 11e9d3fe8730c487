"""A hub on the loopback interface, as much of it as the real client libraries ask for."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = hashlib.sha1(b"a commit").hexdigest()
RESOLVE = re.compile(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
API = re.compile(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info|refs)(?:/([^/]+))?(?:/(.*))?)?")


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """A data set, and what is wrong with it."""

    files: dict[str, bytes]
    commit: str = COMMIT
    branches: tuple[str, ...] = ("main",)
    gated: bool = False
    tokens: tuple[str, ...] = ()
    """Tokens that may read it; without any, everyone may."""
    lfs: bool = True
    redirect: str = ""
    """Where bodies are, if elsewhere."""
    served: dict[str, bytes] = field(default_factory=dict)
    """Bodies that differ from what is announced."""
    cuts: list[int] = field(default_factory=list)
    """Bytes after which each of the next bodies breaks off."""
    short: int | None = None
    """Bytes after which a body ends, as if it were whole."""
    ranges: bool = True
    statuses: list[int] = field(default_factory=list)
    """Statuses of the next answers; 0 serves as usual."""
    headers: dict[str, str] = field(default_factory=dict)
    plain: bool = False
    """Answer without the headers of a hub."""

    def etag(self, name: str) -> str:
        content = self.files[name]
        return hashlib.sha256(content).hexdigest() if self.lfs else git_id(content)


@dataclass
class Server:
    """A running server: its data sets by name, and what it was asked."""

    address: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    """Method, path and headers, with names in lower case."""

    def count(self, method: str) -> int:
        return Counter(asked for asked, _, _ in self.requests)[method]

    def ranges(self) -> list[str | None]:
        """The Range header of each GET of a file."""
        return [h.get("range") for method, path, h in self.requests if method == "GET" and "/resolve/" in path]


@contextmanager
def serving() -> Iterator[Server]:
    """A hub on a port of its own."""
    server = Server()

    class Handler(_Handler):
        hub = server

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.address = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._serve(body)

    def _serve(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append((self.command, path, headers))
        found = RESOLVE.fullmatch(path) or API.fullmatch(path)
        repo = self.hub.repos.get(found[1]) if found else None
        if found is None or repo is None:
            return self._refuse(401 if found else 404, "RepoNotFound" if found else "EntryNotFound")
        if repo.statuses and (status := repo.statuses.pop(0)):
            return self._refuse(status, "", repo.headers)
        if repo.tokens and headers.get("authorization", "").removeprefix("Bearer ") not in repo.tokens:
            known = "authorization" in headers
            return self._refuse(403 if known else 401, "GatedRepo" if repo.gated else "" if known else "RepoNotFound")
        if found.re is API:
            return self._api(repo, found, body)
        _, revision, name = found.groups()
        if revision not in (repo.commit, *repo.branches):
            return self._refuse(404, "RevisionNotFound")
        if name not in repo.files:
            return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": repo.commit})
        return self._file(repo, name)

    def _file(self, repo: Repo, name: str) -> None:
        size, etag = len(repo.files[name]), repo.etag(name)
        facts = {"X-Repo-Commit": repo.commit, "ETag": f'"{etag}"'}
        if repo.lfs:
            facts |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(size)}
        facts = {"ETag": '"W/x"'} if repo.plain else facts
        content = repo.served.get(name, repo.files[name])
        if repo.redirect:
            moved = {"Location": repo.redirect + self.path, "Content-Length": "0"}
            return self._answer(302, b"", facts | moved)
        if self.command == "HEAD":
            return self._answer(200, b"", facts | {"Content-Length": str(size)})
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and repo.ranges else 0
        if start and start >= len(content):
            return self._refuse(416, "")
        body = content[start : repo.short]
        facts["Content-Length"] = str(len(body))
        if start:
            facts["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if repo.cuts:
            body = body[: repo.cuts.pop(0)]
            self.close_connection = True
        return self._answer(206 if start else 200, body, facts)

    def _api(self, repo: Repo, found: re.Match[str], body: bytes) -> None:
        name, kind, revision, path = found.groups()
        if kind in ("revision", "tree", "paths-info") and revision not in (repo.commit, *repo.branches):
            return self._refuse(404, "RevisionNotFound")
        if kind in (None, "revision"):
            siblings = [{"rfilename": file} for file in repo.files]
            return self._json({"id": name, "sha": repo.commit, "private": False, "gated": False, "siblings": siblings})
        if kind == "refs":
            return self._json({"branches": [], "tags": [], "converts": []})
        files = [self._entry(repo, file) for file in repo.files]
        if kind == "tree":
            return self._tree(repo, f"{path}/" if path else "", files)
        wanted = re.findall(r'[^"&=]+', body.decode()) if body else []
        return self._json([entry for entry in files if entry["path"] in json.dumps(wanted)])

    def _tree(self, repo: Repo, below: str, files: list[dict[str, Any]]) -> None:
        found = [entry for entry in files if entry["path"].startswith(below)]
        if not found:
            return self._refuse(404, "EntryNotFound")
        names = {below + entry["path"].removeprefix(below).split("/")[0] for entry in found}
        folders = [{"type": "directory", "path": name, "size": 0, "oid": repo.commit} for name in names]
        deep = "recursive=true" in self.path.lower()
        here = [entry for entry in found if deep or entry["path"] in names]
        return self._json([entry for entry in folders if entry["path"] not in repo.files] + here)

    @staticmethod
    def _entry(repo: Repo, name: str) -> dict[str, Any]:
        content = repo.files[name]
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git_id(content)}
        if repo.lfs:
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self._answer(200, body, {"Content-Type": "application/json", "Content-Length": str(len(body))})

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        facts = {"X-Error-Code": code} if code else {}
        self._answer(status, b"", facts | (headers or {}) | {"Content-Length": "0"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
