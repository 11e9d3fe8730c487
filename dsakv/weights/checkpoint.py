"""A directory of safetensors files as one table of named tensors, and a model filled from it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from dsakv.errors import DsakvError, InputError


class Part(NamedTuple):
    """Part ``number`` of ``total`` equal ones along ``dim``; all of a tensor where that is None."""

    dim: int | None = None
    number: int = 0
    total: int = 1


WHOLE = Part()
_FLOATS = ("F32", "BF16", "F16")
_FP8 = ("F8_E4M3",)  # never made of wider numbers: the scales beside it would not fit
_INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a checkpoint directory, memory-mapped. Use as a context manager.

    Raises InputError on entry where the directory is no checkpoint, a shard is missing or truncated, or the index
    disagrees with its shards.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = ExitStack()
        self._owner: dict[str, Any] = {}

    def __enter__(self) -> Checkpoint:
        if not self.directory.is_dir():
            raise InputError(f"no checkpoint at {self.directory}", "--ckpt-path names a directory of safetensors files")
        listed = self._listed()
        for path in sorted({self.directory / file for file in listed.values()} or self._unlisted()):
            if not path.is_file():
                raise InputError(f"checkpoint shard {path} is missing", f"download it again; {_INDEX} lists it")
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"checkpoint shard {path} cannot be read: {error}", "it is truncated or damaged: download it again"
                ) from error
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                if listed and listed.get(name) != path.name:
                    raise InputError(f"{path} holds {name}, which {_INDEX} places elsewhere", "download both again")
                if name in self._owner:
                    raise InputError(f"tensor {name} stands in two files", f"remove the stray file from {path.parent}")
                self._owner[name] = file
        for name, shard in listed.items():
            if name not in self._owner:
                raise InputError(f"{shard} lacks tensor {name} that {_INDEX} places there", "download the shard again")
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self._owner.clear()

    def _listed(self) -> dict[str, str]:
        """File by tensor name as the index has it; empty without an index."""
        path = self.directory / _INDEX
        if not path.exists():
            return {}
        try:
            weight_map = orjson.loads(path.read_bytes())["weight_map"]
            listed = {str(name): str(file) for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is damaged: {error}", "download it again") from error
        if not listed:
            raise InputError(f"{path} lists no tensor", "download it again")
        return listed

    def _unlisted(self) -> list[Path]:
        files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            raise InputError(f"{self.directory} holds no .safetensors file", "--ckpt-path names a checkpoint directory")
        return files

    @property
    def names(self) -> set[str]:
        return set(self._owner)

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype as safetensors names it, and shape, from the header alone."""
        view = self._owner[name].get_slice(name)
        return view.get_dtype(), tuple(view.get_shape())

    def read(self, name: str, part: Part = WHOLE) -> torch.Tensor:
        """A tensor, or what of it ``part`` picks; only that is read."""
        view = self._owner[name].get_slice(name)
        if part.dim is None:
            tensor: torch.Tensor = self._owner[name].get_tensor(name)
            return tensor
        size = view.get_shape()[part.dim] // part.total
        index = [slice(None)] * part.dim + [slice(part.number * size, (part.number + 1) * size)]
        sliced: torch.Tensor = view[tuple(index)]
        return sliced.contiguous()


def load_parameters(
    model: nn.Module,
    checkpoint: Checkpoint,
    stored_name: Callable[[str], str],
    *,
    device: torch.device,
    unused: Callable[[set[str]], set[str]],
    part: Callable[[str], Part] = lambda name: WHOLE,
) -> None:
    """Fill every parameter of ``model`` (on ``meta``) exactly once, in the dtype that it declares.

    ``stored_name`` maps a parameter's name to the checkpoint's, ``part`` to what of that tensor it holds; tensors of
    the checkpoint that no parameter asks for are errors unless ``unused`` picks them out. All names, shapes and dtypes
    are checked before the first read.
    """
    wanted = {name: stored_name(name) for name, _ in model.named_parameters()}
    shapes = {name: _whole(tuple(parameter.shape), part(name)) for name, parameter in model.named_parameters()}
    where = checkpoint.directory
    for name, stored in wanted.items():
        if stored not in checkpoint.names:
            raise InputError(f"{where} lacks tensor {stored}", "is the checkpoint complete, and does --config fit it?")
        dtype, shape = checkpoint.describe(stored)
        if shape != shapes[name]:
            raise InputError(
                f"tensor {stored} in {where} has shape {list(shape)}, the model needs {list(shapes[name])}",
                "the model's shape (--config or config.json) does not fit this checkpoint",
            )
        readable = _FP8 if model.get_parameter(name).dtype == torch.float8_e4m3fn else _FLOATS
        if dtype not in readable:
            raise InputError(
                f"tensor {stored} in {where} has dtype {dtype}", f"in this precision it must be {' or '.join(readable)}"
            )
    surplus = sorted(checkpoint.names - set(wanted.values()) - unused(checkpoint.names))
    if surplus:
        raise InputError(
            f"{where} holds tensor {surplus[0]} that the model has no place for ({len(surplus)} in all)",
            "the model's shape (--config or config.json) does not fit this checkpoint",
        )
    for name, stored in wanted.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        dtype = getattr(owner, leaf).dtype
        try:
            value = checkpoint.read(stored, part(name)).to(device=device, dtype=dtype)
        except torch.OutOfMemoryError as error:
            raise DsakvError(
                f"{device} has no room for the model's weights", "use a larger device, or --device cpu"
            ) from error
        except (SafetensorError, OSError) as error:
            raise DsakvError(f"cannot read tensor {stored} in {where}: {error}", "check the disk") from error
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False))


def _whole(shape: tuple[int, ...], part: Part) -> tuple[int, ...]:
    """The shape of a tensor of which ``part`` has the given one."""
    return tuple(size * part.total if dim == part.dim else size for dim, size in enumerate(shape))
