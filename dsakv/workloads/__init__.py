"""Where requests come from. A new workload is one file or folder here and one line in ``build``."""

from __future__ import annotations

from dsakv.config import Config
from dsakv.workloads.base import InputCounts, Workload
from dsakv.workloads.ruler import Ruler

__all__ = ["WORKLOADS", "InputCounts", "Workload", "build"]

WORKLOADS = {"ruler": Ruler}


def build(name: str, config: Config) -> Workload:
    """The workload ``name`` (a key of ``WORKLOADS``) with the options of this configuration."""
    return WORKLOADS[name].from_config(config)
