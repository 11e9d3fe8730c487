"""What a model is made for: precision, device, kernels, and its share among ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dsakv.distributed import ALONE, World
from dsakv.kernels import reference
from dsakv.kernels.contract import Kernels


@dataclass(frozen=True)
class ModelOptions:
    """How a model of a given shape is built on this rank."""

    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    kernels: Kernels = reference
    world: World = ALONE
    index_fp8: bool = False
    """Whether the indexer rounds its queries and keys through fp8."""
