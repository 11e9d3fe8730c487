"""Where requests come from. A new workload is one file or folder here and one line in ``WORKLOADS``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dsakv.config import Config
from dsakv.workloads.base import Workload
from dsakv.workloads.burstgpt import BurstGPT
from dsakv.workloads.file import FileRequests
from dsakv.workloads.longbenchv2 import LongBenchV2
from dsakv.workloads.mooncake import Mooncake
from dsakv.workloads.ruler import Ruler
from dsakv.workloads.sharegpt import ShareGPT

__all__ = ["WORKLOADS", "Workload", "build"]

WORKLOADS: Mapping[str, Callable[[Config], Workload]] = {
    "ruler": Ruler.from_config,
    "longbenchv2": LongBenchV2.from_config,
    "sharegpt": ShareGPT.from_config,
    "burstgpt": BurstGPT.from_config,
    "mooncake": Mooncake.from_config,
    "file": FileRequests.from_config,
}


def build(name: str, config: Config) -> Workload:
    """The workload ``name`` (a key of ``WORKLOADS``) with the options of this configuration."""
    return WORKLOADS[name](config)
