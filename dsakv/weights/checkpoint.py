"""Safetensors files as one table of named tensors, memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open

from dsakv.errors import DsakvError, InputError
from dsakv.header import read_shard
from dsakv.layout import INDEX, listed, shards
from dsakv.weights.direct import Stamp


class Part(NamedTuple):
    """Part ``number`` of ``total`` equal ones along ``dim``; all of a tensor where that is None."""

    dim: int | None = None
    number: int = 0
    total: int = 1

    def whole(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a tensor of which this part has the given one."""
        return tuple(size * self.total if dim == self.dim else size for dim, size in enumerate(shape))

    def start(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Where in the whole tensor this part, of the given shape, begins."""
        return tuple(size * self.number if dim == self.dim else 0 for dim, size in enumerate(shape))


WHOLE = Part()


class Stored(NamedTuple):
    """What a header tells of a tensor."""

    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]
    place: tuple[int, int]
    """Number of the file, and of the tensor in the order in which that holds them."""
    in_place: bool = True
    """Whether the file holds these numbers themselves, so that they can be mapped."""


class Located(NamedTuple):
    """Where the bytes of a stored tensor begin."""

    path: Path
    begin: int
    stamp: Stamp
    """Of the file when its header was read first."""


class TensorSource(Protocol):
    """Named tensors, whatever files they are in."""

    @property
    def directory(self) -> Path:
        """The place that errors name."""

    @property
    def tensors(self) -> dict[str, Stored]:
        """What there is, by name."""

    def read(self, name: str, part: Part = WHOLE) -> torch.Tensor:
        """A tensor, or what of it ``part`` picks, in the shape and dtype that ``tensors`` tells."""

    def locate(self) -> dict[str, Located]:
        """Where the bytes of each tensor are. Raises InputError where they are not as ``tensors`` tells."""


class Checkpoint:
    """The tensors of a checkpoint directory, or of one file in it. Use as a context manager.

    Tensors that it returns are mapped files: read when they are used, with pages that the system may drop and read
    again. They stay valid when the checkpoint is closed, and writing to them does not reach the file.

    Raises InputError on entry where the directory is no checkpoint, a shard is missing or truncated, or the index
    disagrees with its shards.
    """

    def __init__(self, directory: Path, file: str | None = None) -> None:
        self.directory = directory
        self.tensors: dict[str, Stored] = {}
        self._file = file
        self._stack = ExitStack()
        self._owner: dict[str, Any] = {}
        self._files: dict[Path, Stamp] = {}

    def __enter__(self) -> Checkpoint:
        if not self.directory.is_dir():
            raise InputError(f"no checkpoint at {self.directory}", "--ckpt-path names a directory of safetensors files")
        index = listed(self.directory) if self._file is None else {}
        files = shards(self.directory, index) if self._file is None else [self.directory / self._file]
        for number, path in enumerate(files):
            file = self._open(path)
            for position, name in enumerate(file.offset_keys()):
                if index and index.get(name) != path.name:
                    raise InputError(f"{path} holds {name}, which {INDEX} places elsewhere", "download both again")
                if name in self._owner:
                    raise InputError(f"tensor {name} stands in two files", f"remove the stray file from {path.parent}")
                view = file.get_slice(name)
                self._owner[name] = file
                self.tensors[name] = Stored(view.get_dtype(), tuple(view.get_shape()), (number, position))
        for name, shard in index.items():
            if name not in self._owner:
                raise InputError(f"{shard} lacks tensor {name} that {INDEX} places there", "download the shard again")
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self._owner.clear()

    def locate(self) -> dict[str, Located]:
        """Where each tensor is, by name. Raises InputError for a file whose header does not account for all of it."""
        found: dict[str, Located] = {}
        for path, stamp in self._files.items():
            with path.open("rb") as file:
                facts = os.fstat(file.fileno())
                if Stamp.of(facts) != stamp:
                    raise DsakvError(f"{path} changed since it was opened", "run again when it is whole")
                shard = read_shard(path, file, facts.st_size, facts.st_mtime_ns)
            found |= {tensor.name: Located(path, tensor.start, stamp) for tensor in shard.tensors}
        return found

    def _open(self, path: Path) -> Any:
        if not path.is_file():
            if path.exists():
                raise InputError(f"checkpoint shard {path} is no file", "download it again")
            raise InputError(f"checkpoint shard {path} is missing", f"download it again; {INDEX} lists it")
        try:
            self._files[path] = Stamp.of(path.stat())
            return self._stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"checkpoint shard {path} cannot be read: {error}", "it is truncated or damaged: download it again"
            ) from error
        except RuntimeError as error:  # of a mapping for which there is no address space
            raise DsakvError(
                f"checkpoint shard {path} cannot be mapped: {error}", "allow more address space (ulimit -v)"
            ) from error

    def read(self, name: str, part: Part = WHOLE) -> torch.Tensor:
        """A tensor, or what of it ``part`` picks: a view of the mapped file, of which nothing else is touched."""
        if part.dim is None:
            tensor: torch.Tensor = self._owner[name].get_tensor(name)
            return tensor
        size = self.tensors[name].shape[part.dim] // part.total
        index = [slice(None)] * part.dim + [slice(part.number * size, (part.number + 1) * size)]
        view: torch.Tensor = self._owner[name].get_slice(name)[tuple(index)]
        return view


class Together:
    """The tensors of several sources, which have no name in common; errors name the place of the first."""

    def __init__(self, *sources: TensorSource) -> None:
        self.directory = sources[0].directory
        self.tensors = {name: stored for source in sources for name, stored in source.tensors.items()}
        self._owner = {name: source for source in sources for name in source.tensors}

    def read(self, name: str, part: Part = WHOLE) -> torch.Tensor:
        return self._owner[name].read(name, part)

    def locate(self) -> dict[str, Located]:
        return {name: place for owner in set(self._owner.values()) for name, place in owner.locate().items()}
