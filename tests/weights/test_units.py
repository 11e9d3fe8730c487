"""Parameters that are read unit by unit against the same checkpoint loaded, for every rank; and odd files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from dsakv.config import ModelConfig, WeightsConfig
from dsakv.distributed import World
from dsakv.jobs.model import load_model, prepared_model
from dsakv.models.tiny import CONFIG, write_checkpoint
from dsakv.weights.direct import ALIGN, aligned
from dsakv.weights.plan import DTYPES
from dsakv.weights.stream import Planned
from dsakv.weights.units import NUMBERS, Place, Unit, _extents
from tests.models.checkpoints import save
from tests.models.fp8_checkpoints import FP8_SHAPE, write_fp8_checkpoint
from tests.models.llamas import save_llama
from tests.shapes import SMALL_SHAPE
from tests.weights.toy import write

FP8_SMALL: dict[str, Any] = CONFIG | FP8_SHAPE | {"num_hidden_layers": 2}
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "deepseek": ("deepseek", 2, {"dtype": "float32"}),
    "other numbers": ("deepseek", 2, {"dtype": "bfloat16"}),
    "fp8": ("fp8", 2, {"dtype": "fp8"}),
    "dequantised": ("fp8", 2, {"dtype": "float32"}),
    "glm": ("glm", 1, {}),
    "tied": ("tied", 1, {}),
}
UNITS = {"tied": ("layer", "sublayer")}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in ("deepseek", "fp8", "glm", "tied")}
    write_checkpoint(found["deepseek"], CONFIG | SMALL_SHAPE, seed=3)
    write_fp8_checkpoint(found["fp8"], FP8_SMALL)
    save(found["glm"], "glm types")
    save_llama(found["tied"], "tied")
    return found


@contextmanager
def planned(config: ModelConfig, world: World, unit: str) -> Iterator[tuple[nn.Module, Planned]]:
    weights = WeightsConfig(host_budget="1TB", unit=unit)  # type: ignore[arg-type]
    with prepared_model(config, world, None, weights) as prepared:
        assert prepared.planned is not None
        yield cast(nn.Module, prepared.loaded.model), prepared.planned
        prepared.planned.files.close()


def memory(size: int) -> Tensor:
    """Beginning at a page, and filled with something."""
    whole = torch.full((size + ALIGN,), 0xA5, dtype=torch.uint8)
    begin = -whole.data_ptr() % ALIGN
    return whole[begin : begin + size]


def read(unit: Unit, paths: list[Path]) -> Tensor:
    """Its raw memory, as plain reads fill it."""
    raw = memory(unit.raw_bytes)
    taken: list[range] = []
    for extent, place in unit.extents:
        path = paths[extent.file]
        data = path.read_bytes()[extent.begin : extent.end]
        assert extent.begin % ALIGN == place % ALIGN == 0
        assert extent.end % ALIGN == 0 or extent.end == path.stat().st_size
        assert len(data) == extent.end - extent.begin > 0
        mine = range(place, place + -(-len(data) // ALIGN) * ALIGN)
        assert mine.stop <= unit.raw_bytes
        assert all(mine.start >= other.stop or mine.stop <= other.start for other in taken)
        taken.append(mine)
        raw[place : place + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return raw


def values(unit: Unit) -> dict[str, Tensor]:
    return {w.reading.name: getattr(w.reading.owner, w.reading.leaf).detach() for w in unit.weights}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
    )


def check(config: ModelConfig, world: World, unit: str) -> None:
    """Each parameter comes once, has the bits of the loaded one, and lies to numbers as that does."""
    loaded = dict(cast(nn.Module, load_model(config, world).model).named_parameters(remove_duplicate=False))
    with planned(config, world, unit) as (model, plan):
        every = [*plan.units.units, *plan.units.experts.values()]
        names = Counter(name for one in every for name in values(one))
        assert set(names) == set(loaded) == {name for name, _ in model.named_parameters(remove_duplicate=False)}
        assert set(names.values()) == {1}
        for one in every:
            raw = read(one, plan.files.paths)
            for form in (one, one.whole()):
                ready = memory(form.ready_bytes)
                form.convert(raw, ready)
                if form is not one:
                    raw.zero_()  # a whole one needs its raw bytes no more
                form.put(raw, ready)
                for name, value in values(form).items():
                    assert same_bits(value, loaded[name]), name
                    assert value.data_ptr() % NUMBERS == loaded[name].data_ptr() % NUMBERS, name
                form.take()
                assert all(value.is_meta and value.shape == loaded[name].shape for name, value in values(form).items())


@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_loaded_weights(name: str, checkpoints: dict[str, Path]) -> None:
    source, n_ranks, more = CASES[name]
    config = ModelConfig(ckpt_path=str(checkpoints[source]), device="cpu", **more)
    for unit in UNITS.get(name, ("layer", "sublayer", "expert")):
        for rank in range(n_ranks):
            check(config, World(rank, n_ranks), unit)


def odd(source: Path, target: Path) -> None:
    """The same tensors in two files, whose headers put them at odd addresses."""
    (target / "config.json").write_text((source / "config.json").read_text())
    tensors = list(load_file(source / "model.safetensors").items())
    shards = {"a.safetensors": dict(tensors[::2]), "b.safetensors": dict(tensors[1::2])}
    write(target, shards, {name: file for file, own in shards.items() for name in own})
    for file in shards:
        data = (target / file).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(json.loads(data[8 : 8 + length])).encode()
        header += b" " * ((5 - len(header)) % 8)  # 8 + length is odd
        (target / file).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
        assert (8 + len(header)) % 2


@pytest.mark.parametrize("name", ["deepseek", "dequantised", "tied"])
def test_tensors_of_a_unit_in_two_files_at_odd_addresses(
    name: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    source, n_ranks, more = CASES[name]
    odd(checkpoints[source], tmp_path)
    config = ModelConfig(ckpt_path=str(tmp_path), device="cpu", **more)
    check(config, World(n_ranks - 1, n_ranks), "sublayer")


@given(
    sizes=st.lists(st.integers(0, 5 * ALIGN), min_size=1, max_size=3),
    spans=st.lists(st.tuples(st.integers(0, 2), st.floats(0, 1), st.integers(0, 3000)), min_size=1, max_size=8),
)
def test_extents_hold_every_tensor_and_no_page_twice(sizes: list[int], spans: list[tuple[int, float, int]]) -> None:
    wanted = {}
    for i, (number, where, length) in enumerate(spans):
        size = sizes[number % len(sizes)]
        begin = int(where * size)
        wanted[f"t{i}"] = Place(number % len(sizes), begin, "BF16", (min(length, size - begin) // 2,))
    extents, pieces, raw_bytes = _extents(wanted, sizes)
    pages = Counter((e.file, page) for e, _ in extents for page in range(e.begin // ALIGN, -(-e.end // ALIGN)))
    needed = {
        (lies.file, page)
        for lies in wanted.values()
        for first, last in [aligned(lies.begin, lies.begin + 2 * lies.shape[0], sizes[lies.file])]
        for page in range(first // ALIGN, -(-last // ALIGN))
    }
    assert pages == Counter(needed)
    assert raw_bytes == len(needed) * ALIGN
    assert all(extent.end <= sizes[extent.file] for extent, _ in extents)
    for (one, _), (other, _) in pairwise(extent for extent in extents if extent[0].end > extent[0].begin):
        assert one.file < other.file or one.end < other.begin, "these could be one"
    for name, lies in wanted.items():
        piece = pieces[name]
        assert (piece.dtype, piece.shape) == (DTYPES[lies.dtype], lies.shape)
        if lies.shape[0]:
            assert any(
                extent.file == lies.file
                and extent.begin <= lies.begin
                and lies.begin + 2 * lies.shape[0] <= extent.end
                and piece.begin == place + lies.begin - extent.begin
                for extent, place in extents
            )
