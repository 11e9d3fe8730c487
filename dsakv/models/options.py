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
    fp8: bool = False
    """Whether projections hold float8 weights, and the cache float8 rows; ``index_fp8`` follows from it."""
    index_fp8: bool = False
    """Whether the indexer rounds its queries and keys through fp8."""
    ue8m0: bool = False
    """Whether activations' fp8 scales are powers of two. The model sets it, as its shape says."""
