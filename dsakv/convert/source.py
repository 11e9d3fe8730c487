"""The checkpoint that is converted: its shards, held open, and its tensors by DeepSeek's names, all of them checked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NamedTuple

from dsakv.convert.architecture import may_be_fp8, scale_shape, tensors
from dsakv.errors import DsakvError, InputError
from dsakv.header import Shard, Stored, read_shard
from dsakv.layout import INDEX, listed, shards
from dsakv.models.deepseek_v32_names import hf_name, own_name, unused
from dsakv.models.dsa_shape import DsaShape
from dsakv.models.shapes import dsa_shape_of, read_config
from dsakv.settings import is_unicode

FP8 = "F8_E4M3"
_FLOATS = ("F32", "BF16", "F16")
_WRONG_CONFIG = "config.json does not fit this checkpoint, or a file of it is from elsewhere"


class Part(NamedTuple):
    """A tensor of the checkpoint."""

    tensor: Stored
    shard: int
    """Place of its file in :attr:`Source.shards`."""


class Source(NamedTuple):
    """An open checkpoint that is whole and fits its config."""

    directory: Path
    shape: DsaShape
    shards: list[Shard]
    files: list[BinaryIO]
    """The shards, open and unbuffered."""
    parts: Mapping[str, Part]
    """By DeepSeek's name, what has no part in decoding left out."""

    def read_into(self, shard: int, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of a shard from ``start`` on; DsakvError where the file or the disk fails."""
        file = self.files[shard].fileno()
        while view:
            try:
                got = os.preadv(file, [view], start)
            except OSError as error:
                raise DsakvError(
                    f"cannot read {self.shards[shard].path}: {error.strerror}", "check its disk, then convert again"
                ) from error
            if not got:
                raise self._changed(shard)
            view, start = view[got:], start + got

    def check_unchanged(self) -> None:
        """Raise DsakvError where a shard was written to since it was opened."""
        for number, (shard, file) in enumerate(zip(self.shards, self.files, strict=True)):
            now = os.fstat(file.fileno())
            if (now.st_size, now.st_mtime_ns) != (shard.size, shard.mtime_ns):
                raise self._changed(number)

    def _changed(self, shard: int) -> DsakvError:
        return DsakvError(
            f"{self.shards[shard].path} changed while it was read",
            "convert again, into another folder, when it is whole",
        )


@contextmanager
def open_source(directory: Path) -> Iterator[Source]:
    """Open the checkpoint in ``directory`` and check every tensor's name, dtype and shape; no tensor is read.

    Raises InputError with what is missing, surplus or not as it should be.
    """
    if not directory.is_dir():
        raise InputError(f"no checkpoint at {directory}", "--hf-ckpt-path names a directory of safetensors files")
    config = directory / "config.json"
    if not config.is_file():
        hint = "--hf-ckpt-path names a checkpoint in Hugging Face layout, with its config.json"
        raise InputError(f"no model config at {config}", hint)
    shape = dsa_shape_of(read_config(config), str(config))
    index = listed(directory)
    with ExitStack() as stack:
        parsed, files = [], []
        for path in shards(directory, index):
            if not is_unicode(path.name):
                raise InputError(f"checkpoint shard {str(path)!r} has a name that is no UTF-8", "rename it")
            file = stack.enter_context(_open(path))
            facts = os.fstat(file.fileno())
            parsed.append(read_shard(path, file, facts.st_size, facts.st_mtime_ns))
            files.append(file)
        stored = _stored(directory, parsed, index)
        left_out = unused(stored, shape.n_layers, shape.shared_layers)
        parts = {name: stored[name] for name in stored if name not in left_out}
        yield Source(directory, shape, parsed, files, MappingProxyType(_checked(directory, shape, parts)))


def _open(path: Path) -> BinaryIO:
    try:
        if path.is_file():  # a pipe would be waited for
            return open(path, "rb", buffering=0)
    except OSError as error:
        raise InputError(
            f"cannot read checkpoint shard {path}: {error.strerror}", "check its permissions and its disk"
        ) from error
    raise InputError(f"checkpoint shard {path} is missing", f"download it again; {INDEX} lists it")


def _stored(directory: Path, parsed: list[Shard], index: Mapping[str, str]) -> dict[str, Part]:
    """Every tensor by its own name, as the index has it where there is one."""
    found: dict[str, Part] = {}
    for number, shard in enumerate(parsed):
        for tensor in shard.tensors:
            if tensor.name in found:
                first = parsed[found[tensor.name].shard].path.name
                raise InputError(
                    f"tensor {tensor.name} stands in two files, {first} and {shard.path.name}",
                    f"remove the stray file from {directory}",
                )
            if index and index.get(tensor.name) != shard.path.name:
                raise InputError(
                    f"{shard.path} holds {tensor.name}, which {INDEX} places elsewhere", "download both again"
                )
            found[tensor.name] = Part(tensor, number)
    for name, file in index.items():
        if name not in found:
            raise InputError(f"{file} lacks tensor {name} that {INDEX} places there", "download the shard again")
    return found


def _checked(directory: Path, model: DsaShape, parts: Mapping[str, Part]) -> dict[str, Part]:
    """By DeepSeek's names: exactly what the architecture has, in its shapes, in dtypes that can be converted."""
    wanted: dict[str, tuple[int, ...]] = {}
    for name, shape in tensors(model):
        stored = hf_name(name)
        if stored not in parts:
            hint = f"is the checkpoint complete? else {_WRONG_CONFIG}"
            if name in parts:
                hint = "it has DeepSeek's names already, as if converted: give the checkpoint that it was made of"
            raise InputError(f"{directory} lacks tensor {stored}", hint)
        tensor = parts[stored].tensor
        _check_shape(directory, tensor, shape)
        _check_dtype(directory, tensor, (*_FLOATS, FP8) if may_be_fp8(name) else _FLOATS)
        wanted[name] = shape
        if tensor.dtype == FP8:
            scale = f"{name.removesuffix('weight')}scale"
            if hf_name(scale) not in parts:
                raise InputError(
                    f"{directory} lacks tensor {hf_name(scale)}, the scales of {stored}, which is fp8",
                    "download the checkpoint again",
                )
            _check_shape(directory, parts[hf_name(scale)].tensor, scale_shape(shape))
            _check_dtype(directory, parts[hf_name(scale)].tensor, ("F32",))
            wanted[scale] = scale_shape(shape)
    found: dict[str, Part] = {}
    for stored, part in parts.items():
        own = own_name(stored)
        if own is None or own not in wanted:
            raise _surplus(directory, stored, own, wanted)
        found[own] = part
    return found


def _check_shape(directory: Path, tensor: Stored, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise InputError(
            f"tensor {tensor.name} in {directory} has shape {list(tensor.shape)}, the model needs {list(shape)}",
            _WRONG_CONFIG,
        )


def _check_dtype(directory: Path, tensor: Stored, allowed: tuple[str, ...]) -> None:
    if tensor.dtype not in allowed:
        raise InputError(
            f"tensor {tensor.name} in {directory} has dtype {tensor.dtype}", f"it can be {', '.join(allowed)}"
        )


def _surplus(directory: Path, stored: str, own: str | None, wanted: Mapping[str, tuple[int, ...]]) -> InputError:
    if own is not None and own.endswith(".scale") and f"{own.removesuffix('scale')}weight" in wanted:
        return InputError(
            f"tensor {stored} in {directory} holds scales of a weight that is not fp8", "download the checkpoint again"
        )
    return InputError(f"{directory} holds tensor {stored} that the model has no place for", _WRONG_CONFIG)
