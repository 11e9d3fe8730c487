"""The figures that runs, block sizes and layers are compared by: a name, a unit, a meaning, and where it stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsakv.report.compare import Result, advised_capacity, ceiling, curve, opt_gain, reuse_within
from dsakv.report.text import percent, plural, short


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure of a result, or of one of its layers."""

    name: str
    brief: str
    """The name where there is little room."""
    meaning: str
    """One line, with the unit."""
    value: Callable[[Result], float | None]
    show: Callable[[float | None], str] = short


def mean(*path: str) -> Callable[[Result], float | None]:
    """The mean of the distribution at ``path``; None where the document has null there."""

    def value(result: Result) -> float | None:
        node: Any = result
        for name in path:
            node = node[name]
            if node is None:
                return None
        found: float | None = node["mean"]
        return found

    return value


def _needed(target: str) -> Callable[[Result], float | None]:
    def value(result: Result) -> float | None:
        found: dict[str, int | None] | None = result["capacity_for_hit_rate"]
        return None if found is None else found[target]

    return value


def _knee(result: Result) -> float | None:
    knee = curve(result).knee
    return None if knee is None else knee["capacity_blocks"]


def _over_chance(result: Result) -> float | None:
    measured, uniform = (result["read_amplification"][name]["mean"] for name in ("measured", "uniform"))
    return measured / uniform if measured is not None and uniform else None


BLOCKS = Measure(
    "blocks of a record", "blocks", "distinct blocks that one record reads, mean", mean("record_stats", "unique_blocks")
)
PER_BLOCK = Measure(
    "tokens used of a block",
    "tok/blk",
    "selected tokens in a block that is read, mean",
    mean("record_stats", "tokens_per_block_mean"),
)
AMPLIFICATION = Measure(
    "read amplification",
    "ampl.",
    "tokens in the blocks read, for each token selected, mean (1 is ideal)",
    mean("read_amplification", "measured"),
)
CHANCE = Measure(
    "amplification by chance",
    "chance",
    "the same, were as many tokens drawn at random",
    mean("read_amplification", "uniform"),
)
OVER_CHANCE = Measure(
    "amplification against chance",
    "ampl/chance",
    "read amplification over that of random tokens: the lower, the more the selection clusters in blocks",
    _over_chance,
    percent,
)
JACCARD = Measure(
    "step Jaccard",
    "Jaccard",
    "blocks that consecutive records of a stream share, over those that either reads, mean",
    mean("temporal_locality", "step_jaccard"),
)
KEPT = Measure(
    "kept from the step before",
    "kept",
    "share of a record's blocks that the stream's next record reads again, mean",
    mean("overlap", "steps", "kept"),
    percent,
)
BETWEEN_LAYERS = Measure(
    "kept from the layer before",
    "from layer",
    "share of the blocks of the layer before, in the same step, that this one reads too, mean",
    mean("overlap", "layers", "kept"),
    percent,
)
GINI = Measure(
    "gini",
    "gini",
    "how unevenly the selected tokens spread over the blocks read: 0 evenly, 1 all in one block",
    mean("record_stats", "block_concentration", "gini"),
)
ENTROPY = Measure(
    "normalized entropy",
    "entropy",
    "Shannon entropy of the selected tokens over the blocks read, over that of an even spread: 1 even, 0 one block",
    mean("record_stats", "block_concentration", "normalized_entropy"),
)
DISTANCE = Measure(
    "mean block distance",
    "distance",
    "how far the blocks read lie behind the newest one, in blocks, mean",
    mean("record_stats", "recent_locality", "mean_block_distance"),
)
SEEN = Measure(
    "blocks a cache sees",
    "seen",
    "distinct blocks that one cache reads in all, mean over the caches: what a cache of 100% would hold",
    lambda result: result["lru_curve"]["blocks_per_cache"],
)
NEED_90 = Measure(
    "blocks for 90% hits", "for 90%", "the smallest LRU cache, in blocks, that hits 90% of the accesses", _needed("0.9")
)
NEED_95 = Measure(
    "blocks for 95% hits",
    "for 95%",
    "the smallest LRU cache, in blocks, that hits 95% of the accesses",
    _needed("0.95"),
)
KNEE = Measure(
    "knee",
    "knee",
    "the capacity in blocks from which on more memory pays least (furthest above the straight line, Kneedle 2011)",
    _knee,
)
STEP_SET = Measure(
    "a step's set, p95",
    "set p95",
    "blocks that a cache must hold at once for 95% of its steps; a smaller one cannot hold what attention reads",
    lambda result: result["step_set_blocks"]["p95"],
)
CEILING = Measure(
    "hit rate at most",
    "at most",
    "what no capacity exceeds: a cache's first access of a block always misses",
    ceiling,
    percent,
)
REUSE_10 = Measure(
    "reuse within 10 steps",
    "reuse<=10",
    "share of repeated reads of a block that come at most 10 steps after the last one",
    lambda result: reuse_within(result, 10),
    percent,
)
OPT_GAIN = Measure(
    "OPT over LRU",
    "OPT gain",
    "the most, in hit rate, that the offline bound (Belady) is above LRU at a capacity that holds a step's set",
    opt_gain,
    percent,
)
ADVISED = Measure(
    "near blocks advised",
    "advised",
    "what the decision calls for: the least LRU capacity in blocks that reaches most of what any can hit, and holds a "
    "step's set",
    advised_capacity,
)
ADVISED_RATE = Measure(
    "LRU hits there",
    "hits",
    "hit rate of LRU at the capacity advised, a step's set at once",
    lambda result: curve(result, "step").rate(capacity) if (capacity := advised_capacity(result)) else None,
    percent,
)
NEEDLE_TOKENS = Measure(
    "needle tokens selected",
    "needle tok",
    "share of the tokens of the needles that a record selects, mean",
    mean("needle_recall", "tokens"),
    percent,
)
NEEDLES = Measure(
    "needles found",
    "needles",
    "share of the needles of which a record selects at least one token, mean",
    mean("needle_recall", "needles"),
    percent,
)

RUNS = (
    ADVISED,
    ADVISED_RATE,
    BLOCKS,
    STEP_SET,
    SEEN,
    NEED_90,
    NEED_95,
    KNEE,
    CEILING,
    JACCARD,
    REUSE_10,
    OVER_CHANCE,
    GINI,
    OPT_GAIN,
)
"""What runs are compared by, the most telling ones first."""


def run_measures(results: list[Result]) -> tuple[Measure, ...]:
    """``RUNS``, less what none of ``results`` has, and the needles where one has them."""
    chosen = (*RUNS, NEEDLES) if any(result["needle_recall"] for result in results) else RUNS
    return tuple(measure for measure in chosen if any(measure.value(result) is not None for result in results))


def layer_measures(result: Result) -> tuple[Measure, ...]:
    """What layers are compared by: what at least one of them has."""
    recent = result["record_stats"]["recent_locality"]["recent_block_ratio"]
    windows = tuple(
        Measure(
            f"blocks at most {window} back",
            f"<={window} back",
            f"share of a record's blocks that lie at most {plural(int(window), 'block')} behind the newest, mean",
            mean("record_stats", "recent_locality", "recent_block_ratio", window),
            percent,
        )
        for window in recent
    )
    chosen = (JACCARD, KEPT, BETWEEN_LAYERS, BLOCKS, PER_BLOCK, OVER_CHANCE, GINI, ENTROPY, DISTANCE, *windows)
    chosen = (*chosen, NEED_90, NEED_95, NEEDLES, NEEDLE_TOKENS)
    figures = list(result["layers"].values())
    return tuple(measure for measure in chosen if any(measure.value(one) is not None for one in figures))


GENERAL = (
    ("record", "what one layer selects for one request in one decode step; with merged layers, what all of them do"),
    ("stream", "the records whose history counts together: of one layer of one request, or of one request"),
    (
        "LRU, a step's set at once",
        "hits are what the cache held when the step began; then the step's blocks are newest",
    ),
    ("LRU, one access after the other", "classical LRU in ascending block order; below a step's set it thrashes"),
    ("OPT", "evicts what is read again last (Belady): knows the future, no policy hits more"),
    ("share", "a capacity over the blocks that one cache reads in all; more than 100% only leaves room unused"),
    ("memory", "of one layer's keys and values, as the trace tells its bytes for a token"),
    ("working set", "distinct blocks in the last so many records of a stream, counted at every record"),
    ("reuse distance", "steps since the block was last read by its stream; first reads do not count"),
    ("block span, density", "blocks from the lowest read to the highest; those read over the span"),
    ("single touch", "blocks that their stream reads once and never again"),
)
"""Name and meaning of what is no single figure."""


def definitions(results: list[Result]) -> list[tuple[str, str]]:
    """Name and meaning of every figure that a report of ``results`` may show."""
    found = dict.fromkeys((BLOCKS, PER_BLOCK, AMPLIFICATION, CHANCE, *run_measures(results)))
    for result in results:
        found.update(dict.fromkeys(layer_measures(result)))
    return [*GENERAL, *{measure.name: measure.meaning for measure in found}.items()]
