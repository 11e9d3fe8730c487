"""A conversion that is killed, full or interrupted goes on, redoes nothing, and never leaves what looks finished."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsakv.cli import guarded
from dsakv.config import ConvertConfig
from dsakv.console import Console
from dsakv.convert.journal import JOURNAL, open_journal
from dsakv.convert.plan import make_plan
from dsakv.convert.record import order_of
from dsakv.convert.source import open_source
from dsakv.errors import DsakvError
from dsakv.jobs.convert import convert
from tests.convert.checkpoints import make

RANKS = 2
SIZES = {"piece_bytes": 40_000, "batch_bytes": 150_000}
"""Small ones, so that a small checkpoint has many pieces and notes."""
DRIVER = """
import os, signal, sys, threading
from dsakv.cli import guarded
from dsakv.config import ConvertConfig
from dsakv.console import Console
from dsakv.jobs.convert import convert

source, target = sys.argv[1:3]
moment, number, ranks, piece_bytes, batch_bytes = map(int, sys.argv[3:])
lock, calls = threading.Lock(), 0

def counted(call):
    def wrapper(*arguments, **options):
        global calls
        with lock:  # held meanwhile: writes this small would all be done while the disk is waited for once
            calls += 1
            if calls == moment:
                if call is pwrite:  # in the midst of it
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
                os.kill(os.getpid(), number)
            return call(*arguments, **options)
    return wrapper

pwrite = os.pwrite
for name in ("pwrite", "ftruncate", "fdatasync", "fsync", "replace", "unlink", "mkdir"):
    setattr(os, name, counted(getattr(os, name)))
config = ConvertConfig(hf_ckpt_path=source, save_path=target, model_parallel=ranks, workers=2)
code = guarded(lambda: print(*convert(config, Console(), piece_bytes=piece_bytes, batch_bytes=batch_bytes)))
print(calls, file=sys.stderr)
sys.exit(code)
"""
"""Converts, and sends its own process a signal at its nth change of the disk."""


def driven(source: Path, target: Path, moment: int, number: int = signal.SIGKILL) -> subprocess.CompletedProcess[str]:
    numbers = map(str, (moment, int(number), RANKS, *SIZES.values()))
    command = [sys.executable, "-c", DRIVER, str(source), str(target), *numbers]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def again(source: Path, target: Path, ranks: int = RANKS, workers: int = 2, **options: Any) -> list[Path]:
    config = ConvertConfig(hf_ckpt_path=str(source), save_path=str(target), model_parallel=ranks, workers=workers)
    return convert(config, Console(), **SIZES, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("resume") / "source"
    make(directory, "fp8")
    return directory


@pytest.fixture(scope="module")
def whole(source: Path) -> dict[str, bytes]:
    """What a conversion makes that nothing disturbs."""
    again(source, source.parent / "whole")
    return contents(source.parent / "whole")


@pytest.fixture
def begun(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A conversion that a full disk has stopped half way."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing(40))
        with pytest.raises(DsakvError, match="the disk is full") as caught:
            again(source, tmp_path / "out", workers=1)  # so that the same pieces are there each time
    assert "the same command goes on" in caught.value.hint
    return tmp_path / "out"


def failing(after: int, then: Callable[[], object] | None = None) -> Callable[..., int]:
    """``os.pwrite`` that works so often; from then on the disk is full, or ``then`` is called each time."""
    write, left = os.pwrite, after

    def call(*arguments: Any) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            if then is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            then()
        return write(*arguments)

    return call


def test_killed_at_ten_random_moments(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    counted = driven(source, tmp_path / "count", 0)
    assert counted.returncode == 0
    moments = int(counted.stderr.splitlines()[-1])
    assert contents(tmp_path / "count") == whole
    rng, killed = random.Random(7), 0
    while killed < 10:
        moment = rng.randint(1, moments)
        target = tmp_path / f"{killed} at {moment}"
        code = driven(source, target, moment).returncode
        if code == 0:  # how threads take turns says how often the disk is waited for
            shutil.rmtree(target)
            continue
        assert code == -signal.SIGKILL
        killed += 1
        left = contents(target) if target.exists() else {}
        for name, found in left.items():
            if ".dsakv-tmp" not in name and not name.endswith((".partial", JOURNAL)):
                assert found == whole[name], name  # what has its name is whole
        assert "conversion.json" not in left or whole.keys() <= left.keys()
        again(source, target)
        assert contents(target) == whole, moment


def test_killed_again_and_again(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Each attempt may do a little more than the one before, and uses what that has left."""
    target = tmp_path / "out"
    codes: list[int] = []
    while not codes or codes[-1] != 0:
        codes.append(driven(source, target, 60 + 15 * len(codes)).returncode)
        assert len(codes) < 12
    assert set(codes[:-1]) == {-signal.SIGKILL}
    assert len(codes) > 2
    assert contents(target) == whole


def test_ctrl_c_leaves_what_goes_on(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    ran = driven(source, tmp_path / "out", 60, signal.SIGINT)
    assert ran.returncode == 130
    assert "the same command goes on where this one stopped" in ran.stderr
    assert "conversion.json" not in contents(tmp_path / "out")
    again(source, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_nothing_is_written_twice(
    source: Path, whole: dict[str, bytes], begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_source(source) as opened:
        plan = make_plan(opened, RANKS, SIZES["piece_bytes"])
        with open_journal(begun, order_of(plan)) as journal:
            noted = {(rank, piece) for rank in range(RANKS) for piece in journal.checksums[rank]}
        size = plan.size
        there = sum(end - start for start, end in (plan.files[rank].bounds(piece) for rank, piece in noted))
        places = [range(*plan.files[rank].bounds(piece)) for rank, piece in noted if rank == 0]
    assert 0 < there < size
    inodes = {path.name.removesuffix(".partial"): path.stat().st_ino for path in begun.glob("*.partial")}
    write, written = os.pwrite, 0
    first = os.stat(next(begun.glob("model0*.partial"))).st_ino

    def count(file: int, data: memoryview, at: int) -> int:
        nonlocal written
        written += len(data)
        assert os.fstat(file).st_ino != first or not any(at in place for place in places)
        return write(file, data, at)

    monkeypatch.setattr(os, "pwrite", count)
    paths = again(source, begun)
    assert written == size - there
    assert {path.name: path.stat().st_ino for path in paths} == inodes
    assert contents(begun) == whole


def test_a_finished_file_is_not_touched(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, replace = tmp_path / "out", os.replace

    def stop(old: Path, new: Path) -> None:
        if Path(new).name.startswith("model1"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(DsakvError, match="Input/output error"):
            again(source, target)
    assert {path.name for path in target.glob("model*")} == {
        "model0-mp2.safetensors",
        "model1-mp2.safetensors.partial",
    }
    before = [path.stat().st_mtime_ns for path in sorted(target.glob("model*"))]
    monkeypatch.setattr(os, "pwrite", failing(0))  # no byte is written
    after = [path.stat().st_mtime_ns for path in again(source, target)]
    assert after == before
    assert contents(target) == whole


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_journal_costs_time_only(
    data: st.DataObject, source: Path, whole: dict[str, bytes], begun: Path, tmp_path: Path
) -> None:
    """Cut off or overwritten anywhere behind its first line, which a kill cannot do to it."""
    target = tmp_path / "damaged"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(begun, target)
    journal = bytearray((target / JOURNAL).read_bytes())
    place = data.draw(st.integers(journal.index(b"\n") + 1, len(journal) - 1))
    if data.draw(st.booleans()):
        del journal[place:]
    else:
        journal[place : place + data.draw(st.integers(1, 40))] = data.draw(st.binary(max_size=40))
    (target / JOURNAL).write_bytes(journal)
    again(source, target)
    assert contents(target) == whole


def torn(folder: Path) -> None:
    """The journal as a kill in its first moment leaves it."""
    for path in folder.glob("*.partial"):
        path.unlink()
    os.truncate(folder / JOURNAL, 30)


def flip(path: Path, place: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize(
    ("harm", "warned"),
    [
        (torn, False),
        (lambda folder: (folder / "model0-mp2.safetensors.partial").unlink(), False),
        (lambda folder: os.truncate(folder / "model1-mp2.safetensors.partial", 9), False),
        (lambda folder: flip(folder / "model0-mp2.safetensors.partial", 5000), True),
        (lambda folder: (folder / ".LICENSE.1.dsakv-tmp").write_text("half"), False),
    ],
    ids=["torn first line", "partial gone", "partial cut", "partial damaged", "half a copy"],
)
def test_harm_between_attempts(
    harm: Callable[[Path], object],
    warned: bool,
    source: Path,
    whole: dict[str, bytes],
    begun: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    harm(begun)
    again(source, begun)
    assert contents(begun) == whole
    assert ("are damaged and written again" in capsys.readouterr().err) == warned


def test_another_conversion_is_refused(source: Path, begun: Path, tmp_path: Path) -> None:
    before = contents(begun)
    with pytest.raises(DsakvError, match=r"the beginnings of another conversion \(--model-parallel 2\)") as caught:
        again(source, begun, ranks=4)
    assert "--save-path" in caught.value.hint
    copied = tmp_path / "copied"
    shutil.copytree(source, copied)
    shard = next(copied.glob("*.safetensors"))
    os.utime(shard, ns=(1, 1))
    with pytest.raises(DsakvError, match="another checkpoint, or this one before it changed"):
        again(copied, begun)
    assert contents(begun) == before


def test_two_at_once_are_refused(source: Path, begun: Path) -> None:
    with open_source(source) as opened, open_journal(begun, order_of(make_plan(opened, RANKS, SIZES["piece_bytes"]))):
        code = guarded(lambda: len(again(source, begun)))
    assert code == 1


def test_a_source_that_changes_meanwhile(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(source, copied)
    shard = next(copied.glob("*.safetensors"))
    monkeypatch.setattr(os, "pwrite", failing(3, lambda: os.utime(shard, ns=(1, 1))))
    with pytest.raises(DsakvError, match="changed while it was read"):
        again(copied, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing(3, lambda: os.truncate(shard, 10)))
        with pytest.raises(DsakvError, match="changed while it was read"):
            again(copied, tmp_path / "out2")


def test_a_record_beside_a_journal(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Killed between the two: all is done."""
    again(source, tmp_path / "out")
    (tmp_path / "out" / JOURNAL).write_text("")
    again(source, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_a_config_that_changes_meanwhile(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(source, copied)
    config = copied / "config.json"
    longer = config.read_text() + " "
    monkeypatch.setattr(os, "pwrite", failing(3, lambda: config.write_text(longer)))
    with pytest.raises(DsakvError, match=r"config.json changed meanwhile"):
        again(copied, tmp_path / "out")
    assert not (tmp_path / "out" / "conversion.json").exists()
