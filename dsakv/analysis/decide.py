"""The decision in plain words: how much near memory, which policy, which block size, and what an error would cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsakv.analysis.caches import Curve, LruCurves

REUSE_SHARE = 0.95
"""Of all accesses that any capacity can hit, the share that near memory should."""
WORTHWHILE = 0.01
"""Hit rate that another policy must gain to be worth its trouble."""
ALIKE = 1.05
"""Traffic within this factor counts as the same."""
NEAR = 1.5
"""Factor within which a simulated capacity stands for the advised one."""
LITTLE = 0.2
"""Hit rate of unlimited memory below which near memory is not worth much."""
NOT_WORTH_IT = 0.75
"""Share of the blocks of a cache from which on there is no small near tier."""

Result = dict[str, Any]


def decide(results: Sequence[Result], curves: Sequence[LruCurves]) -> list[list[dict[str, Any]]]:
    """Answers for each of the results of one trace, which differ in block size; ``curves`` are those of their caches.

    Each is ``{question, answer, rule, measured}``. They stand on the LRU curve that counts step by step: a step needs
    its whole set at once. There are none where nothing was read twice.
    """
    sizings = [_Sizing.of(result, lru) for result, lru in zip(results, curves, strict=True)]
    cold = {  # tokens that a step brings from far where nothing is kept
        result["block_size_tokens"]: lru.curve("step").accesses * result["block_size_tokens"] / count
        for result, lru in zip(results, curves, strict=True)
        if (count := result["step_set_blocks"]["count"])
    }
    return [
        [] if one is None else [_memory(one), _policy(one), _block_size(one, sizings, cold), _error(one)]
        for one in sizings
    ]


@dataclass(frozen=True, slots=True)
class _Sizing:
    """One result with the capacity that it calls for."""

    result: Result
    lru: LruCurves
    curve: Curve
    capacity: int
    """Blocks of one cache."""

    @classmethod
    def of(cls, result: Result, lru: LruCurves) -> _Sizing | None:
        """None where nothing was read twice."""
        curve = lru.curve("step")
        needed = curve.capacity_of(max(math.ceil(REUSE_SHARE * (curve.accesses - curve.cold)), 1))
        if needed is None:
            return None
        return cls(result, lru, curve, max(needed, result["step_set_blocks"]["p95"]))

    @property
    def block_size(self) -> int:
        return int(self.result["block_size_tokens"])

    @property
    def block_bytes(self) -> float | None:
        """Bytes of a block in one layer; None where the trace does not tell, or a block stands for several layers."""
        if not self.by_layer:
            return None
        model = (self.result["run_meta"] or {}).get("model")
        row = model.get("kv_bytes_per_token_layer") if isinstance(model, dict) else None
        return (
            self.block_size * row if isinstance(row, (int, float)) and not isinstance(row, bool) and row > 0 else None
        )

    @property
    def by_layer(self) -> bool:
        return self.result["key_mode"] == "request_layer" and not self.result["step_union"]

    def hit_rate(self, capacity: int) -> float:
        return self.curve.hits(capacity) / self.curve.accesses

    @property
    def enough(self) -> int:
        """The least capacity that hits all that any can hit: beyond it nothing has to be evicted."""
        return self.curve.capacity_of(self.curve.accesses - self.curve.cold) or 1

    def far_tokens(self, capacity: int) -> float:
        """Tokens that a step of a cache brings from far, in whole blocks."""
        missed = self.curve.accesses - self.curve.hits(capacity)
        return float(missed * self.block_size / self.result["step_set_blocks"]["count"])

    def size(self, tokens: float) -> str:
        """So many tokens of one layer, in bytes where the trace tells."""
        if self.block_bytes is None:
            return f"{tokens:,.0f} tokens"
        amount = tokens * self.block_bytes / self.block_size
        for unit in ("B", "kB", "MB", "GB"):
            if amount < 1000 or unit == "GB":
                break
            amount /= 1000
        return f"{amount:.3g} {unit}"

    @property
    def owner(self) -> str:
        """Whose a cache is."""
        if self.result["cache_scope"] == "stream":
            return "each layer of each running request" if self.by_layer else "each running request"
        return {"layer": "each layer", "request": "each running request", "run": "the whole run"}[
            self.result["cache_scope"]
        ]


def _memory(one: _Sizing) -> dict[str, Any]:
    seen = one.lru.footprint()
    share = one.capacity / seen
    rate, best = one.hit_rate(one.capacity), 1 - one.curve.cold / one.curve.accesses
    size = one.size(one.capacity * one.block_size)
    layers = len(one.result["layers"])
    whose = {"stream": "a request's", "layer": "all"}.get(one.result["cache_scope"])
    if whose is not None and layers > 1:
        size += f", {one.size(layers * one.capacity * one.block_size)} for {whose} {layers} layers"
    text = (
        f"{_blocks(one.capacity)} of {one.block_size} tokens for {one.owner} ({size}). LRU then hits {rate:.1%} of "
        f"block reads; with unlimited memory it would hit {best:.1%}, since first reads always miss."
    )
    if best < LITTLE:
        text += " Little is read twice: near memory buys little for this workload."
    elif share >= NOT_WORTH_IT:
        part = f"{share:.0%}" if share < 1 else "all"
        text += (
            f" That is {part} of the {seen:,.0f} blocks that a cache reads on average in this trace, which has no "
            "small near tier at this block size."
        )
    return {
        "question": "How much near memory?",
        "answer": text,
        "rule": f"the least LRU capacity that reaches {REUSE_SHARE:.0%} of the hits that any capacity can reach, and "
        "not below the 95th percentile of a step's set",
        "measured": {
            "capacity_blocks": one.capacity,
            "hit_rate": rate,
            "hit_rate_unlimited": best,
            "step_set_p95_blocks": one.result["step_set_blocks"]["p95"],
            "blocks_per_cache": seen,
            "bytes": None if one.block_bytes is None else one.capacity * one.block_bytes,
        },
    }


def _policy(one: _Sizing) -> dict[str, Any]:
    rule = (
        f"LRU, unless another policy hits a point ({WORTHWHILE:.0%} of accesses) more at a simulated capacity near "
        "the one above, which holds 95% of steps' sets and not everything; opt knows the future and bounds them all"
    )
    capacity, rates = _compared(one)
    bound = rates.get("opt")
    online = {name: rate for name, rate in rates.items() if name != "opt"}
    if not rates and one.capacity >= one.enough:
        text = "Any: at the advised capacity everything that is read again fits, and nothing has to be evicted."
    elif not rates:
        text = (
            f"LRU, not compared: no policy was simulated near {_blocks(one.capacity)} where it would have to evict. "
            f"Add {one.capacity} to --lru-caps, with --policies all, to compare there."
        )
    else:
        best = max(online, key=lambda name: (online[name], name == "lru"))
        if online[best] - online["lru"] >= WORTHWHILE:
            text = f"{best}: at {_blocks(capacity)} it hits {online[best]:.1%}, LRU {online['lru']:.1%}."
        else:
            others = f", and none of the {len(online) - 1} others hits a point more" if len(online) > 1 else ""
            text = f"LRU: at {_blocks(capacity)} it hits {online['lru']:.1%}{others}."
        if bound is not None:
            left = bound - online[best]
            text += f" Perfect foresight would hit {bound:.1%}"
            if left < WORTHWHILE:
                text += ": there is nothing left to gain."
            elif len(online) == 1:
                text += f", {100 * left:.1f} points more: --policies all shows what other policies make of it."
            else:
                text += f": {100 * left:.1f} points are the most that any eviction policy can add."
    return {
        "question": "Which eviction policy?",
        "answer": text,
        "rule": rule,
        "measured": {"capacity_blocks": capacity, **{f"{name}_hit_rate": rate for name, rate in rates.items()}},
    }


def _compared(one: _Sizing) -> tuple[int, dict[str, float]]:
    """The simulated capacity that stands for the advised one, and each policy's hit rate there; no rates without any.

    Below a step's set policies differ in what none should be asked to do, and where everything fits in nothing.
    """
    simulated = one.result["policies"]
    least, most = one.result["step_set_blocks"]["p95"], one.enough
    near = {
        key: entry["capacity_blocks"]
        for key, entry in next(iter(simulated.values()), {}).items()
        if least <= entry["capacity_blocks"] < most
        and one.capacity / NEAR <= entry["capacity_blocks"] <= one.capacity * NEAR
    }
    if not near:
        return one.capacity, {}
    key = min(near, key=lambda k: abs(near[k] - one.capacity))
    rates = {name: found[key]["hit_rate"] for name, found in simulated.items()}
    return near[key], {"lru": one.hit_rate(near[key])} | rates


def _block_size(one: _Sizing, sizings: Sequence[_Sizing | None], cold: dict[int, float]) -> dict[str, Any]:
    question = "Which block size?"
    rule = (
        f"least traffic from far at equal near memory; within {ALIKE - 1:.0%} the larger block, which moves it in "
        "fewer transfers"
    )
    others = [other for other in sizings if other is not None]
    if len(sizings) == 1:
        amplification = one.result["read_amplification"]
        measured, uniform = (amplification[name]["mean"] for name in ("measured", "uniform"))
        text = (
            f"Only {one.block_size} was analyzed; --block-sizes 16,32,64,128 compares them on the same trace. Whole "
            f"blocks of {one.block_size} move {measured:.2f} tokens for each one selected; by chance it would be "
            f"{uniform:.2f}."
        )
        return {"question": question, "answer": text, "rule": rule, "measured": {"read_amplification": measured}}
    memory = max(other.capacity * other.block_size for other in others)  # in less, some size could not hold its steps
    traffic = cold | {other.block_size: other.far_tokens(memory // other.block_size) for other in others}
    least = min(traffic.values())
    choice = max(size for size, moved in traffic.items() if moved <= least * ALIKE)
    shown = ", ".join(
        f"{size}: {one.size(moved)} in {moved / size:,.1f} blocks" for size, moved in sorted(traffic.items())
    )
    alike = "" if traffic[choice] == least else f", within {ALIKE - 1:.0%} of the least and in fewer transfers"
    text = (
        f"{choice} tokens{alike}. With the most near memory that any of these sizes calls for ({one.size(memory)} a "
        f"cache, {_blocks(memory // choice)} of {choice}), a step of a cache brings from far, by block size: {shown}."
    )
    return {
        "question": question,
        "answer": text,
        "rule": rule,
        "measured": {
            "near_tokens": memory,
            **{f"far_tokens_per_step_{size}": moved for size, moved in sorted(traffic.items())},
        },
    }


def _error(one: _Sizing) -> dict[str, Any]:
    half, double = max(1, one.capacity // 2), 2 * one.capacity
    moved = {name: one.far_tokens(c) for name, c in (("half", half), ("chosen", one.capacity), ("double", double))}
    text = (
        f"With half the blocks ({half:,}) LRU hits {one.hit_rate(half):.1%} and a step brings "
        f"{one.size(moved['half'])} from far instead of {one.size(moved['chosen'])}. "
        if half < one.capacity
        else ""
    )
    text += (
        f"With twice as many blocks ({double:,}) LRU hits {one.hit_rate(double):.1%}, and a step brings "
        f"{one.size(moved['double'])} from far."
    )
    stalled = one.lru.steps_above(half)
    if stalled > 0:
        text += f" {stalled:.1%} of steps need more than half at once: whatever the policy, they wait for far memory."
    return {
        "question": "What would it cost to be wrong?",
        "answer": text,
        "rule": "hits and traffic at half and at twice the capacity, from the same curve",
        "measured": {
            "half_hit_rate": one.hit_rate(half),
            "double_hit_rate": one.hit_rate(double),
            **{f"far_tokens_per_step_{name}": tokens for name, tokens in moved.items()},
        },
    }


def _blocks(count: int) -> str:
    """``1 block``, ``2 blocks``."""
    return f"{count:,} block{'' if count == 1 else 's'}"
