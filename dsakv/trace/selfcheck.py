"""Write a small trace through the real writer and check it: the format, end to end, without a model or torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from dsakv.config import Config, EngineConfig, TraceConfig
from dsakv.errors import DsakvError
from dsakv.prefix import PrefixIndex, prefix_key
from dsakv.request import TIERS, Completion, Phase, Request, Step, StepRecords, TierTraffic
from dsakv.trace.formats import read_records, shard_paths
from dsakv.trace.records import PrefixFacts
from dsakv.trace.run_dir import RunDir
from dsakv.trace.validate import Report, validate
from dsakv.trace.writer import TraceWriter

LAYERS = 3
TOPK = 48
BLOCK_SIZE = 16
BATCH_SIZE = 3
ROW_BYTES = 1152
SEED = 0
_WRITTEN: tuple[Phase, str] = ("prefill", "remote_pool")


def selfcheck(out: str | Path | None, format: Literal["jsonl", "parquet"] = "jsonl") -> Report:
    """Write a sample trace to ``out``, by default ``outputs/selfcheck_<time>``, and check every record of it.

    Raises:
        DsakvError: the trace is not what was to be written, or ``out`` cannot be written.
    """
    options = TraceConfig(enable=True, format=format, requests_per_shard=2, store_block_ids=True, prefill_tail=2)
    run = RunDir.create(out, "selfcheck", BLOCK_SIZE, sample_config(options))
    requests = sample_requests()
    expected: dict[tuple[int, int, int], list[int]] = {}
    steps = list(sample_steps(requests, options.prefill_tail))
    for step in steps:
        if step.records is not None:
            _collect(step.records, expected)
    write_sample(run, options, requests, steps)
    report = validate(run.trace_dir)
    for shard in shard_paths(run.trace_dir):
        for place, record in read_records(shard):
            key = (record["request_id"], record["step_idx"], record["layer_id"])
            if expected.pop(key, None) != record["selected_token_pos"]:
                raise DsakvError(f"{place}: not what was selected", "the trace writer has a bug: please report it")
            report.checks["selections"] += 1
    if expected:
        raise DsakvError(f"{len(expected)} records are missing", "the trace writer has a bug: please report it")
    return report


def sample_config(options: TraceConfig) -> bytes:
    """The configuration of a sample run, as JSON."""
    engine = EngineConfig(kv_block_size=BLOCK_SIZE, batch_size=BATCH_SIZE, seed=SEED)
    return msgspec.json.encode(Config(trace=options, engine=engine))


def write_sample(run: RunDir, options: TraceConfig, requests: Sequence[Request], steps: Iterable[Step]) -> None:
    """Write ``steps`` of those ``requests`` that are not finished in ``run``."""
    inputs = {"kept": len(requests), "truncated": 0, "dropped": {"empty": 1}}
    model = {"name": "none", "random_weights": True, "n_layers": LAYERS, "index_topk": TOPK}  # selections are drawn
    run.write_meta(dataset="selfcheck", model=model, seed=SEED, options=options, inputs=inputs)
    unfinished = [request for request in requests if request.request_id not in run.finished]
    prefix = sample_prefix(requests)
    with TraceWriter(run, options, seed=SEED, requests=unfinished, prefix=prefix, inputs=inputs) as writer:
        for step in steps:
            writer.write(step)


def _collect(records: StepRecords, into: dict[tuple[int, int, int], list[int]]) -> None:
    for b, count in enumerate(records.counts.tolist()):
        for layer, row in enumerate(records.positions[:, b, :count]):
            into[int(records.request_id[b]), int(records.step_idx[b]), layer] = row.tolist()


def sample_requests() -> list[Request]:
    """Prompts below and above the top-k, some of them with a common beginning."""
    rng = np.random.default_rng(SEED)
    header = rng.integers(0, 256, 40).tolist()
    requests = []
    for request_id, (prompt, new) in enumerate([(7, 4), (60, 9), (130, 1), (333, 6), (60, 12), (90, 3), (48, 7)]):
        ids = rng.integers(0, 256, prompt).tolist()
        if prompt > len(header):
            ids[: len(header)] = header
        requests.append(
            Request(request_id, ids, new, source_id=f"sample-{request_id}", needle_spans=((2, 5),), metadata={"n": new})
        )
    return requests


def sample_prefix(requests: Sequence[Request]) -> dict[int, PrefixFacts]:
    """Prefix facts of the requests in their order."""
    index = PrefixIndex(BLOCK_SIZE)
    facts = {}
    for request in requests:
        ids = request.prompt_token_ids
        facts[request.request_id] = PrefixFacts.of(prefix_key(ids, 32), index.lookup(ids), BLOCK_SIZE)
        index.add(ids, request.request_id)
    return facts


def sample_steps(requests: Sequence[Request], prefill_tail: int = 0) -> Iterator[Step]:
    """The steps of an engine that admits a request as another one finishes.

    Selections are drawn at random, and in decode steps the tiers of their blocks: the same ones for a request
    whichever others run beside it. A prefill writes its blocks to the remote pool.
    """
    read: set[tuple[int, int, int]] = set()
    waiting = deque(requests)
    running: list[tuple[Request, int]] = []  # with the tokens that it has generated
    index = 0
    while waiting or running:
        while waiting and len(running) < BATCH_SIZE:
            request = waiting.popleft()
            prompt = len(request.prompt_token_ids)
            tail = [(request, step) for step in range(-min(prefill_tail, prompt), 0)]
            done = [_completion(request)] if request.max_new_tokens == 1 else []
            records = _records(tail) if tail else None
            blocks = LAYERS * -(-prompt // BLOCK_SIZE)
            size = blocks * BLOCK_SIZE * ROW_BYTES
            wrote = TierTraffic(writes=LAYERS, write_ops=blocks, bytes_written=size, write_us=8.5 * blocks)
            tokens, moved = [(request.request_id, 1)], {_WRITTEN: wrote}
            yield Step(index, "prefill", 900, tokens, prompt, done, records, moved)
            index += 1
            if not done:
                running.append((request, 1))
        if running:
            records = _records([(request, made - 1) for request, made in running])
            running = [(request, made + 1) for request, made in running]
            finished = [_completion(request) for request, made in running if made == request.max_new_tokens]
            tokens = [(request.request_id, 2) for request, _ in running]
            yield Step(index, "decode", 700, tokens, 0, finished, records, _traffic(records, read))
            index += 1
            running = [(request, made) for request, made in running if made < request.max_new_tokens]


def _records(queries: Sequence[tuple[Request, int]]) -> StepRecords:
    seq_len = np.array([len(request.prompt_token_ids) + step + 1 for request, step in queries])
    counts = np.minimum(seq_len, TOPK)
    shape = (LAYERS, len(queries), int(counts.max()))
    positions: NDArray[np.int32] = np.zeros(shape, dtype=np.int32)  # [L, B, K]
    scores: NDArray[np.float32] = np.zeros(shape, dtype=np.float32)
    tiers: NDArray[np.uint8] = np.zeros((*shape[:2], int(seq_len.max()) // BLOCK_SIZE + 1), dtype=np.uint8)
    fetch_us: NDArray[np.float64] = np.zeros((len(TIERS), *shape[:2]))
    for b, (request, step) in enumerate(queries):
        rng = np.random.default_rng([SEED, request.request_id, step & 0xFFFF])
        fetch_us[:, :, b] = rng.uniform(5, 50, fetch_us.shape[:2])
        for layer in range(LAYERS):
            positions[layer, b, : counts[b]] = np.sort(rng.choice(seq_len[b], counts[b], replace=False))
            scores[layer, b, : counts[b]] = rng.standard_normal(counts[b])
            blocks = int(seq_len[b]) // BLOCK_SIZE + 1
            tiers[layer, b, :blocks] = rng.choice(len(TIERS), blocks, p=(0.5, 0.3, 0.2))
    positions[-1] = positions[-2]  # the last layer shares the selection of the one before
    found = None
    used: NDArray[np.bool_] = np.array([True, False, False]).reshape(-1, 1, 1) & np.ones(shape[:2], dtype=bool)
    if queries[0][1] >= 0:  # what a prefill has just computed is on the device
        found = np.take_along_axis(tiers, positions // BLOCK_SIZE, axis=2)
        valid = np.arange(shape[2]) < counts[:, None]  # [B, K]
        used = np.array([((found == tier) & valid).any(axis=2) for tier in range(len(TIERS))])
    fetch_us[~used] = np.nan
    return StepRecords(
        request_id=np.array([request.request_id for request, _ in queries]),
        step_idx=np.array([step for _, step in queries]),
        step_offset=np.zeros(len(queries), dtype=np.int64),
        seq_len=seq_len,
        counts=counts,
        positions=positions,
        scores=scores,
        index_layer_id=np.array([*range(LAYERS - 1), LAYERS - 2], dtype=np.int32),
        found=found,
        fetch_us=fetch_us,
        fetch_batch=used * used.sum(axis=2, keepdims=True),  # one batch of each tier reads for all queries of a layer
        row_bytes=ROW_BYTES,
    )


def _traffic(records: StepRecords, read: set[tuple[int, int, int]]) -> dict[tuple[Phase, str], TierTraffic]:
    """What the tiers did for a decode step; ``read``, which grows, is what those before it have read."""
    traffic: dict[tuple[Phase, str], TierTraffic] = {}
    assert records.found is not None
    for tier, name in enumerate(TIERS):
        total = traffic["decode", name] = TierTraffic()
        for layer in range(LAYERS):
            rows = [
                (request_id, layer, position // BLOCK_SIZE)
                for b, request_id in enumerate(records.request_id.tolist())
                for position, found in zip(
                    records.positions[layer, b, : records.counts[b]].tolist(), records.found[layer, b], strict=False
                )
                if found == tier
            ]
            blocks = set(rows)
            if blocks:
                ops, op_rows = (len(rows), 1) if name == "hbm" else (len(blocks), BLOCK_SIZE)
                us = float(np.nanmax(records.fetch_us[tier, layer]))
                total.add(
                    TierTraffic(len(blocks), len(blocks - read) if tier else 0, 1, ops, ops * op_rows * ROW_BYTES, us)
                )
                read |= blocks
    return traffic


def _completion(request: Request) -> Completion:
    new = request.max_new_tokens
    first, blocks = 100 * request.request_id, -(-(len(request.prompt_token_ids) + new) // BLOCK_SIZE)
    return Completion(
        request_id=request.request_id,
        prompt_tokens=len(request.prompt_token_ids),
        token_ids=[2] * new,
        finish_reason="length",
        decode_steps=new - 1,
        arrival_ms=0.0,
        queue_ms=1.0,
        ttft_ms=2.5,
        tpot_ms=0.7 if new > 1 else None,
        latency_ms=2.5 + 0.7 * (new - 1),
        kv_blocks=[first + i + (i > 1) for i in range(blocks)],  # in two stretches
    )
