"""Which kernels a device runs."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from dsakv.kernels import reference, tile
from dsakv.kernels.contract import Kernels


def kernels_for(device: torch.device) -> Kernels:
    """The kernels for CUDA where tilelang is installed to compile them, else the reference, which runs anywhere."""
    return tile if device.type == "cuda" and find_spec("tilelang") is not None else reference


def is_slow(kernels: Kernels, device: torch.device) -> bool:
    """Whether a CUDA device runs the reference, because tilelang is missing."""
    return device.type == "cuda" and kernels is reference
