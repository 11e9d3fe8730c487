"""Eviction policies: sets of block ids in, hits and victims out. A new one is one file here and one line below."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dsakv.policies.base import Cache, Caches, Policy, Steps
from dsakv.policies.clock import Clock
from dsakv.policies.fifo import Fifo
from dsakv.policies.lfu import Lfu
from dsakv.policies.lru import Lru
from dsakv.policies.opt import Opt
from dsakv.policies.s3fifo import S3Fifo
from dsakv.policies.sieve import Sieve
from dsakv.policies.sink_recent import SinkRecent

__all__ = ["POLICIES", "Cache", "Caches", "Opt", "Policy", "Steps"]

POLICIES: Mapping[str, type[Policy]] = MappingProxyType(
    {
        "fifo": Fifo,
        "lru": Lru,
        "lfu": Lfu,
        "clock": Clock,
        "sieve": Sieve,
        "s3fifo": S3Fifo,
        "sink_recent": SinkRecent,
    }
)
