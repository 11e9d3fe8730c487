"""The head of a GGUF file: its metadata, and where each tensor lies.

The reader of the ``gguf`` package makes a mapped array of every text, of which a vocabulary has a hundred thousand:
two seconds a file. It also takes what a truncated file lacks for empty. Here every length is held against the file.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from dsakv.errors import InputError

T = TypeVar("T")

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_AGAIN = "it is truncated or damaged: download it again"
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of values that are numbers, as ``struct`` names them."""
_FLOAT32, _TEXT, _ARRAY = 6, 8, 9
_DEFAULT_ALIGNMENT = 32
_MOST_DIMENSIONS = 4
_KINDS = {int: "a number", float: "a decimal number", str: "a text", bool: "true or false", list: "a list"}


class GgufTensor(NamedTuple):
    """A tensor as it lies in the file."""

    encoding: int
    """Number of its type, or quantisation, in ggml."""
    shape: tuple[int, ...]
    """Numbers along each dimension, rows first, as torch has it."""
    start: int
    """Its first byte in the file."""
    n_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file tells before its tensors' numbers."""

    path: Path
    metadata: dict[str, Any]
    """Numbers, texts, and lists of them by key; 32-bit floats as the shortest decimal that means them."""
    tensors: dict[str, GgufTensor]

    def find(self, key: str, kind: type[T]) -> T | None:
        """The value of ``key``, None without one. Raises InputError where it is of another type."""
        value = self.metadata.get(key)
        if value is None or type(value) is kind:
            return value
        raise InputError(f"{self.path}: {key} is not {_KINDS[kind]}", "this file was made by an unknown converter")

    def need(self, key: str, kind: type[T]) -> T:
        """The value of ``key``. Raises InputError where there is none, or one of another type."""
        value = self.find(key, kind)
        if value is None:
            raise InputError(f"{self.path}: {key} is missing in the metadata", "take a complete GGUF file of the model")
        return value


def read_header(path: Path) -> GgufHeader:
    """Read the head of the GGUF file ``path`` and check that the file is long enough for its tensors.

    Raises InputError where there is no such file, it is no GGUF file of version 2 or 3, is truncated or damaged, is one
    of several parts, or has a tensor in an unknown quantisation.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise InputError(f"{path} is no GGUF file", "name a file in GGUF format, or a folder of safetensors")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data, path))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}", "name a GGUF file") from error


class _Cursor:
    """A place in the file, which moves on with what is read and never beyond the end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self.path = path
        self.at = len(MAGIC)
        self.end = len(data)

    def damaged(self, what: str) -> NoReturn:
        raise InputError(f"{self.path}: {what}", _AGAIN)

    def take(self, size: int) -> bytes:
        if size > self.end - self.at:
            self.damaged(f"the file ends within its header, at byte {self.end}")
        self.at += size
        return self._data[self.at - size : self.at]

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        raw = self.take(count * struct.calcsize(f"<{code}"))
        return struct.unpack(f"<{count}{code}", raw)

    def number(self, code: str) -> int:
        value: int = self.numbers(code, 1)[0]
        return value

    def text(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.damaged(f"a text of its header is no UTF-8: {raw[:40]!r}")

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind == _TEXT:
                return [self.text() for _ in range(count)]
            return list(self.numbers(self._code(kind), count))
        value = self.numbers(self._code(kind), 1)[0]
        return _shortest(value) if kind == _FLOAT32 else value

    def _code(self, kind: int) -> str:
        if kind not in _NUMBERS:
            self.damaged(f"a value of its header has the unknown type {kind}")
        return _NUMBERS[kind]


def _shortest(value: float) -> float:
    """1e-05 for what 32 bits make of it, 9.99999974e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def _parse(cursor: _Cursor) -> GgufHeader:
    version = cursor.number("I")
    if version not in VERSIONS:
        big_endian = version & 0xFFFF == 0
        raise InputError(
            f"{cursor.path} is a GGUF file {'in big-endian order' if big_endian else f'of version {version}'}",
            f"take one in little-endian order, of version {' or '.join(map(str, VERSIONS))}",
        )
    n_tensors, n_keys = cursor.numbers("Q", 2)
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.text()
        if key in metadata:
            cursor.damaged(f"its header names {key} twice")
        metadata[key] = cursor.value(cursor.number("I"))
    if metadata.get("split.count", 1) not in (0, 1):
        raise InputError(
            f"{cursor.path} is one of {metadata['split.count']} parts of a model",
            "join them into one file with llama.cpp's llama-gguf-split --merge",
        )
    return GgufHeader(cursor.path, metadata, _tensors(cursor, n_tensors, metadata.get("general.alignment")))


def _tensors(cursor: _Cursor, count: int, alignment: object) -> dict[str, GgufTensor]:
    found: dict[str, GgufTensor] = {}
    for _ in range(count):
        name, n_dims = cursor.text(), cursor.number("I")
        if name in found:
            cursor.damaged(f"its header names tensor {name} twice")
        if not 1 <= n_dims <= _MOST_DIMENSIONS:
            cursor.damaged(f"tensor {name} has {n_dims} dimensions")
        shape = cursor.numbers("Q", n_dims)[::-1]
        encoding, offset = cursor.number("I"), cursor.number("Q")
        found[name] = GgufTensor(encoding, shape, offset, _size(cursor, name, encoding, shape))
    step = _DEFAULT_ALIGNMENT if alignment is None else alignment
    if type(step) is not int or step < 1 or step & (step - 1):
        cursor.damaged(f"general.alignment is {step!r}")
    begin = -(-cursor.at // step) * step
    free = 0
    for name, tensor in sorted(found.items(), key=lambda item: item[1].start):
        if tensor.start % step or tensor.start < free:
            cursor.damaged(f"tensor {name} begins at {tensor.start}, where it cannot")
        free = tensor.start + tensor.n_bytes
    found = {name: tensor._replace(start=begin + tensor.start) for name, tensor in found.items()}
    for name, tensor in found.items():
        if tensor.start + tensor.n_bytes > cursor.end:
            cursor.damaged(f"tensor {name} ends at byte {tensor.start + tensor.n_bytes}, the file at {cursor.end}")
    return found


def _size(cursor: _Cursor, name: str, encoding: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(encoding)]
    except (ValueError, KeyError):
        raise InputError(
            f"{cursor.path}: tensor {name} is in quantisation {encoding}, which the gguf package does not know",
            "take another quantisation of the model, or try pip install --upgrade gguf",
        ) from None
    if shape[-1] % block:
        cursor.damaged(f"rows of tensor {name} have {shape[-1]} numbers, not a multiple of {block}")
    return prod(shape) // block * block_bytes
