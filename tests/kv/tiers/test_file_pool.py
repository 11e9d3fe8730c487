"""The file pool: what is on the disk, what is left of it, and disks that fail, fill or lie."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsakv.errors import DsakvError, InputError
from dsakv.kv.tiers.contract import Counted, open_remote
from dsakv.kv.tiers.file_pool import ALIGN, FilePool

SIZE = 1000
N = 12
ALL = np.arange(N)


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FilePool]:
    pool = FilePool(str(tmp_path), 64, SIZE, direct=request.param)
    yield pool
    pool.close()


def random_blocks(n: int, block_bytes: int = SIZE) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(n).integers(0, 256, (n, block_bytes), dtype=np.uint8)


def check(pool: FilePool, blocks: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """Put ``blocks`` and read them, in another order."""
    pool.put(np.arange(len(blocks)), blocks)
    out = np.empty_like(blocks)
    pool.get(np.arange(len(blocks))[::-1].copy(), out)
    assert np.array_equal(out, blocks[::-1])


def failing(call: Callable[..., Any], code: int, when: Callable[..., bool] = lambda *_: True) -> Callable[..., Any]:
    """``call``, but for arguments that fail."""

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if when(*arguments):
            raise OSError(code, os.strerror(code))
        return call(*arguments, **named)

    return wrapped


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


def test_a_flipped_bit_is_told(pool: FilePool) -> None:
    blocks = random_blocks(N)
    check(pool, blocks)
    at = 4 * pool._slot + SIZE - 1
    fd = os.open(f"/proc/self/fd/{pool._fd}", os.O_RDWR)
    (byte,) = os.pread(fd, 1, at)
    os.pwrite(fd, bytes([byte ^ 1]), at)
    os.close(fd)
    before = pool.counted.read_ops
    with pytest.raises(DsakvError, match=r"block 4 came back from file:///.* as something else than was written"):
        pool.get(ALL, blocks.copy())
    assert (pool.counted.retries, pool.counted.read_ops) == (1, before)


def test_a_block_in_anothers_place_is_told(pool: FilePool) -> None:
    check(pool, random_blocks(N))
    fd = os.open(f"/proc/self/fd/{pool._fd}", os.O_RDWR)
    os.pwrite(fd, os.pread(fd, SIZE, 5 * pool._slot), 4 * pool._slot)
    os.close(fd)
    with pytest.raises(DsakvError, match="block 4 came back"):
        pool.get(ALL, np.empty((N, SIZE), np.uint8))


@pytest.mark.parametrize("kept", [0, 4, 4.5])
def test_a_file_that_was_cut_is_told(pool: FilePool, kept: float) -> None:
    blocks = random_blocks(N)
    check(pool, blocks)
    os.truncate(f"/proc/self/fd/{pool._fd}", int(kept * pool._slot))
    with pytest.raises(DsakvError, match=f"only a part of block {int(kept)} could be read"):
        pool.get(ALL, blocks.copy())
    for number in range(N):
        out = np.empty((1, SIZE), np.uint8)
        if number < int(kept):
            pool.get(np.array([number]), out)
            assert np.array_equal(out[0], blocks[number])
        else:
            with pytest.raises(DsakvError, match=f"only a part of block {number} could"):
                pool.get(np.array([number]), out)


def test_a_file_that_was_cut_and_grew_again_is_told(pool: FilePool) -> None:
    check(pool, random_blocks(N))
    os.truncate(f"/proc/self/fd/{pool._fd}", 0)
    os.truncate(f"/proc/self/fd/{pool._fd}", N * pool._slot)
    with pytest.raises(DsakvError, match=r"block 0 came back .*, and so did 11 others"):
        pool.get(ALL, np.empty((N, SIZE), np.uint8))


@pytest.mark.parametrize("direct", [True, False])
def test_the_system_may_move_less_than_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    pool = FilePool(str(tmp_path), N, 9000, direct=direct)
    step = ALIGN if pool.direct else 700
    for name in ("preadv", "pwritev"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda fd, views, at, real=real: real(fd, [views[0][:step]], at))
    check(pool, random_blocks(N, 9000))
    pool.close()


def test_the_system_may_take_nothing(pool: FilePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: 0)
    with pytest.raises(DsakvError, match="only a part of block 0 could be written"):
        pool.put(ALL, random_blocks(N))


FAILURES = [
    (errno.ENOSPC, "No space left on device", "free space there"),
    (errno.EDQUOT, "Disk quota exceeded", "quota"),
    (errno.EIO, "Input/output error", "kernel's log"),
    (errno.EACCES, "Permission denied", "let this user write there"),
    (errno.ENODEV, "No such device", "see that the folder can be used"),
]


@pytest.mark.parametrize(("code", "says", "hint"), FAILURES)
def test_disks_that_fail(
    pool: FilePool, monkeypatch: pytest.MonkeyPatch, code: int, says: str, hint: str, tmp_path: Path
) -> None:
    blocks = random_blocks(N)
    check(pool, blocks)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing(os.preadv, code))
        with pytest.raises(DsakvError, match=f"file://{tmp_path}: its file cannot be read: {says}") as caught:
            pool.get(ALL, np.empty_like(blocks))
        assert hint in caught.value.hint
        far = 5 * pool._slot  # blocks before are written well
        patch.setattr(os, "pwritev", failing(os.pwritev, code, lambda fd, views, at: at >= far))
        scattered = np.array([7, 1, 3, 9])
        with pytest.raises(DsakvError, match=f"its file cannot be written: {says}") as caught:
            pool.put(scattered, blocks[:4])
        assert type(caught.value) is DsakvError
    for number in range(N):
        out = np.empty((1, SIZE), np.uint8)
        if number in scattered:
            with pytest.raises(DsakvError, match="its last write failed"):
                pool.get(np.array([number]), out)
        else:
            pool.get(np.array([number]), out)
            assert np.array_equal(out[0], blocks[number])
    check(pool, blocks)


@pytest.mark.parametrize(
    ("direct", "limit", "says"),
    [
        (False, 5 * ALIGN + 100, "File too large no larger file may be written (see ulimit -f)"),
        (True, 5 * ALIGN, "File too large no larger file may be written (see ulimit -f)"),
        (True, 5 * ALIGN + 100, ""),  # what the error is called depends on the file system
    ],
)
def test_a_file_that_may_not_grow(tmp_path: Path, direct: bool, limit: int, says: str) -> None:
    program = """if True:
        import resource, signal, sys
        import numpy as np
        from dsakv.errors import DsakvError
        from dsakv.kv.tiers.file_pool import FilePool
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
        pool = FilePool(sys.argv[1], 12, 4096, direct=sys.argv[2] == "True")
        blocks = np.arange(12, dtype=np.uint8)[:, None].repeat(4096, axis=1)
        pool.put(np.arange(3), blocks[:3])
        try:
            pool.put(np.arange(3, 12), blocks[3:])
        except DsakvError as error:
            print(type(error).__name__, error.message, error.hint)
        out = np.zeros((3, 4096), np.uint8)
        pool.get(np.arange(3), out)
        assert (out == blocks[:3]).all()
        try:
            pool.get(np.arange(3, 4), out[:1])
        except DsakvError as error:
            print(error.message)
    """
    command = [sys.executable, "-c", program, str(tmp_path), str(direct), str(limit)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second = ran.stdout.splitlines()
    assert first.startswith(f"DsakvError file://{tmp_path}: its file cannot be written: {says}")
    assert second == f"nobody knows what file://{tmp_path} has of block 3: its last write failed"


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


def test_a_disk_that_is_full_is_told_when_the_pool_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", failing(os.pwritev, errno.ENOSPC))
        with pytest.raises(DsakvError, match="No space left"):
            FilePool(str(tmp_path), 1, 1)
    assert len(os.listdir("/proc/self/fd")) == len(before)


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
