"""Files that fail, change or are gone under a running model: a clear error, and no token that a healthy run lacks."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file

from dsakv.config import ModelConfig, WeightsConfig
from dsakv.distributed import ALONE
from dsakv.engine.engine import Engine
from dsakv.engine.options import EngineOptions
from dsakv.errors import DsakvError, InputError
from dsakv.jobs.loaded import LoadedModel
from dsakv.jobs.model import prepared_model
from dsakv.models.tiny import CONFIG, write_checkpoint
from dsakv.weights.direct import DirectFiles, Preadv
from dsakv.weights.load import silent
from tests.models.llamas import save_llama
from tests.shapes import SMALL_SHAPE
from tests.weights.streamed import REQUESTS, load, smallest
from tests.weights.toy import write

OPTIONS = EngineOptions(batch_size=2, block_size=4, prefill_chunk=13)
Tokens = list[list[tuple[int, int]]]


class Healthy(NamedTuple):
    unit: str
    config: ModelConfig
    tokens: Tokens
    """Step by step."""

    @property
    def file(self) -> Path:
        return Path(self.config.ckpt_path or "") / "model.safetensors"


def tokens_of(loaded: LoadedModel) -> Iterator[list[tuple[int, int]]]:
    return (step.new_tokens for step in Engine(loaded.model, OPTIONS, weights=loaded.weights).run(REQUESTS))


def save(directory: Path, unit: str) -> None:
    if unit == "expert":
        write_checkpoint(directory, CONFIG | SMALL_SHAPE, seed=3)
    else:
        save_llama(directory, "llama3")


@pytest.fixture(params=["layer", "expert"])
def healthy(request: pytest.FixtureRequest, tmp_path: Path, expected: dict[str, Tokens]) -> Healthy:
    """A model of its own for each test."""
    save(tmp_path, request.param)
    return Healthy(request.param, ModelConfig(ckpt_path=str(tmp_path), device="cpu"), expected[request.param])


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokens]:
    found = {}
    for unit in ("layer", "expert"):
        directory = tmp_path_factory.mktemp(unit)
        save(directory, unit)
        found[unit] = list(tokens_of(load(ModelConfig(ckpt_path=str(directory), device="cpu"))))
        steps = [step for step in found[unit] if step]
        assert len(steps) > 6
    return found


@contextmanager
def streamed(healthy: Healthy, preadv: Preadv = os.preadv, **weights: Any) -> Iterator[LoadedModel]:
    """The model with as much streamed as can be, by reads that go through ``preadv``; no thread is left of it."""
    before = set(threading.enumerate())
    weights = {"host_budget": f"{smallest(healthy.config, unit=healthy.unit)}B", "unit": healthy.unit} | weights
    with prepared_model(healthy.config, ALONE, None, WeightsConfig(**weights)) as prepared:
        planned = prepared.planned
        assert planned is not None
        planned.files.close()
        planned.files = DirectFiles(
            planned.files.paths, request=4096, threads=2, stamps=planned.files.stamps, preadv=preadv
        )
        loaded = prepared.load(silent)
    try:
        yield loaded
    finally:
        loaded.close()
        assert not set(threading.enumerate()) - before


def until_error(steps: Iterable[list[tuple[int, int]]]) -> tuple[Tokens, DsakvError | None]:
    found: Tokens = []
    try:
        found.extend(steps)
    except DsakvError as error:
        return found, error
    return found, None


def by_request(steps: Tokens) -> list[list[int]]:
    """Prompts are cut into other steps where weights are streamed: tokens, whatever step gave them."""
    return [[token for step in steps for owner, token in step if owner == request.request_id] for request in REQUESTS]


def same(found: Tokens, expected: Tokens) -> bool:
    return by_request(found) == by_request(expected)


def begins(found: Tokens, expected: Tokens) -> bool:
    """Whether each request's tokens are the first of what they should be."""
    pairs = zip(by_request(found), by_request(expected), strict=True)
    return all(tokens == right[: len(tokens)] for tokens, right in pairs)


class Disk:
    """Fails once, in its n-th read."""

    def __init__(self, n: int) -> None:
        self.left, self._lock = n, threading.Lock()

    def preadv(self, fd: int, views: list[memoryview], at: int) -> int:
        with self._lock:
            self.left -= 1
            failing = self.left == 0
        if failing:
            raise OSError(errno.EIO, "not these words")
        return os.preadv(fd, views, at)


def test_a_disk_that_fails_once_is_told_and_harms_no_later_run(healthy: Healthy) -> None:
    whole = Disk(0)
    with streamed(healthy, whole.preadv) as loaded:
        begun = -whole.left
        assert same(list(tokens_of(loaded)), healthy.tokens)
    assert -whole.left > 8 * begun
    for share in (0.0, 0.3, 0.55, 0.8):
        disk = Disk(begun + 1 + int(share * (-whole.left - begun)))
        with streamed(healthy, disk.preadv) as loaded:
            found, error = until_error(tokens_of(loaded))
            assert begins(found, healthy.tokens)
            assert disk.left <= 0
            assert error is not None
            assert str(healthy.file) in error.message
            assert "cannot be read: Input/output error" in error.message
            assert "disk" in error.hint
            assert not same(found, healthy.tokens)
            assert same(list(tokens_of(loaded)), healthy.tokens)


def test_a_disk_that_fails_while_weights_are_brought_in(healthy: Healthy) -> None:
    before = set(threading.enumerate())
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DsakvError, match="Input/output error"), streamed(healthy, Disk(9).preadv, host_budget="1GB"):
        pass
    assert not set(threading.enumerate()) - before
    assert len(os.listdir("/proc/self/fd")) == files


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def touch(path: Path) -> None:
    os.utime(path, (1e9, 1e9))


def write_to(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"otherwise")


@pytest.mark.parametrize("after", [-1, 2])
@pytest.mark.parametrize("change", [cut, touch, write_to])
def test_a_file_that_changes_is_told(healthy: Healthy, change: Callable[[Path], None], after: int) -> None:
    with streamed(healthy) as loaded:

        def steps() -> Iterator[list[tuple[int, int]]]:
            for number, tokens in enumerate(tokens_of(loaded)):
                yield tokens
                if number == after:
                    change(healthy.file)

        if after < 0:
            change(healthy.file)
        found, error = until_error(steps())
        assert error is not None
        assert "model.safetensors was truncated since" in str(error) or "changed since it was opened" in str(error)
        assert "whole" in error.hint
        assert begins(found, healthy.tokens)
        assert sum(map(len, found)) < sum(map(len, healthy.tokens))
        with pytest.raises(DsakvError, match="since it was opened"):
            next(tokens_of(loaded))


def test_a_file_that_changes_between_plan_and_load_is_told(healthy: Healthy) -> None:
    for budget in ("1GB", f"{smallest(healthy.config, unit=healthy.unit)}B"):
        weights = WeightsConfig(host_budget=budget, unit=healthy.unit)  # type: ignore[arg-type]
        with prepared_model(healthy.config, ALONE, None, weights) as prepared:
            touch(healthy.file)
            with pytest.raises(DsakvError, match="changed since it was opened"):
                next(tokens_of(prepared.load(silent)))
        healthy.file.touch()


def test_a_file_that_is_removed_or_replaced_stays_what_it_was(healthy: Healthy) -> None:
    with streamed(healthy) as loaded:
        steps = tokens_of(loaded)
        found = [next(steps)]
        other = healthy.file.with_suffix(".other")
        other.write_bytes(bytes(healthy.file.stat().st_size))
        os.replace(other, healthy.file)
        found.append(next(steps))
        healthy.file.unlink()
        assert same([*found, *steps], healthy.tokens)


@pytest.mark.parametrize("more", [{"prefetch_depth": 0}, {"residency": "lru", "prefetch_depth": 2}])
def test_a_budget_that_is_one_byte_too_small(healthy: Healthy, more: dict[str, Any]) -> None:
    enough = smallest(healthy.config, unit=healthy.unit, **more)
    with (
        pytest.raises(InputError, match=f"--host-budget of {enough - 1:,} bytes is too small"),
        streamed(healthy, host_budget=f"{enough - 1}B", **more),
    ):
        pass
    with streamed(healthy, host_budget=f"{enough}B", **more) as loaded:
        assert same(list(tokens_of(loaded)), healthy.tokens)


def load_any(healthy: Healthy) -> None:
    """Load the model where a budget is no trouble."""
    load(healthy.config, host_budget="1GB", unit=healthy.unit).close()


def test_files_that_are_wrong_from_the_start(healthy: Healthy) -> None:
    cut(healthy.file)
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read: .* not fully covered") as caught:
        load_any(healthy)
    assert "truncated" in caught.value.hint
    healthy.file.unlink()
    with pytest.raises(InputError, match=r"holds no \*?\.?safetensors|no checkpoint"):
        load_any(healthy)


def test_shards(healthy: Healthy) -> None:
    """Tensors of a unit lie in several files, of which one may be gone or change."""
    tensors = list(load_file(healthy.file).items())
    shards = {"a.safetensors": dict(tensors[::2]), "b.safetensors": dict(tensors[1::2])}
    healthy.file.unlink()
    directory = healthy.file.parent
    write(directory, shards, {name: file for file, own in shards.items() for name in own})
    with streamed(healthy) as loaded:
        assert same(list(tokens_of(loaded)), healthy.tokens)
        touch(directory / "b.safetensors")
        with pytest.raises(DsakvError, match=r"b\.safetensors changed since"):
            next(tokens_of(loaded))
    (directory / "a.safetensors").unlink()
    with pytest.raises(InputError, match=r"a\.safetensors is missing"):
        load_any(healthy)
