"""What a plan takes from a trace besides its selections: how long steps took, how many requests ran, how long they
were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from dsakv.analysis.links import Floats, Ints
from dsakv.errors import InputError
from dsakv.trace.formats import read_records
from dsakv.trace.open import TraceDir

_FIELDS = ("request_id", "engine_step", "step_wall_us", "step_idx", "layer_id", "seq_len_current")
_ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
_VARIED = 8
"""Decode steps that are needed on either side of the mean batch to tell how step time grows with the batch."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """A run's ``E`` recorded decode steps and ``N`` requests."""

    engine_step: Ints
    """[E] ascending."""
    batch: Ints
    """[E] requests that decoded."""
    wall_us: Floats | None
    """[E] how long each took; None where the trace does not say."""
    tokens: Ints
    """[N] tokens that each request came to."""
    first: Ints
    """[N] its first recorded step, by its place in ``engine_step``."""
    last: Ints
    """[N]"""
    layers: int
    row_bytes: int
    """Of a token in one layer."""
    key_bytes: int
    """Of its index key there, which stays on the device; 0 where the trace does not tell."""

    def blocks_at_once(self, block_size: int) -> int:
        """The most blocks of a layer that running requests had at a time; prefixes that they share count for each."""
        return int(self._at_once(-(-self.tokens // block_size)).max())

    @property
    def tokens_at_once(self) -> int:
        """The most tokens that they had."""
        return int(self._at_once(self.tokens).max())

    @property
    def kv_bytes_at_once(self) -> int:
        """The most memory that their KV took, index keys and all layers included."""
        return self.tokens_at_once * self.token_bytes

    @property
    def token_bytes(self) -> int:
        """Of a token in all layers, with its index keys."""
        return self.layers * (self.row_bytes + self.key_bytes)

    def _at_once(self, sizes: Ints) -> Ints:
        """[E] sum of ``sizes`` [N] over the requests that ran."""
        change = np.zeros(len(self.engine_step) + 1, dtype=np.int64)
        np.add.at(change, self.first, sizes)
        np.add.at(change, self.last + 1, -sizes)
        return np.cumsum(change)[:-1]


@dataclass(frozen=True, slots=True)
class StepTime:
    """How long a decode step takes without offloading: ``mean_ms`` with the trace's batch, and what a request more
    adds."""

    mean_ms: float
    mean_batch: float
    per_request_ms: float
    """0 where the trace does not tell, or the device is another one."""
    source: str
    """Where it is from, in words."""

    def at(self, concurrency: float) -> float:
        """Milliseconds with so many requests; with fewer than the trace's, no less than in proportion to them."""
        told = self.mean_ms + self.per_request_ms * (concurrency - self.mean_batch)
        return max(told, self.mean_ms * min(concurrency / self.mean_batch, 1.0))


def read_run_facts(trace: TraceDir, advance: Callable[[int], None]) -> RunFacts:
    """Read every record once; ``advance`` gets bytes.

    Raises:
        InputError: a record lacks ``engine_step`` or another field, nothing decoded, or nothing tells the bytes of a
            KV row.
        DsakvError: a file cannot be read.
    """
    steps: dict[int, tuple[float, set[Any]]] = {}
    requests: dict[Any, list[int]] = {}  # tokens, first step, last step
    layers: set[int] = set()
    timed = True
    for shard in trace.shards:
        for place, record in read_records(shard, _FIELDS):
            try:
                step_idx, step, tokens = (int(record[name]) for name in ("step_idx", "engine_step", "seq_len_current"))
                request, layer = record["request_id"], int(record["layer_id"])
                wall = record.get("step_wall_us")
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise InputError(
                    f"{place}: a plan needs engine_step, step_idx, layer_id and seq_len_current of each record: "
                    f"{error!r}",
                    "trace again, or leave --plan out",
                ) from None
            if step_idx < 0:
                continue
            timed &= isinstance(wall, int) and wall > 0
            steps.setdefault(step, (float(wall or 0), set()))[1].add(request)
            seen = requests.setdefault(request, [tokens, step, step])
            seen[:] = max(seen[0], tokens), min(seen[1], step), max(seen[2], step)
            layers.add(layer)
        advance(shard.stat().st_size)
    if not steps:
        raise InputError(f"no decode step is recorded in {trace.path}", "a plan needs some: leave --plan out")
    engine_step = np.array(sorted(steps), dtype=np.int64)
    tokens_, first, last = np.array(list(requests.values()), dtype=np.int64).T
    row_bytes, key_bytes = _bytes(trace)
    return RunFacts(
        engine_step,
        np.array([len(steps[step][1]) for step in engine_step.tolist()], dtype=np.int64),
        np.array([steps[step][0] for step in engine_step.tolist()]) if timed else None,
        tokens_,
        np.searchsorted(engine_step, first),
        np.searchsorted(engine_step, last),
        len(layers),
        row_bytes,
        key_bytes,
    )


def _bytes(trace: TraceDir) -> tuple[int, int]:
    """Of a token's KV row in a layer, and of its index key."""
    model = (trace.run_meta or {}).get("model")
    model = model if isinstance(model, dict) else {}
    row = model.get("kv_bytes_per_token_layer")
    if type(row) is not int or row < 1:
        raise InputError(
            f"nothing in {trace.path} tells how many bytes a KV row takes",
            "run_meta.json has it as kv_bytes_per_token_layer of the model; without it there is nothing to plan",
        )
    dim, dtype = model.get("index_head_dim"), model.get("dtype")
    if type(dim) is not int or dim < 1:
        return row, 0
    if model.get("index_fp8") is True or dtype == "fp8":
        return row, dim + 4  # a scale for each key
    return row, dim * _ITEM.get(str(dtype), 2)


def step_time(facts: RunFacts, given_ms: float, tiered_us: float, forced: int) -> StepTime:
    """The TPOT without offloading: ``given_ms``, or where that is 0 what the steps of the trace took, less
    ``tiered_us`` a step that its own tiers took. ``forced`` requests were read in one pass, not decoded.

    Raises:
        InputError: neither is known.
    """
    mean_batch = float(facts.batch.mean())
    if given_ms:
        return StepTime(given_ms, mean_batch, 0.0, "given with --base-tpot-ms")
    hint = "give --base-tpot-ms, the time of a decode step of the device that you plan for"
    if facts.wall_us is None:
        raise InputError("not every record says how long its step took (step_wall_us)", hint)
    if forced:
        raise InputError("known answers were read in one pass: no step of the trace was a decode step", hint)
    mean_us = float(facts.wall_us.mean()) - tiered_us
    if mean_us <= 0:
        raise InputError("summary.json says that reading tiers took longer than all decode steps", hint)
    source = "mean step_wall_us of the trace's decode steps"
    if tiered_us:
        source += f", less {tiered_us / 1e3:.3g} ms a step that its own tiers took"
    slope = 0.0 if tiered_us else _slope(facts.batch.astype(np.float64), facts.wall_us)
    return StepTime(mean_us / 1e3, mean_batch, slope / 1e3, source)


def _slope(batch: Floats, wall_us: Floats) -> float:
    """What a request more in the batch adds, by least squares; 0 where batches hardly differ, or larger ones are not
    slower."""
    above = int((batch > batch.mean()).sum())
    if min(above, len(batch) - above) < _VARIED or batch.std() < 0.1 * batch.mean():
        return 0.0
    off = batch - batch.mean()
    return max(float((off * wall_us).sum() / (off**2).sum()), 0.0)


def tiers_took(trace: TraceDir, steps: int) -> float:
    """Microseconds a decode step that the run's own tiers took to read and write; 0 where it had none.

    Raises:
        InputError: ``summary.json`` is damaged.
        OSError: it cannot be read.
    """
    path = trace.path / "summary.json"
    if "kv_tiers" not in (trace.run_meta or {}) or not path.exists():
        return 0.0
    try:
        decode = orjson.loads(path.read_bytes())["kv_tiers"]["transfers"]["decode"]
        far = [decode[tier] for tier in ("local_pool", "remote_pool") if tier in decode]
        took_ms = sum(float(one["read_ms"] or 0.0) + float(one["write_ms"] or 0.0) for one in far)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error!r}", "repair it, or give --base-tpot-ms") from None
    return took_ms * 1e3 / steps
