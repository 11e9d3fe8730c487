"""``dsakv fetch-data``: data sets from the hub, as plain files that ``dsakv trace`` reads."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType

import msgspec

from dsakv.config import FetchConfig
from dsakv.console import MB, Console
from dsakv.errors import InputError
from dsakv.hub import sources
from dsakv.hub.archive import members, reading
from dsakv.hub.client import Hub, Source
from dsakv.hub.csv_rows import csv_rows
from dsakv.hub.download import download
from dsakv.hub.export import Note, Origin, check_target, exporting, up_to_date
from dsakv.hub.json_rows import array_rows
from dsakv.hub.locate import is_commit, locate
from dsakv.hub.streamed import commit_of, streamed_rows
from dsakv.settings import nearest
from dsakv.workloads.ruler.templates import TASKS

BURSTGPT_COLUMNS = ("Timestamp", "Request tokens", "Response tokens")


@dataclass(frozen=True, slots=True)
class Fetcher:
    """What all data sets share: the options, and where to look and to report."""

    config: FetchConfig
    console: Console
    hub: Hub

    def asked(self, source: Source) -> Source:
        """The source at the revision asked for."""
        return source if self.config.revision is None else replace(source, revision=self.config.revision)

    def commit(self, source: Source) -> str:
        """The commit that the source's revision is; the hub is asked only where it is not one itself."""
        if is_commit(source.revision):
            return source.revision
        commit = locate(source, self.hub, self.console).commit
        self.tell_commit(source.repo, source.revision, commit)
        return commit

    def tell_commit(self, repo: str, revision: str, commit: str) -> None:
        """Say what a name that can move stands for today."""
        if revision != commit:
            self.console.info(f"{repo}: {revision} is now commit {commit}, which --revision fetches again later")

    def target(self, folder: str, stem: str, suffix: str) -> Path:
        """Where a file goes; the number of rows is part of its name where it is limited."""
        limit = f"_limit{self.config.limit}" if self.config.limit else ""
        return Path(self.config.out) / folder / f"{stem}{limit}{suffix}"

    def origin(self, source: Source, commit: str) -> Origin:
        return Origin(repo=source.repo, file=source.file, commit=commit, limit=self.config.limit or None)

    def limited(self, rows: Iterable[bytes]) -> Iterable[bytes]:
        return islice(rows, self.config.limit) if self.config.limit else rows

    def is_current(self, target: Path, origin: Origin) -> bool:
        """Whether ``target`` need not be fetched, which is said; otherwise it must be possible to write it."""
        note = up_to_date(target, origin)
        if note is None:
            check_target(target)
            return False
        self.tell(target, note, "up to date")
        return True

    def tell(self, target: Path, note: Note, what: str) -> None:
        source = note.repo if note.file is None else f"{note.repo}/{note.file}"
        self.console.info(
            f"{what}: {target} ({note.rows} rows, {note.bytes / MB:.1f} MB, from {source} at commit {note.commit[:12]})"
        )


def fetch(name: str, config: FetchConfig, console: Console, hub: Hub | None = None) -> list[Path]:
    """Fetch data set ``name`` (a key of ``FETCHERS``), and return the files that hold it.

    A file that is there already, unchanged and from the same commit, is kept. ``hub`` is that of the environment
    unless given.

    Raises:
        InputError: a task, revision, file or split that does not exist, or a file that is not what it should be.
        DsakvError: no access, no network, a damaged file, a disk that is full or not writable.
    """
    paths, flag = FETCHERS[name](Fetcher(config, console, hub or Hub.from_environment()))
    held = Path(config.out, "ruler") if name == "ruler" else paths[0]
    console.info(f"next: dsakv trace {name} {flag} {shlex.quote(str(held))}")
    return paths


def _ruler(fetcher: Fetcher) -> tuple[list[Path], str]:
    config, source = fetcher.config, fetcher.asked(sources.RULER)
    tasks = dict.fromkeys(task for name in config.tasks for task in (TASKS if name == "all" else (name,)))
    if unknown := [task for task in tasks if task not in TASKS]:
        raise InputError(
            f"unknown RULER task {unknown[0]!r}", f"did you mean {nearest(unknown[0], TASKS)}? All: {', '.join(TASKS)}"
        )
    names = [f"{task}/validation_{length}.jsonl" for length in dict.fromkeys(config.lengths) for task in tasks]
    if not names:
        raise InputError("no RULER task or no length is chosen", "leave --tasks and --lengths out for the defaults")
    targets = {name: Path(config.out, "ruler", name) for name in names}
    origin = fetcher.origin(source, fetcher.commit(source))
    wanted = {f"data/ruler/{name}": path for name, path in targets.items() if not fetcher.is_current(path, origin)}
    if wanted:
        _from_archive(fetcher, source, wanted)
    return list(targets.values()), "--ruler-data"


def _from_archive(fetcher: Fetcher, source: Source, wanted: Mapping[str, Path]) -> None:
    """Write the files of the archive that are ``wanted``, by their paths in it."""
    console = fetcher.console
    archive = download(source, console, fetcher.hub)
    origin = fetcher.origin(source, archive.commit)
    with console.megabytes(archive.bytes, f"reading {source.file}") as advance:
        for place, content in members(archive.path, wanted, str(source), advance, console.warn):
            with exporting(wanted[place], origin, source.revision, archive.sha256) as export, reading(str(source)):
                for line in fetcher.limited(filter(bytes.strip, content)):
                    _check_object(line, f"{source}: {place}: row {export.rows}")
                    export.write(line if line.endswith(b"\n") else line + b"\n")
            fetcher.tell(wanted[place], export.note, "written")


def _check_object(line: bytes, place: str) -> None:
    try:
        msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{place} is no JSON object: {error}", "fetch another --revision") from error


def _longbenchv2(fetcher: Fetcher) -> tuple[list[Path], str]:
    target = fetcher.target("longbenchv2", "longbenchv2_train", ".jsonl")
    return [_from_file(fetcher, sources.LONGBENCH_V2, target, array_rows)], "--longbenchv2-data"


def _sharegpt(fetcher: Fetcher) -> tuple[list[Path], str]:
    config = fetcher.config
    if not re.fullmatch(r"\w[\w.-]*", config.split):
        raise InputError(f"--split {config.split} is no name of a split", "such as train; --limit keeps a part of it")
    target = fetcher.target("sharegpt", f"sharegpt_{config.split}", ".jsonl")
    if config.sharegpt_dataset != sources.SHAREGPT.repo:
        _from_rows(fetcher, target)
    elif config.split != "train":
        raise InputError(f"{sources.SHAREGPT.repo} has no split {config.split}", "it is one file: --split train")
    else:
        _from_file(fetcher, sources.SHAREGPT, target, array_rows)
    return [target], "--sharegpt-json"


def _burstgpt(fetcher: Fetcher) -> tuple[list[Path], str]:
    file = fetcher.config.burstgpt_file
    if "/" in file or not file.endswith(".csv"):
        raise InputError(f"--burstgpt-file {file} is no name of a CSV file", "such as BurstGPT_1.csv")

    def rows(path: Path, name: str) -> Iterable[bytes]:
        return csv_rows(path, name, BURSTGPT_COLUMNS)

    target = fetcher.target("burstgpt", "burstgpt_train", ".csv")
    source = replace(sources.BURSTGPT, file=f"data/{file}")
    return [_from_file(fetcher, source, target, rows, header=True)], "--burstgpt-csv"


def _from_file(
    fetcher: Fetcher,
    source: Source,
    target: Path,
    read: Callable[[Path, str], Iterable[bytes]],
    *,
    header: bool = False,
) -> Path:
    """Write the rows that ``read`` finds in the downloaded file; a ``header`` is a line before them."""
    source = fetcher.asked(source)
    if fetcher.is_current(target, fetcher.origin(source, fetcher.commit(source))):
        return target
    found = download(source, fetcher.console, fetcher.hub)
    with exporting(target, fetcher.origin(source, found.commit), source.revision, found.sha256) as export:
        rows = iter(read(found.path, str(source)))
        if header:
            export.write(next(rows), rows=0)
        for row in fetcher.limited(rows):
            export.write(row)
    fetcher.tell(target, export.note, "written")
    return target


def _from_rows(fetcher: Fetcher, target: Path) -> None:
    """Write the rows of a data set that is no single file."""
    config, console = fetcher.config, fetcher.console
    repo, revision = config.sharegpt_dataset, config.revision or "main"
    commit = commit_of(repo, revision, fetcher.hub, console)
    fetcher.tell_commit(repo, revision, commit)
    origin = Origin(repo=repo, file=None, commit=commit, limit=config.limit or None, split=config.split)
    if fetcher.is_current(target, origin):
        return
    with (
        exporting(target, origin, revision, None) as export,
        console.progress(config.limit or None, f"streaming {repo}", "rows") as advance,
    ):
        for row in fetcher.limited(streamed_rows(repo, commit, config.split)):
            export.write(row)
            advance(1)
    fetcher.tell(target, export.note, "written")


FETCHERS: Mapping[str, Callable[[Fetcher], tuple[list[Path], str]]] = MappingProxyType(
    {"ruler": _ruler, "longbenchv2": _longbenchv2, "sharegpt": _sharegpt, "burstgpt": _burstgpt}
)
"""By name of the data set: a function that fetches it, and returns the files and the flag of ``trace`` for them."""
