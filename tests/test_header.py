"""Headers of safetensors files: whatever they hold, they are read rightly or refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save

from dsakv.errors import InputError
from dsakv.header import LARGEST_HEADER, Shard, Stored, format_header, read_shard

PATH = Path("some.safetensors")
GOOD = save(
    {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.zeros(5, np.uint8),
        "empty": np.zeros((0, 4), np.float16),
        "scalar": np.array(7, np.int64),
    },
    metadata={"format": "pt"},
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "BF16", "F8_E4M3", "F7", "", 8, None]),
        "shape": st.lists(st.integers(-1, 4), max_size=3)
        | st.sampled_from([[2**63], [2**40, 2**40], "2", [True], [1.0]]),
        "data_offsets": st.lists(st.integers(-1, 40), min_size=1, max_size=3) | st.none() | st.just([2**64, 0]),
    },
    optional={"more": st.none()},
)


def read(data: bytes) -> Shard:
    return read_shard(PATH, io.BytesIO(data), len(data), 3)


def with_header(document: Any, data: bytes) -> bytes:
    text = json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + data


def check(data: bytes) -> None:
    """It is refused, or each byte behind the header belongs to one tensor."""
    try:
        shard = read(data)
    except InputError:
        return
    end = 8 + int.from_bytes(data[:8], "little")
    for tensor in shard.tensors:
        assert tensor.start == end
        end += tensor.size
    assert end == len(data)


def test_it_is_what_the_library_wrote(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(GOOD)
    shard = read(GOOD)
    with safe_open(tmp_path / "x.safetensors", framework="np") as file:
        assert {tensor.name for tensor in shard.tensors} == set(file.keys())
        for tensor in shard.tensors:
            found = file.get_tensor(tensor.name)
            assert (tensor.shape, tensor.size) == (found.shape, found.nbytes)
            assert GOOD[tensor.start : tensor.start + tensor.size] == found.tobytes()
    assert (shard.size, shard.mtime_ns, shard.path) == (len(GOOD), 3, PATH)


def test_a_formatted_header_is_read_back() -> None:
    stored = [Stored("x.weight", "BF16", (2, 3), 0, 12), Stored("y", "F8_E4M3", (3,), 12, 3)]
    head = format_header(stored)
    assert len(head) % 8 == 0
    found = read(head + bytes(15)).tensors
    assert found == [tensor._replace(start=tensor.start + len(head)) for tensor in stored]


@given(
    edits=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=6), cut=st.integers(0, 400)
)
def test_mutated_bytes(edits: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(GOOD)
    for place, value in edits:
        data[place] = value
    check(bytes(data[: len(data) - cut] if cut < 200 else data))


@given(
    document=st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__", "\ud800"]), ENTRY, max_size=4),
    size=st.integers(0, 40),
)
def test_made_up_entries(document: dict[str, Any], size: int) -> None:
    check(with_header(document, bytes(size)))


@given(text=st.text('[]{}":,0123456789eE+-.ntrufalsNaI \\', max_size=60))
def test_made_up_json(text: str) -> None:
    data = text.encode()
    check(len(data).to_bytes(8, "little") + data)


@given(size=st.integers(0, 40))
def test_consistent_entries_are_taken(size: int) -> None:
    document = {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    assert [tensor.size for tensor in read(with_header(document, bytes(size))).tensors] == [size]


@pytest.mark.parametrize("length", [LARGEST_HEADER + 1, 2**63, 2**64 - 1])
def test_a_header_beyond_all_bounds_is_not_read(length: int) -> None:
    class Hollow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            assert size == 8
            return super().read(size)

    with pytest.raises(InputError, match="cannot be read"):
        read_shard(PATH, Hollow(length.to_bytes(8, "little")), 2**62, 0)
