"""Direct reads against plain ones, what they count, and files that change, fail or are none."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsakv.errors import DsakvError, InputError
from dsakv.weights.direct import ALIGN, DirectFiles, Extent, Stamp, aligned

SIZES = (11 * ALIGN + 1234, 4 * ALIGN, 700, 0)
EITHER = pytest.mark.parametrize("direct", [True, False])


def memory(size: int) -> memoryview:
    """At a page, and filled with something."""
    view = memoryview(mmap.mmap(-1, max(ALIGN, -(-size // ALIGN) * ALIGN)))
    view[:] = b"\xa5" * len(view)
    return view


def written(folder: Path) -> list[Path]:
    """Files of the given sizes whose time of change lies far back."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.bin" for number in range(len(SIZES))]
    for path, size in zip(paths, SIZES, strict=True):
        path.write_bytes(rng.bytes(size))
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        os.utime(path, (1e9, 1e9))
    return paths


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files that no test changes."""
    return written(tmp_path_factory.mktemp("files"))


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return written(tmp_path)


def whole(files: DirectFiles, number: int) -> bytes:
    view = memory(files.sizes[number])
    files.wait(files.read(Extent(number, 0, files.sizes[number]), view), [number])
    return bytes(view[: files.sizes[number]])


def ranges() -> st.SearchStrategy[tuple[int, int, int]]:
    """A file, and a range of its bytes."""
    return st.integers(0, len(SIZES) - 1).flatmap(
        lambda number: st.tuples(st.integers(0, SIZES[number]), st.integers(0, SIZES[number])).map(
            lambda ends: (number, min(ends), max(ends))
        )
    )


@given(
    wanted=st.lists(ranges(), max_size=6), request=st.integers(1, 5), threads=st.integers(1, 4), direct=st.booleans()
)
def test_every_byte_is_what_a_plain_read_gives(
    lasting: list[Path], wanted: list[tuple[int, int, int]], request: int, threads: int, direct: bool
) -> None:
    with closing(DirectFiles(lasting, request=request * ALIGN, threads=threads, direct=direct)) as files:
        assert files.sizes == list(SIZES)
        assert not files.direct or direct
        futures: list[Future[int]] = []
        read = 0
        views = []
        for number, begin, end in wanted:
            first, last = aligned(begin, end, SIZES[number])
            assert first <= begin <= end
            assert begin == end or (end <= last < end + ALIGN and begin - first < ALIGN)
            views.append(memory(last - first))
            begun = files.read(Extent(number, first, last), views[-1])
            assert len(begun) == -(-(last - first) // (request * ALIGN))
            futures += begun
            read += last - first
        files.wait(futures, range(len(lasting)))
        for (number, begin, end), view in zip(wanted, views, strict=True):
            first, last = aligned(begin, end, SIZES[number])
            assert view[begin - first : end - first] == lasting[number].read_bytes()[begin:end]
            past = view[-(-(last - first) // ALIGN) * ALIGN :]
            assert bytes(past) == b"\xa5" * len(past)
        assert files.bytes_read == read


@given(st.integers(-5, 30000), st.integers(-5, 30000), st.integers(0, 30000))
def test_the_least_aligned_extent(begin: int, end: int, size: int) -> None:
    if not 0 <= begin <= end <= size:
        with pytest.raises(ValueError, match="of a file of"):
            aligned(begin, end, size)
        return
    ends = sorted({*range(0, size, ALIGN), size})
    covers = [(a, b) for a in range(0, size + 1, ALIGN) for b in ends if a <= begin and end <= b and a <= b]
    found = aligned(begin, end, size)
    assert found[1] - found[0] == (min(b - a for a, b in covers) if end > begin else 0)
    assert found in covers or begin == end


def test_the_system_reads_as_many_bytes_from_the_disk(lasting: list[Path]) -> None:
    """Whole pages, also of the one in which a file ends."""
    if not os.path.exists("/proc/thread-self/io"):
        pytest.skip("this kernel does not count what threads read")
    if os.major(os.stat(lasting[0]).st_dev) == 0:
        pytest.skip("a file system without a disk of its own")
    lock, from_disk = threading.Lock(), [0]

    def counted() -> int:
        facts = Path("/proc/thread-self/io").read_text().split()
        return int(facts[facts.index("read_bytes:") + 1])

    def preadv(fd: int, views: list[memoryview], at: int) -> int:
        before = counted()
        got = os.preadv(fd, views, at)
        with lock:
            from_disk[0] += counted() - before
        return got

    with closing(DirectFiles(lasting, request=2 * ALIGN, threads=3, preadv=preadv)) as files:
        if not files.direct:
            pytest.skip("the file system refuses direct reads")
        for _ in range(2):  # nothing comes from the page cache the second time
            from_disk[0] = files.bytes_read = 0
            for number in range(len(lasting)):
                whole(files, number)
            assert from_disk[0] == sum(-(-size // ALIGN) * ALIGN for size in SIZES)
            assert files.bytes_read == sum(SIZES)


@EITHER
def test_the_system_may_give_less_than_it_is_asked_for(lasting: list[Path], direct: bool) -> None:
    def preadv(fd: int, views: list[memoryview], at: int) -> int:
        if not direct:
            return os.preadv(fd, [views[0][:777]], at)
        got = os.preadv(fd, views, at)
        return got - 100 if len(views[0]) > ALIGN else got

    with closing(DirectFiles(lasting[:1], request=8 * ALIGN, threads=2, direct=direct, preadv=preadv)) as files:
        view = memory(8 * ALIGN)
        files.wait(files.read(Extent(0, 0, 8 * ALIGN), view), [0])
        assert bytes(view) == lasting[0].read_bytes()[: 8 * ALIGN]


@EITHER
def test_a_disk_that_gives_nothing_more_is_told(lasting: list[Path], direct: bool) -> None:
    def preadv(fd: int, views: list[memoryview], at: int) -> int:
        return min(os.preadv(fd, views, at), max(0, 3 * ALIGN + 512 - at))

    with closing(DirectFiles(lasting, request=8 * ALIGN, threads=2, direct=direct, preadv=preadv)) as files:
        with pytest.raises(DsakvError, match=r"only a part of .*0\.bin could be read"):
            whole(files, 0)
        assert whole(files, 2) == lasting[2].read_bytes()


@EITHER
@pytest.mark.parametrize("kept", [0, 3 * ALIGN, 3 * ALIGN + 10, SIZES[0] - 1])
def test_a_file_that_was_cut_is_told(paths: list[Path], direct: bool, kept: int) -> None:
    with closing(DirectFiles(paths, request=2 * ALIGN, threads=2, direct=direct)) as files:
        os.truncate(paths[0], kept)
        futures = files.read(Extent(0, 0, SIZES[0]), memory(SIZES[0]))
        with pytest.raises(DsakvError, match=r"0\.bin was truncated since it was opened") as caught:
            files.wait(futures)
        assert "whole" in caught.value.hint
        assert type(caught.value) is DsakvError
        with pytest.raises(DsakvError, match=r"0\.bin changed since it was opened"):
            files.check([0])
        assert whole(files, 1) == paths[1].read_bytes()


@EITHER
def test_a_file_that_grew_is_told(paths: list[Path], direct: bool) -> None:
    with closing(DirectFiles(paths, request=2 * ALIGN, threads=2, direct=direct)) as files:
        with open(paths[0], "ab") as file:
            file.write(b"more")
        with pytest.raises(DsakvError, match=r"0\.bin changed since it was opened"):
            whole(files, 0)


def test_a_file_that_was_written_to_is_told(paths: list[Path]) -> None:
    with closing(DirectFiles(paths, request=2 * ALIGN, threads=2)) as files:
        assert files.stamps == [Stamp.of(os.stat(path)) for path in paths]
        assert whole(files, 1) == paths[1].read_bytes()
        with open(paths[1], "r+b") as file:
            file.write(b"other")
        with pytest.raises(DsakvError, match=r"1\.bin changed since it was opened"):
            whole(files, 1)
        files.check([0, 2, 3])
        assert whole(files, 0) == paths[0].read_bytes()
    stamps = files.stamps
    with pytest.raises(DsakvError, match=r"1\.bin changed since it was opened"):
        DirectFiles(paths, request=ALIGN, threads=1, stamps=stamps)
    DirectFiles(paths[2:], request=ALIGN, threads=1, stamps=stamps[2:]).close()


@EITHER
def test_a_file_that_is_replaced_or_removed_stays_what_it_was(paths: list[Path], direct: bool) -> None:
    was = [path.read_bytes() for path in paths]
    with closing(DirectFiles(paths, request=2 * ALIGN, threads=2, direct=direct)) as files:
        os.replace(paths[1], paths[0])
        paths[2].unlink()
        assert [whole(files, number) for number in range(len(paths))] == was


def test_a_disk_that_fails_is_told_and_harms_no_other_read(lasting: list[Path]) -> None:
    def preadv(fd: int, views: list[memoryview], at: int) -> int:
        if at == 4 * ALIGN:
            raise OSError(errno.EIO, "not these words")
        return os.preadv(fd, views, at)

    with closing(DirectFiles(lasting, request=2 * ALIGN, threads=2, preadv=preadv)) as files:
        view = memory(SIZES[0])
        futures = files.read(Extent(0, 0, SIZES[0]), view)
        with pytest.raises(DsakvError, match=r"0\.bin cannot be read: Input/output error") as caught:
            files.wait(futures, [0])
        assert "kernel's log" in caught.value.hint
        assert [future.exception() is None for future in futures] == [True, True, False, True, True, True]
        content = lasting[0].read_bytes()
        assert bytes(view[: 4 * ALIGN]) == content[: 4 * ALIGN]
        assert bytes(view[6 * ALIGN : SIZES[0]]) == content[6 * ALIGN :]
        assert whole(files, 1) == lasting[1].read_bytes()
        assert files.busy_us() > 0


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_file_systems_that_refuse_direct_reads(lasting: list[Path], code: int) -> None:
    """Refused when one is made; what then comes is read through the page cache."""
    tried: list[int] = []

    def preadv(fd: int, views: list[memoryview], at: int) -> int:
        tried.append(fd)
        if len(tried) == 1:
            raise OSError(code, os.strerror(code))
        return os.preadv(fd, views, at)

    with closing(DirectFiles(lasting[:2], request=ALIGN, threads=2, preadv=preadv)) as files:
        assert not files.direct
        assert [whole(files, number) for number in range(2)] == [path.read_bytes() for path in lasting[:2]]


def test_a_disk_that_fails_when_it_is_tried(lasting: list[Path]) -> None:
    def preadv(fd: int, views: list[memoryview], at: int) -> int:
        raise OSError(errno.EIO, "")

    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(DsakvError, match=r"0\.bin cannot be opened: Input/output error"):
        DirectFiles(lasting, request=ALIGN, threads=1, preadv=preadv)
    assert set(os.listdir("/proc/self/fd")) == before


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


def _loop(folder: Path) -> Path:
    (folder / "loop").symlink_to("loop")
    return folder / "loop"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "none.bin", "none.bin is missing"),
        (lambda folder: folder, "is no file"),
        (_fifo, "fifo is no file"),
        (_loop, "loop cannot be opened: Too many levels of symbolic links"),
        (lambda folder: folder / "0.bin" / "x", "x cannot be opened: Not a directory"),
        (lambda folder: folder / "a\0b", "is no path"),
    ],
)
def test_what_is_no_file(paths: list[Path], make: Callable[[Path], Path], says: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(InputError, match=says) as caught:
        DirectFiles([*paths, make(paths[0].parent)], request=ALIGN, threads=1)
    assert caught.value.hint
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(paths: list[Path]) -> None:
    paths[0].chmod(0)
    with pytest.raises(InputError, match=r"0\.bin cannot be opened: Permission denied"):
        DirectFiles(paths, request=ALIGN, threads=1)


@EITHER
def test_what_is_wrong_in_the_program_is_raised_at_once(lasting: list[Path], direct: bool) -> None:
    for request, threads in ((0, 1), (ALIGN + 1, 1), (-ALIGN, 1), (ALIGN, 0)):
        with pytest.raises(ValueError, match=r"request|max_workers"):
            DirectFiles(lasting, request=request, threads=threads)
    with closing(DirectFiles(lasting, request=ALIGN, threads=1, direct=direct)) as files:
        for extent in (
            Extent(0, 5, ALIGN),
            Extent(0, 0, ALIGN + 1),
            Extent(0, 2 * ALIGN, ALIGN),
            Extent(0, 0, 12 * ALIGN),
            Extent(0, -ALIGN, ALIGN),
            Extent(9, 0, 0),
            Extent(-1, 0, 0),
        ):
            with pytest.raises(ValueError, match="does not fit"):
                files.read(extent, memory(20 * ALIGN))
        with pytest.raises(ValueError, match="begin at a page"):
            files.read(Extent(0, 0, ALIGN), memory(2 * ALIGN)[512:])
        with pytest.raises(ValueError, match="of memory for"):
            files.read(Extent(2, 0, 700), memory(ALIGN)[:700])
        with pytest.raises(ValueError, match="cannot be written to"):
            files.read(Extent(0, 0, ALIGN), memory(ALIGN).toreadonly())
        assert files.bytes_read == 0
        assert files.busy_us() == 0


class Gate:
    """Reads that end when they are let go, and a clock (ns) that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 0
        self.begun = threading.Semaphore(0)
        self.go = [threading.Event() for _ in range(4)]

    def preadv(self, fd: int, views: list[memoryview], at: int) -> int:
        self.begun.release()
        assert self.go[at // ALIGN].wait(30)
        return os.preadv(fd, views, at)

    def clock(self) -> int:
        return self.now


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    for event in gate.go:
        event.set()


def test_busy_is_the_union_of_reads(lasting: list[Path], gate: Gate) -> None:
    with closing(
        DirectFiles(lasting, request=ALIGN, threads=2, direct=False, preadv=gate.preadv, clock=gate.clock)
    ) as files:

        def begin(page: int) -> Future[int]:
            (future,) = files.read(Extent(1, page * ALIGN, (page + 1) * ALIGN), memory(ALIGN))
            assert gate.begun.acquire(timeout=30)
            return future

        def end(page: int, future: Future[int]) -> None:
            gate.go[page].set()
            future.result(30)

        gate.now = 10_000
        assert files.busy_us() == 0
        first = begin(0)
        gate.now = 13_000
        assert files.busy_us() == 3
        second = begin(1)
        gate.now = 17_000
        end(0, first)
        gate.now = 20_000
        assert files.busy_us() == 10
        end(1, second)
        gate.now = 50_000
        assert files.busy_us() == 10
        third = begin(2)
        gate.now = 51_500
        end(2, third)
        assert files.busy_us() == 11.5
        assert files.bytes_read == 3 * ALIGN


def test_closing_waits_for_reads_under_way_and_cancels_the_rest(lasting: list[Path], gate: Gate) -> None:
    files = DirectFiles(lasting, request=ALIGN, threads=1, direct=False, preadv=gate.preadv)
    view = memory(4 * ALIGN)
    futures = files.read(Extent(1, 0, 4 * ALIGN), view)
    assert gate.begun.acquire(timeout=30)
    closing_ = threading.Thread(target=files.close)
    closing_.start()
    assert all(future.cancelled() or not future.done() for future in futures)
    gate.go[0].set()
    closing_.join(30)
    assert [future.cancelled() for future in futures] == [False, True, True, True]
    assert bytes(view[:ALIGN]) == lasting[1].read_bytes()[:ALIGN]
    with pytest.raises(RuntimeError, match="after shutdown"):
        files.read(Extent(1, 0, ALIGN), view)
    files.close()
