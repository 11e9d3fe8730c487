"""What is read into which parameter, and every reason not to begin."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from dsakv.errors import InputError
from dsakv.kernels.contract import FP8_BLOCK
from dsakv.weights.checkpoint import Part, Stored, TensorSource
from dsakv.weights.layout import Layout

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
FP8 = "F8_E4M3"
DTYPES = FLOATS | {FP8: torch.float8_e4m3fn}
_HINT_SHAPE = "the model's shape (--config or config.json) does not fit this checkpoint"


class Reading(NamedTuple):
    """A parameter, and the stored tensor that it is filled from."""

    name: str
    owner: nn.Module
    leaf: str
    stored: str
    part: Part
    scale: str | None
    """Stored scales to multiply with, where a float8 weight becomes one of wider numbers."""
    mapped: bool
    """Whether the parameter is a part of the mapped file as it is."""
    n_bytes: int
    """To be read and copied for it; none where it is mapped."""


@dataclass(frozen=True)
class Plan:
    """One reading for each parameter, in the order of the files."""

    readings: list[Reading]

    @property
    def n_bytes(self) -> int:
        return sum(reading.n_bytes for reading in self.readings)


def plan_loading(model: nn.Module, checkpoint: TensorSource, layout: Layout, device: torch.device) -> Plan:
    """How to fill ``model`` on ``device`` from ``checkpoint``. Only headers are read.

    Raises InputError where a tensor is missing, has another shape or dtype than the model needs, lacks its scales, or
    has no place in the model.
    """
    readings = [_reading(checkpoint, layout, device, *found) for found in _parameters(model)]
    takers: dict[str, str] = {}
    for reading in readings:
        if reading.stored in takers:
            raise RuntimeError(f"{takers[reading.stored]} and {reading.name} are both stored as {reading.stored}")
        takers[reading.stored] = reading.name
    used = set(takers) | {reading.scale for reading in readings if reading.scale}
    names = set(checkpoint.tensors)
    if surplus := sorted(names - used - layout.unused(names)):
        raise _surplus(checkpoint, surplus, {layout.stored_name(_scale_of(r.name)): r for r in readings if _scaled(r)})
    return Plan(sorted(readings, key=lambda reading: checkpoint.tensors[reading.stored].place))


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Names of all parameters, with the module and the attribute that hold each; shared ones once for each name."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{leaf}" if prefix else leaf, module, leaf


def _scale_of(name: str) -> str:
    return f"{name.rpartition('.')[0]}.scale".removeprefix(".")


def _scaled(reading: Reading) -> bool:
    """Whether the parameter is one that a checkpoint may have in float8, with scales."""
    return reading.leaf == "weight" and getattr(reading.owner, reading.leaf).dim() == 2


def _reading(
    checkpoint: TensorSource, layout: Layout, device: torch.device, name: str, owner: nn.Module, leaf: str
) -> Reading:
    parameter: nn.Parameter = getattr(owner, leaf)
    stored, part, where = layout.stored_name(name), layout.part(name), checkpoint.directory
    tensor = _present(checkpoint, stored)
    whole = part.whole(parameter.shape)
    if tensor.shape != whole:
        raise InputError(
            f"tensor {stored} in {where} has shape {list(tensor.shape)}, the model needs {list(whole)}", _HINT_SHAPE
        )
    reading = Reading(name, owner, leaf, stored, part, None, False, 0)
    if parameter.dtype == torch.float8_e4m3fn:
        if tensor.dtype != FP8:
            raise InputError(
                f"tensor {stored} in {where} has dtype {tensor.dtype}, the model needs {FP8}",
                "computing in fp8 takes a checkpoint in fp8: choose another --dtype",
            )
        size = 0 if part.dim is None or part.total == 1 else parameter.shape[part.dim]
        if size % FP8_BLOCK:
            raise InputError(
                f"tensor {stored} in {where}: {size * part.total} does not divide among {part.total} ranks in "
                f"squares of {FP8_BLOCK}, which share a scale",
                "use fewer ranks, or --dtype bfloat16",
            )
    elif tensor.dtype == FP8 and _scaled(reading):
        reading = reading._replace(scale=_check_scale(checkpoint, layout.stored_name(_scale_of(name)), stored))
    elif tensor.dtype not in FLOATS:
        raise InputError(
            f"tensor {stored} in {where} has dtype {tensor.dtype}",
            f"dsakv reads {', '.join(FLOATS)}, and weights in {FP8} with scales",
        )
    dtype = DTYPES[tensor.dtype]
    if tensor.in_place and device.type == "cpu" and dtype == parameter.dtype and (not part.dim or part.total == 1):
        return reading._replace(mapped=True)
    return reading._replace(n_bytes=math.prod(parameter.shape) * dtype.itemsize)


def _present(checkpoint: TensorSource, stored: str) -> Stored:
    try:
        return checkpoint.tensors[stored]
    except KeyError:
        raise InputError(
            f"{checkpoint.directory} lacks tensor {stored}", "is the checkpoint complete, and does --config fit it?"
        ) from None


def _check_scale(checkpoint: TensorSource, scale: str, weight: str) -> str:
    """The name of the scales of a float8 weight; InputError where they are none that fit."""
    where = checkpoint.directory
    if scale not in checkpoint.tensors:
        raise InputError(f"{where} lacks tensor {scale}, the scales of {weight}", "download the checkpoint again")
    tensor = checkpoint.tensors[scale]
    needed = [-(-size // FP8_BLOCK) for size in checkpoint.tensors[weight].shape]
    if list(tensor.shape) != needed:
        raise InputError(
            f"tensor {scale} in {where} has shape {list(tensor.shape)}, squares of {FP8_BLOCK} need {needed}",
            "other ways to scale float8 weights are not supported",
        )
    if tensor.dtype != "F32":
        raise InputError(f"tensor {scale} in {where} has dtype {tensor.dtype}", "scales must be F32")
    return scale


def _surplus(checkpoint: TensorSource, surplus: list[str], scales: dict[str, Reading]) -> InputError:
    """Why tensors of the checkpoint have no place in the model."""
    for name in surplus:
        if name in scales and checkpoint.tensors[weight := scales[name].stored].dtype != FP8:
            return InputError(
                f"{checkpoint.directory} holds scales {name}, but {weight} is in {checkpoint.tensors[weight].dtype}",
                "the checkpoint mixes files of two models, or was half converted",
            )
    return InputError(
        f"{checkpoint.directory} holds tensor {surplus[0]} that the model has no place for ({len(surplus)} in all)",
        _HINT_SHAPE,
    )
