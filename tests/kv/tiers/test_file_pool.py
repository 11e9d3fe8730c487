"""The file pool: what is on the disk, what is left of it, and what the file system need not offer."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsakv.errors import DsakvError, InputError
from dsakv.kv.tiers.contract import Counted, open_remote
from dsakv.kv.tiers.file_pool import ALIGN, FilePool
from tests.kv.tiers.helpers import (
    ALL,
    SIZE,
    N,
    check,
    failing,
    random_blocks,
)


@pytest.mark.parametrize("wanted", [True, False])
def test_direct_says_whether_the_page_cache_is_passed(tmp_path: Path, wanted: bool) -> None:
    probe = ["dd", "if=/dev/zero", f"of={tmp_path / 'probe'}", "oflag=direct", "bs=4096", "count=1"]
    possible = not subprocess.run(probe, stderr=subprocess.DEVNULL, check=False).returncode
    pool = FilePool(str(tmp_path), 64, SIZE, direct=wanted)
    assert pool.direct == (wanted and possible)
    assert bool(fcntl.fcntl(pool._fd, fcntl.F_GETFL) & os.O_DIRECT) == pool.direct
    assert not os.fstat(pool._fd).st_size
    pool.put(ALL, random_blocks(N))
    assert os.fstat(pool._fd).st_size == N * (ALIGN if pool.direct else SIZE)
    assert pool.counted == Counted(write_ops=N, bytes_written=N * SIZE, writes=1)
    pool.close()


def test_no_name_leads_to_the_file(pool: FilePool, tmp_path: Path) -> None:
    pool.put(ALL, random_blocks(N))
    assert not list(tmp_path.iterdir())
    assert os.fstat(pool._fd).st_nlink == 0


def test_nothing_is_left_by_a_process_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, numpy as np; from dsakv.kv.tiers.contract import open_remote;"
        "pool = open_remote(sys.argv[1], n_blocks=9, block_bytes=70000, timeout_s=1);"
        "pool.put(np.arange(9), np.ones((9, 70000), np.uint8)); os.kill(os.getpid(), signal.SIGKILL)"
    )
    ran = subprocess.run([sys.executable, "-c", program, tmp_path.as_uri()], check=False)
    assert ran.returncode == -signal.SIGKILL
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("refusal", [errno.EOPNOTSUPP, errno.EISDIR])
def test_file_systems_without_nameless_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int) -> None:
    nameless = failing(os.open, refusal, lambda path, flags, *_: flags & os.O_TMPFILE == os.O_TMPFILE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", nameless)
        pool = FilePool(str(tmp_path), N, SIZE)
    assert not list(tmp_path.iterdir())
    check(pool, random_blocks(N))
    pool.close()


@pytest.mark.parametrize("refusing", ["flag", "call"])
def test_file_systems_without_direct_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusing: str) -> None:
    with monkeypatch.context() as patch:
        if refusing == "flag":
            sets = failing(fcntl.fcntl, errno.EINVAL, lambda fd, what, flags=0: bool(flags & os.O_DIRECT))
            patch.setattr(fcntl, "fcntl", sets)
        else:
            patch.setattr(os, "pwritev", failing(os.pwritev, errno.EINVAL))
        pool = FilePool(str(tmp_path), N, SIZE)
    assert not pool.direct
    assert not fcntl.fcntl(pool._fd, fcntl.F_GETFL) & os.O_DIRECT
    check(pool, random_blocks(N))
    pool.close()


@pytest.mark.parametrize("direct", [True, False])
def test_the_system_may_move_less_than_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    pool = FilePool(str(tmp_path), N, 9000, direct=direct)
    step = ALIGN if pool.direct else 700
    for name in ("preadv", "pwritev"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda fd, views, at, real=real: real(fd, [views[0][:step]], at))
    check(pool, random_blocks(N, 9000))
    pool.close()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing(os.open, code))
        with pytest.raises(
            DsakvError, match=f"file://{tmp_path}: its file cannot be made: {os.strerror(code)}"
        ) as caught:
            open_remote(tmp_path.as_uri(), n_blocks=1, block_bytes=1, timeout_s=1)
    assert type(caught.value) is DsakvError
    assert "another folder" in caught.value.hint


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("missing", "file", "file/below"):
        with pytest.raises(InputError, match=f"file://{tmp_path}/{name} is no folder"):
            open_remote(f"file://{tmp_path}/{name}", n_blocks=1, block_bytes=1, timeout_s=1)


@pytest.mark.parametrize(
    "url", ["file://", "file://tmp", "file://host/tmp", "file:///tmp?x=1", "file:///t#x", "file:///%00"]
)
def test_urls_that_name_no_folder(url: str) -> None:
    with pytest.raises(InputError, match="names no folder of this machine"):
        open_remote(url, n_blocks=1, block_bytes=1, timeout_s=1)


def test_a_folder_whose_name_is_encoded(tmp_path: Path) -> None:
    folder = tmp_path / "a b%#?"
    folder.mkdir()
    pool = open_remote(folder.as_uri(), n_blocks=1, block_bytes=1, timeout_s=1)
    assert isinstance(pool, FilePool)
    assert pool.folder == str(folder)
    pool.close()


def test_close_ends_threads_and_gives_the_file_back(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    pool = FilePool(str(tmp_path), 64, SIZE)
    check(pool, random_blocks(64)[::2].copy())
    pool.put(np.arange(0, 64, 2), random_blocks(32))
    pool.close()
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert pool._threads is not None
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool._threads.submit(print)
