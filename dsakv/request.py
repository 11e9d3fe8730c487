"""What goes into the engine and what comes out of it. No torch, so that workloads and traces can use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

TIERS = ("hbm", "local_pool", "remote_pool")
"""Where KV blocks lie: on the device, in host memory, in a pool that is reached over a network or a file system."""

Phase = Literal["prefill", "warm_up", "scoring", "decode"]
"""What blocks are read and written for: prompts, filling the hot tier before decode (a warm start), scores of a
selection that reads KV to make them (an oracle), decode."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to complete."""

    request_id: int
    """Number in run order, from 0."""
    prompt_token_ids: list[int]
    max_new_tokens: int
    source_id: str = ""
    """The id that the workload's source gives this item."""
    prompt: str | None = None
    """Text before tokenization, where there was one."""
    truncated_tokens: int = 0
    """Prompt tokens cut away to fit the model."""
    answers: tuple[str, ...] = ()
    """Gold strings, where the workload has them."""
    needle_spans: tuple[tuple[int, int], ...] = ()
    """Half-open token ranges of the needles in ``prompt_token_ids``."""
    arrival_s: float | None = None
    """Seconds from the workload's first request to this one; None where the source does not say."""
    completion: str | None = None
    """The answer that the source gives, for ``--forced``; None where it has none."""
    forced_token_ids: list[int] | None = None
    """Tokens that stand in for those that the model would generate: ``max_new_tokens`` of them, at least one. They are
    read together with the prompt, and nothing is decoded."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Further facts of the workload (task, context length, ...), written to ``requests.jsonl`` as they are."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request. Times are milliseconds on the clock of the engine's run, from its begin, or spans of
    it.
    """

    request_id: int
    prompt_tokens: int
    token_ids: list[int]
    """Generated tokens without the end-of-sequence token."""
    finish_reason: Literal["stop", "length"]
    decode_steps: int
    """Decode steps run for this request, or read in their place: the number of generated tokens, end of sequence
    included, less one."""
    arrival_ms: float
    queue_ms: float
    """From arrival to the start of the prefill."""
    ttft_ms: float
    """From arrival to the first token; where the answer is known, to the end of the prompt's prefill."""
    tpot_ms: float | None
    """``(latency - ttft) / (generated tokens - 1)``; None for a single token and where the answer is known."""
    latency_ms: float
    cached_tokens: int = 0
    """Prompt tokens whose KV earlier requests had left in the cache."""
    kv_blocks: list[int] = field(default_factory=list)
    """The physical blocks of its KV in the order of its tokens; empty where the engine does not tell them."""


@dataclass(frozen=True, slots=True)
class StepRecords:
    """What every layer selected for the recorded queries of one step: ``L`` layers, ``B`` queries, ``K`` columns.

    Arrays live on the host. Columns of ``positions`` and ``scores`` from ``counts[b]`` on are padding.
    """

    request_id: NDArray[np.int64]  # [B]
    step_idx: NDArray[np.int64]  # [B], negative for queries of the prefill's tail
    step_offset: NDArray[np.int64]  # [B], how many steps after the first of a known answer's that are read at once
    seq_len: NDArray[np.int64]  # [B]
    counts: NDArray[np.int64]  # [B], min(seq_len, top-k)
    positions: NDArray[np.int32]  # [L, B, K], ascending
    scores: NDArray[np.float32]  # [L, B, K], in the order of positions
    index_layer_id: NDArray[np.int32]  # [L], the layer whose indexer selected
    found: NDArray[np.uint8] | None
    """[L, B, K], tier (index into ``TIERS``) that held each position's block when the step began: the same one for all
    positions of a block. None: all on the device."""
    fetch_us: NDArray[np.float64]  # [3, L, B], by tier, time of the one batch that read for this query; NaN: none did
    fetch_batch: NDArray[np.int64]  # [3, L, B], queries that this batch read for; 0: none did
    row_bytes: int
    """Bytes of the KV row of a token in a layer."""


@dataclass(slots=True)
class TierTraffic:
    """What one tier did, whatever for: blocks looked up there, and what was moved.

    Blocks are distinct ones of a layer's step: two requests that share one count once.
    """

    hits: int = 0
    """Blocks that a layer's step needed and found here."""
    cold: int = 0
    """Of them, those that decode reads for the first time (since prefill, or since they were written): what a cold
    start costs."""
    reads: int = 0
    """Batches."""
    read_ops: int = 0
    """Blocks; of the device, rows of tokens."""
    bytes_read: int = 0
    """Payload, as ``bytes_written``."""
    read_us: float = 0.0
    writes: int = 0
    write_ops: int = 0
    bytes_written: int = 0
    write_us: float = 0.0
    retries: int = 0
    """Commands that were tried again, of a remote pool that failed for a while."""
    staged_blocks: int = 0
    """Most blocks that a layer's step held beside the hot ones, because they did not stay; counted for the device."""

    def add(self, other: TierTraffic) -> None:
        """Add what ``other`` counted."""
        for own in fields(self):
            mine, theirs = getattr(self, own.name), getattr(other, own.name)
            setattr(self, own.name, max(mine, theirs) if own.name == "staged_blocks" else mine + theirs)


@dataclass(slots=True)
class WeightTraffic:
    """What it took to have the weights of a step, or of several that went through the layers together, in place."""

    units: int = 0
    """Units that were read for it, experts included."""
    ahead: int = 0
    """Of these, without experts, those that had begun to come before they were asked for."""
    disk_reads: int = 0
    """Requests to the system."""
    disk_bytes: int = 0
    """Read from disk for it, by then or ahead, from page boundary to page boundary: what the system was asked for."""
    expert_bytes: int = 0
    """Of these, those of experts."""
    planned_bytes: int = 0
    """What the plan says that these units take to read."""
    disk_us: float = 0.0
    """Time within it in which at least one read was under way."""
    device_bytes: int = 0
    """Copied or converted from host memory into weights that are ready to compute with."""
    device_us: float = 0.0
    """Time within it that this took."""
    wait_us: float = 0.0
    """Time that computing waited for weights."""
    expert_hits: int = 0
    """Experts that were needed and in place."""
    expert_misses: int = 0

    def add(self, other: WeightTraffic) -> None:
        """Add what ``other`` counted."""
        for own in fields(self):
            setattr(self, own.name, getattr(self, own.name) + getattr(other, own.name))


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass of the engine."""

    index: int
    """Steps before this one; a pass over known answers counts as the decode steps that it stands for."""
    kind: Literal["prefill", "decode"]
    wall_us: int
    new_tokens: list[tuple[int, int]]
    """(request_id, token) of every sequence that got a token, end of sequence included."""
    prompt_tokens: int
    """Tokens that this step prefilled, of prompts and of known answers."""
    finished: list[Completion]
    records: StepRecords | None
    """None where nothing is recorded: tracing is off, or a prefill step without a recorded tail."""
    traffic: Mapping[tuple[Phase, str], TierTraffic] = field(default_factory=dict)
    """What each tier (by name) did in this step; empty where all KV lies on the device. Of steps that went through the
    layers together the last one has it for all, as it has ``weights``."""
    weights: WeightTraffic | None = None
    """None where all weights are in place."""
