"""The decision in plain words: how much near memory, which policy, which block size, and what an error would cost."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

REUSE_SHARE = 0.95
"""Of all accesses that any capacity can hit, the share that near memory should."""
WORTHWHILE = 0.01
"""Hit rate that another policy must gain to be worth its trouble."""
ALIKE = 1.05
"""Traffic within this factor counts as the same."""
NOT_WORTH_IT = 0.75
"""Share of the blocks of a cache from which on there is no small near tier."""

Result = dict[str, Any]


def decide(results: Sequence[Result]) -> list[list[dict[str, Any]]]:
    """Answers for each of the results of one trace, which differ in block size.

    Each is ``{question, answer, rule, measured}``. They stand on the LRU curve that counts step by step: a step needs
    its whole set at once.
    """
    sizings = [_Sizing.of(result) for result in results]
    return [
        [] if one is None else [_memory(one), _policy(one), _block_size(one, sizings), _error(one)] for one in sizings
    ]


@dataclass(frozen=True, slots=True)
class _Sizing:
    """One result with the capacity that it calls for."""

    result: Result
    capacity: int
    """Blocks of one cache."""

    @classmethod
    def of(cls, result: Result) -> _Sizing | None:
        """None where nothing was read twice."""
        curve = result["lru_curve"]
        hits = curve["step"]["hits"]
        if not hits:
            return None
        needed = next(
            capacity
            for capacity, reached in zip(curve["step"]["capacity_blocks"], hits, strict=True)
            if reached >= REUSE_SHARE * hits[-1]
        )
        return cls(result, max(needed, result["step_set_blocks"]["p95"]))

    @property
    def block_size(self) -> int:
        return int(self.result["block_size_tokens"])

    @property
    def footprint(self) -> float:
        """Mean of the blocks that a cache sees."""
        return float(self.result["lru_curve"]["blocks_per_cache"])

    @property
    def block_bytes(self) -> float | None:
        """Bytes of a block in one layer; None where the trace does not tell, or a block stands for several layers."""
        if self.result["step_union"] or self.result["key_mode"] == "request":
            return None
        model = (self.result["run_meta"] or {}).get("model")
        row = model.get("kv_bytes_per_token_layer") if isinstance(model, dict) else None
        return self.block_size * row if isinstance(row, (int, float)) and row > 0 else None

    @property
    def steps(self) -> int:
        return int(self.result["step_set_blocks"]["count"])

    def hits(self, capacity: float) -> int:
        curve = self.result["lru_curve"]["step"]
        at = bisect_right(curve["capacity_blocks"], capacity)
        return int(curve["hits"][at - 1]) if at else 0

    def hit_rate(self, capacity: float) -> float:
        return self.hits(capacity) / int(self.result["lru_curve"]["accesses"])

    def far_tokens(self, capacity: float) -> float:
        """Tokens that a step of a cache brings from far, in whole blocks."""
        return (int(self.result["lru_curve"]["accesses"]) - self.hits(capacity)) * self.block_size / self.steps

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
            merged = self.result["step_union"] or self.result["key_mode"] == "request"
            return "each running request" if merged else "each layer of each running request"
        return {"layer": "each layer", "request": "each running request", "run": "the whole run"}[
            self.result["cache_scope"]
        ]


def _memory(one: _Sizing) -> dict[str, Any]:
    share = one.capacity / one.footprint
    rate, best = one.hit_rate(one.capacity), one.hit_rate(one.capacity + one.footprint * 1e9)
    size = one.size(one.capacity * one.block_size)
    layers = len(one.result["layers"])
    if one.result["cache_scope"] == "stream" and layers > 1:
        size += f", {one.size(layers * one.capacity * one.block_size)} for a request's {layers} layers"
    text = (
        f"{one.capacity:,} blocks of {one.block_size} tokens for {one.owner} ({size}). LRU then hits {rate:.1%} of "
        f"block reads; with unlimited memory it would hit {best:.1%}, since first reads always miss."
    )
    if share >= NOT_WORTH_IT:
        text += (
            f" That is {share:.0%} of the {one.footprint:,.0f} blocks that a cache sees: this workload has no small "
            "near tier at this block size, plan to keep the context near."
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
            "blocks_per_cache": one.footprint,
            "bytes": None if one.block_bytes is None else one.capacity * one.block_bytes,
        },
    }


def _policy(one: _Sizing) -> dict[str, Any]:
    simulated = one.result["policies"]
    rule = (
        f"LRU, unless another policy gains {WORTHWHILE:.0%} of hits over it at the simulated capacity nearest to the "
        "one above; opt knows the future and bounds them all"
    )
    question = "Which eviction policy?"
    if "lru" not in simulated or not simulated["lru"]:
        answer = "LRU, for want of a comparison: no policy was simulated. --policies all compares them."
        return {"question": question, "answer": answer, "rule": rule, "measured": {}}
    key = min(simulated["lru"], key=lambda k: abs(simulated["lru"][k]["capacity_blocks"] - one.capacity))
    capacity = simulated["lru"][key]["capacity_blocks"]
    rates = {name: entries[key]["hit_rate"] for name, entries in simulated.items()}
    bound = rates.get("opt")
    online = {name: rate for name, rate in rates.items() if name != "opt"}
    best = max(online, key=lambda name: (online[name], name == "lru"))
    gain = online[best] - online["lru"]
    if gain >= WORTHWHILE:
        text = f"{best}: at {capacity:,} blocks it hits {online[best]:.1%}, LRU {online['lru']:.1%}."
    else:
        text = f"LRU: at {capacity:,} blocks it hits {online['lru']:.1%}" + (
            f", and none of the {len(online) - 1} others gains {WORTHWHILE:.0%}." if len(online) > 1 else "."
        )
    if bound is not None:
        left = bound - online[best]
        text += f" Perfect foresight would hit {bound:.1%}"
        if left < WORTHWHILE:
            text += ": there is nothing left to gain."
        elif len(online) == 1:
            text += f", {left:.1%} more: --policies all shows what other policies make of it."
        else:
            text += f": no more than {left:.1%} is left to gain, by prefetching say."
    return {
        "question": question,
        "answer": text,
        "rule": rule,
        "measured": {"capacity_blocks": capacity, **{f"{name}_hit_rate": rate for name, rate in rates.items()}},
    }


def _block_size(one: _Sizing, sizings: Sequence[_Sizing | None]) -> dict[str, Any]:
    question = "Which block size?"
    rule = (
        f"least traffic from far at equal near memory; within {ALIKE - 1:.0%} the larger block, which moves it in "
        "fewer transfers"
    )
    others = [other for other in sizings if other is not None]
    if len(others) == 1:
        amplification = one.result["read_amplification"]
        measured, uniform = (amplification[name]["mean"] for name in ("measured", "uniform"))
        text = (
            f"Only {one.block_size} was analyzed; --block-sizes 16,32,64,128 compares them on the same trace. Whole "
            f"blocks of {one.block_size} move {measured:.2f} tokens for each one selected; by chance it would be "
            f"{uniform:.2f}."
        )
        return {"question": question, "answer": text, "rule": rule, "measured": {"read_amplification": measured}}
    memory = min(other.capacity * other.block_size for other in others)
    traffic = {other.block_size: other.far_tokens(memory / other.block_size) for other in others}
    least = min(traffic.values())
    choice = max(size for size, moved in traffic.items() if moved <= least * ALIKE)
    shown = ", ".join(
        f"{size}: {one.size(moved)} in {moved / size:,.1f} blocks" for size, moved in sorted(traffic.items())
    )
    text = (
        f"{choice} tokens. With the same near memory ({one.size(memory)}) a step of a cache brings from far, by block "
        f"size: {shown}."
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
        f"{one.size(moved['half'])} from far instead of {one.size(moved['chosen'])}. With twice as many ({double:,}) "
        f"it hits {one.hit_rate(double):.1%}, {one.size(moved['double'])} a step."
    )
    below = one.result["step_set_blocks"]["p95"]
    if half < below:
        text += f" Half is less than a step needs at once ({below:,} blocks in 95% of steps): it stalls on every step."
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
