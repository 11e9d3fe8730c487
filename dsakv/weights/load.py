"""A model filled from a checkpoint: every parameter once, in the dtype that it declares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dsakv.errors import DsakvError
from dsakv.weights.checkpoint import TensorSource
from dsakv.weights.fill import fill_tensor
from dsakv.weights.layout import Layout
from dsakv.weights.plan import Plan, Reading, plan_loading

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Shows how far loading is: takes all bytes to read, gives what is called with the number of bytes just read."""


def silent(n_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda done: None)


def load_parameters(
    model: nn.Module, checkpoint: TensorSource, layout: Layout, *, device: torch.device, progress: Progress = silent
) -> None:
    """Fill every parameter of ``model`` (on ``meta``) exactly once, in the dtype that it declares.

    Tensors go from the mapped files straight to ``device``; there is never more of a tensor in the host's own memory
    than the parameter itself. On CPU a parameter that is stored as it is needed is the mapped file: it costs nothing
    to load, is read when it is first used, and shows if somebody writes into the file.

    All names, shapes and dtypes are checked before the first read: raises InputError for a checkpoint that does not
    fit, DsakvError where the device has no room or the disk fails.
    """
    fill(model, plan_loading(model, checkpoint, layout, device), checkpoint, device=device, progress=progress)


def fill(
    model: nn.Module, plan: Plan, checkpoint: TensorSource, *, device: torch.device, progress: Progress = silent
) -> None:
    """Carry out ``plan``, and check that nothing of ``model`` was left out, set twice, or is not as declared."""
    declared = {name: (p.shape, p.dtype) for name, p in model.named_parameters(remove_duplicate=False)}
    filled: Counter[str] = Counter()
    with progress(plan.n_bytes) as advance:
        for reading in plan.readings:
            try:
                value = _load(reading, checkpoint, device)
            except (SafetensorError, OSError) as error:
                where = f"tensor {reading.stored} in {checkpoint.directory}"
                raise DsakvError(f"cannot read {where}: {error}", "check the disk") from error
            setattr(reading.owner, reading.leaf, nn.Parameter(value, requires_grad=False))
            filled[reading.name] += 1
            advance(reading.n_bytes)
    _check_filled(model, declared, filled, device)


def _load(reading: Reading, checkpoint: TensorSource, device: torch.device) -> Tensor:
    declared: nn.Parameter = getattr(reading.owner, reading.leaf)
    try:
        stored = checkpoint.read(reading.stored, reading.part)
        if reading.mapped and stored.data_ptr() % stored.itemsize == 0:  # files may hold numbers at odd addresses
            return stored
        value = torch.empty(stored.shape, dtype=declared.dtype, device=device)
        scale = checkpoint.read(reading.scale) if reading.scale else None
        fill_tensor(value, stored, scale, reading.part.start(stored.shape))
    except (RuntimeError, MemoryError) as error:  # of the CPU's allocator it is no OutOfMemoryError
        if isinstance(error, RuntimeError) and not _no_room(error):
            raise
        raise DsakvError(
            f"{device} has no room for the model's weights",
            "use a larger device, more ranks, or --device cpu" if device.type != "cpu" else "use a larger machine",
        ) from error
    return value


def _no_room(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _check_filled(
    model: nn.Module,
    declared: dict[str, tuple[torch.Size, torch.dtype]],
    filled: Counter[str],
    device: torch.device,
) -> None:
    """Raise RuntimeError, with names, unless every parameter was set once and is what the model declared."""
    tensors = dict(chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)))
    wrong = [f"{name} was set {filled[name]} times" for name in declared if filled[name] != 1]
    wrong += [f"{name} is no parameter" for name in filled if name not in declared]
    for name, tensor in tensors.items():
        if tensor.device.type != device.type:
            wrong.append(f"{name} is on {tensor.device}")
        elif name in declared and (tensor.shape, tensor.dtype) != declared[name]:
            wrong.append(f"{name} is {tensor.dtype} {list(tensor.shape)}")
    if wrong:
        raise RuntimeError(f"loading left the model wrong in {len(wrong)} places: {', '.join(wrong[:5])}")
