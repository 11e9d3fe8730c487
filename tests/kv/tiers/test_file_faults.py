"""The file pool on disks that fail, fill or lie."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsakv.errors import DsakvError
from dsakv.kv.tiers.file_pool import ALIGN, FilePool
from tests.kv.tiers.helpers import (
    ALL,
    SIZE,
    N,
    check,
    failing,
    random_blocks,
)


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


def test_a_disk_that_is_full_is_told_when_the_pool_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", failing(os.pwritev, errno.ENOSPC))
        with pytest.raises(DsakvError, match="No space left"):
            FilePool(str(tmp_path), 1, 1)
    assert len(os.listdir("/proc/self/fd")) == len(before)
