"""Headers of safetensors files: which tensors a file holds and where. Everything in them is checked; nothing is read.

A file is 8 bytes of length (little endian), so many bytes of JSON, and the tensors without gap or overlap.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard

import orjson

from dsakv.errors import InputError

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of an element by dtype."""
LARGEST_HEADER = 100_000_000
"""Bytes of JSON, the bound that the safetensors library sets too."""
AGAIN = "it is truncated or damaged: download it again"


class Stored(NamedTuple):
    """A tensor in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Of its first byte in the file."""
    size: int
    """In bytes."""


class Shard(NamedTuple):
    """A safetensors file by its header."""

    path: Path
    size: int
    mtime_ns: int
    header_sha256: str
    tensors: list[Stored]


def read_shard(path: Path, file: BinaryIO, size: int, mtime_ns: int) -> Shard:
    """The header of the open file ``path``, which has ``size`` bytes.

    Raises InputError where the header is not that of a whole, well-formed file.
    """
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        raise _damaged(path, f"{size} bytes are too few for its header")
    if length > LARGEST_HEADER:
        raise _damaged(path, f"a header of {length} bytes")
    data = file.read(length)
    if len(data) < length:
        raise _damaged(path, f"{size} bytes are too few for its header")
    return Shard(path, size, mtime_ns, hashlib.sha256(data).hexdigest(), parse_header(data, size, path))


def parse_header(data: bytes, size: int, path: Path) -> list[Stored]:
    """The tensors that a header's JSON ``data`` describes, in the order of the file, which has ``size`` bytes.

    Raises InputError for anything but a header that accounts for every byte of the file once.
    """
    try:
        pairs = json.loads(data, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is no JSON: {error}") from error
    if not isinstance(pairs, _Pairs):
        raise _damaged(path, "its header is no JSON object")
    found: dict[str, Stored] = {}
    for name, entry in pairs:
        if name == "__metadata__":
            continue
        if name in found:
            raise _damaged(path, f"its header names {name} twice")
        found[name] = _stored(name, entry, 8 + len(data), path)
    tensors = sorted(found.values(), key=lambda tensor: (tensor.start, tensor.size))
    end = 8 + len(data)
    for tensor in tensors:
        if tensor.start != end:
            raise _damaged(path, f"{tensor.name} begins at byte {tensor.start}, not at {end} where it should")
        end += tensor.size
    if end != size:
        raise _damaged(path, f"it has {size} bytes, its header describes {end}")
    return tensors


def format_header(tensors: Sequence[Stored]) -> bytes:
    """The head of a file that holds ``tensors``, whose ``start`` counts from the end of the head; with its length."""
    document = {
        tensor.name: {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [tensor.start, tensor.start + tensor.size],
        }
        for tensor in tensors
    }
    text = orjson.dumps(document)
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its names as often as they stand there."""


def _stored(name: str, entry: object, base: int, path: Path) -> Stored:
    fields = dict(entry) if isinstance(entry, _Pairs) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if (
        not isinstance(entry, _Pairs)
        or len(fields) != len(entry)
        or fields.keys() != {"dtype", "shape", "data_offsets"}
    ):
        raise _damaged(path, f"its header describes {name} otherwise than by dtype, shape and data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _damaged(path, f"{name} has the unknown dtype {dtype!r}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise _damaged(path, f"shape or data_offsets of {name} are no lists of sizes")
    begin, end = offsets
    size = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != size:
        raise _damaged(path, f"{name} takes {end - begin} bytes, its dtype and shape need {size}")
    return Stored(name, dtype, tuple(shape), base + begin, size)


def _counts(value: Any) -> TypeGuard[list[int]]:
    """Whether ``value`` is a list of few non-negative integers that a file can have."""
    return (
        isinstance(value, list) and len(value) <= 8 and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
    )


def _damaged(path: Path, problem: str) -> InputError:
    return InputError(f"checkpoint shard {path} cannot be read: {problem}", AGAIN)
