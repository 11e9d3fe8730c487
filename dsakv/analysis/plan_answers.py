"""What a plan says in plain words: how much hot capacity, rows or pages, and from which concurrency it pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsakv.analysis.plan_concurrency import concurrency
from dsakv.analysis.plan_facts import RunFacts, StepTime

NEAR = 1.5
"""Block sizes whose least capacity is within this factor of the answer's are compared with it."""
ALIKE = 1.05
"""Added times, and memory, within this factor count as the same."""
NAMES: Mapping[str, str] = {"local_pool": "host memory", "remote_pool": "the remote pool"}
Row = dict[str, Any]


def answers(plan: Mapping[str, Any], run: RunFacts, base: StepTime, hbm: float) -> list[dict[str, Any]]:
    """Answers for each tier that blocks may live in: ``{question, answer, rule, measured}``."""
    found = []
    for tier in plan["sizes"][0]["rows"][0]["tiers"]:
        choice = Choice.of(plan["sizes"], tier, plan["budget_percent"])
        found.append(_capacity(choice, plan["budget_percent"], base))
        found.append(_block_size(choice))
        found.append(concurrency(tier, NAMES[tier], choice.candidates(), run, base, hbm))
    return found


@dataclass(frozen=True, slots=True)
class Choice:
    """What fits the budget where blocks live in one tier."""

    tier: str
    sizes: Sequence[dict[str, Any]]
    within: Mapping[int, Row | None]
    """By block size: the row with the least hot memory within the budget."""
    best: Row | None
    """Of these, the one with the least hot memory, or of those that have as little the one that adds least."""

    @classmethod
    def of(cls, sizes: Sequence[dict[str, Any]], tier: str, budget: float) -> Choice:
        within = {}
        for size in sizes:
            rows = [_flat(size, row, tier) for row in size["rows"]]
            fitting = [row for row in rows if row["added_percent"] <= budget]
            within[size["block_size_tokens"]] = min(
                fitting, key=lambda row: (row["hot_bytes"], row["added_ms"]), default=None
            )
        found = [row for row in within.values() if row is not None]
        least = min((row["hot_bytes"] for row in found), default=0)
        alike = [row for row in found if row["hot_bytes"] <= least * ALIKE]
        return cls(tier, sizes, within, min(alike, key=lambda row: row["added_ms"], default=None))

    @property
    def memory(self) -> float:
        """Hot bytes at which block sizes are compared: those of the answer, or else of the middle capacity of the
        smallest blocks; somewhat more where other sizes begin there."""
        amounts = sorted(row["hot_bytes"] for row in self.sizes[0]["rows"])
        wanted = self.best["hot_bytes"] if self.best is not None else amounts[len(amounts) // 2]
        least = [min(row["hot_bytes"] for row in size["rows"]) for size in self.sizes]
        return float(max(wanted, *(amount for amount in least if amount <= wanted * NEAR)))

    def at_memory(self) -> dict[int, Row]:
        """By block size: the least added time with at most so much hot memory; sizes with no such row are missing."""
        found = {}
        for size in self.sizes:
            rows = [_flat(size, row, self.tier) for row in size["rows"] if row["hot_bytes"] <= self.memory * ALIKE]
            if rows:
                found[size["block_size_tokens"]] = min(rows, key=lambda row: row["added_ms"])
        return found

    def block_size(self) -> int | None:
        """The largest of the block sizes that are alike in added time at equal memory."""
        found = self.at_memory()
        least = min((row["added_ms"] for row in found.values()), default=0.0)
        return max((size for size, row in found.items() if row["added_ms"] <= least * ALIKE), default=None)

    def candidates(self) -> list[Row]:
        """Every row at that block size."""
        chosen = self.block_size()
        return [
            _flat(size, row, self.tier)
            for size in self.sizes
            if size["block_size_tokens"] == chosen
            for row in size["rows"]
        ]


def _flat(size: Mapping[str, Any], row: Row, tier: str) -> Row:
    return {
        **{name: value for name, value in row.items() if name != "tiers"},
        **row["tiers"][tier],
        "block_size_tokens": size["block_size_tokens"],
        "block_bytes": size["block_bytes"],
    }


def _capacity(choice: Choice, budget: float, base: StepTime) -> dict[str, Any]:
    where = NAMES[choice.tier]
    lines = []
    for size, row in choice.within.items():
        if row is None:
            least = min(
                (_flat(one, r, choice.tier) for one in choice.sizes if one["block_size_tokens"] == size
                 for r in one["rows"]), key=lambda r: r["added_percent"],
            )  # fmt: skip
            lines.append(f"Blocks of {size}: none of those simulated, since even {_hot(least)} adds {_percent(least)}.")
        elif row is not choice.best:
            lines.append(f"Blocks of {size}: {_hot(row)} with {row['policy']} adds {_percent(row)}.")
    if choice.best is None:
        text = f"None that was simulated keeps the added TPOT under {budget:g}% with KV in {where}."
    else:
        row = choice.best
        text = (
            f"{_hot(row)} in blocks of {row['block_size_tokens']} under {row['policy']}, with the rest in {where}. "
            f"A decode step then waits {row['added_ms']:.3g} ms on average ({_percent(row)} of {base.mean_ms:.3g} ms, "
            f"p95 {row['added_p95_ms']:.3g} ms); no less than {row['added_if_hidden_ms']:.3g} ms if compute could hide "
            f"all that it has time for. Decode then finds {row['hit_rate'] or 0:.1%} of its blocks hot."
        )
        least_hot = min(one["hot_bytes"] for size in choice.sizes for one in size["rows"]
                        if size["block_size_tokens"] == row["block_size_tokens"])  # fmt: skip
        if row["hot_bytes"] == least_hot:
            text += " No smaller capacity was simulated: --plan-hot names others."
    return {
        "question": f"How much hot capacity keeps the added TPOT under {budget:g}%, with KV in {where}?",
        "answer": " ".join([text, *lines]),
        "rule": "of the simulated capacities the one with the fewest bytes whose mean added TPOT is at most "
        f"{budget:g}% of the TPOT without offloading, of block sizes within {ALIKE - 1:.0%} of that the one that adds "
        "least; reads and writes of a step one after the other, nothing hidden",
        "measured": {
            "base_tpot_ms": base.mean_ms,
            **{
                f"{name}_at_{size}": None if row is None else row[key]
                for size, row in choice.within.items()
                for name, key in (("hot_share", "hot_share"), ("hot_bytes", "hot_bytes"), ("added_ms", "added_ms"))
            },
        },
    }


def _block_size(choice: Choice) -> dict[str, Any]:
    found, chosen = choice.at_memory(), choice.block_size()
    where = NAMES[choice.tier]
    if chosen is None or len(found) == 1:
        only = next(iter(found), choice.sizes[0]["block_size_tokens"])
        more = "--block-sizes 1,16,64" if len(choice.sizes) == 1 else "--plan-hot with other capacities"
        text = f"Only blocks of {only} can be compared at {_size(choice.memory)}: {more} asks for more."
    else:
        kind = "Token rows" if chosen == 1 else f"Pages of {chosen} tokens"
        shown = ", ".join(
            f"{size}: {row['added_ms']:.3g} ms ({row['misses_per_step']:,.0f} blocks, {_size(row['bytes_per_step'])})"
            for size, row in sorted(found.items())
        )
        text = f"{kind}. With {_size(choice.memory)} hot, a decode step waits for {where}, by block size: {shown}."
        rows = {size["block_size_tokens"]: size["read_amplification"] for size in choice.sizes}
        used = ", ".join(f"{size}: {rows[size]:.2f}" for size in sorted(found) if rows[size] is not None)
        text += f" Tokens in the blocks that attention reads, for each that it selects: {used}."
    return {
        "question": f"Token rows or pages, with KV in {where}?",
        "answer": text,
        "rule": f"least mean added time at equal hot bytes; within {ALIKE - 1:.0%} the larger block. Smaller blocks "
        "move fewer bytes that nobody reads, larger ones pay what each block costs less often",
        "measured": {
            "hot_bytes": choice.memory,
            **{f"added_ms_at_{size}": row["added_ms"] for size, row in sorted(found.items())},
        },
    }


def _hot(row: Row) -> str:
    return f"{row['hot_share']:.0%} hot ({row['hot_blocks']:,} blocks a layer, {_size(row['hot_bytes'])})"


def _percent(row: Row) -> str:
    return f"{row['added_percent']:.3g}%"


def _size(amount: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.3g} {unit}"
