"""How an engine runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsakv.kv.options import TierOptions


@dataclass(frozen=True)
class EngineOptions:
    """How requests run, and what of it is recorded."""

    batch_size: int = 1
    block_size: int = 64
    prefill_chunk: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    admission: Literal["batch", "continuous"] = "continuous"
    """Whether ``batch_size`` requests start together once all before them are done, or each as soon as one is."""
    max_concurrency: int = 0
    """Requests that their senders keep in flight at most; 0 is no limit."""
    prefix_cache: bool = False
    """Whether a prompt uses the blocks that earlier requests left in the cache."""
    kv_blocks: int = 0
    """Blocks of the KV cache. 0 is what ``batch_size`` of the longest requests need, with ``prefix_cache`` what all
    requests together fill."""
    tiers: TierOptions | None = None
    """Where KV lives that the device does not keep; None keeps all of it there."""
    record: bool = False
    """Whether steps carry what the layers selected."""
    record_prefill_tail: int = 0
    """With ``record``: how many last queries of each prompt are recorded too."""
    sync: bool = True
    """On CUDA: wait for the device before the clock is read."""
