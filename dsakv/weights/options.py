"""How weights that do not fit are brought in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsakv.weights.placement import Residency


@dataclass(frozen=True)
class StreamOptions:
    """Budgets, and how what exceeds them is read. Budgets are bytes; None is no limit."""

    host_budget: int | None = None
    device_budget: int | None = None
    """On CUDA; None on CPU, where host memory is the device's."""
    unit: Literal["layer", "sublayer", "expert"] = "layer"
    residency: Residency = "static"
    expert_policy: str = "lru"
    """Name in ``policies.POLICIES``."""
    prefetch_depth: int = 2
    io_request: int = 8 << 20
    """Bytes of a read, a multiple of 4,096."""
    io_threads: int = 2
