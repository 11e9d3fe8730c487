"""Which kernels a device runs."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from dsakv.kernels import reference, tile
from dsakv.kernels.contract import Kernels


def kernels_for(device: torch.device) -> Kernels:
    """The kernels for CUDA where tilelang is installed to compile them, else the reference, which runs anywhere."""
    return tile if device.type == "cuda" and find_spec("tilelang") is not None else reference


def why_slow(kernels: Kernels, device: torch.device) -> str | None:
    """What keeps a CUDA device from kernels of its own, and what helps; None where nothing does."""
    if device.type != "cuda":
        return None
    if kernels is reference:
        return "tilelang is not installed, so the GPU runs plain PyTorch kernels: pip install tilelang"
    if tile.capability(device) < tile.OLDEST:
        return "the GPU is older than an A100, so it runs plain PyTorch kernels"
    return None
