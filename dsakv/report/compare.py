"""Results by run, and what is read off them to compare runs, block sizes and capacities: plain data, no layout."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePath
from typing import Any

from dsakv.report.text import printable
from dsakv.trace.open import caveat_of, has_random_weights

Result = dict[str, Any]
"""One entry of ``results``: a trace at one block size."""


@dataclass(frozen=True, slots=True)
class Run:
    """All results of one trace."""

    label: str
    """Tells it from the other runs; printable."""
    results: tuple[Result, ...]
    """By block size, ascending."""
    lead: Result
    """The one to show in detail: at the trace's own block size, or the first that was asked for."""

    @property
    def random_weights(self) -> bool:
        return has_random_weights(self.lead["run_meta"])

    @property
    def caveat(self) -> str | None:
        """What its figures are not; printable."""
        caveat = caveat_of(self.lead["run_meta"])
        return printable(caveat) if caveat else None


@dataclass(frozen=True, slots=True)
class Curve:
    """LRU hits over the capacity: constant from one of ``capacities`` to the next, none below the first."""

    capacities: list[int]
    hits: list[int]
    accesses: int
    knee: dict[str, Any] | None

    def rates(self) -> list[float]:
        """Hit rates at the capacities."""
        return [hits / self.accesses for hits in self.hits]

    def rate(self, capacity: float) -> float | None:
        """The hit rate of any capacity; None without accesses."""
        if not self.accesses:
            return None
        at = bisect_right(self.capacities, capacity)
        return self.hits[at - 1] / self.accesses if at else 0.0


@dataclass(frozen=True, slots=True)
class Capacity:
    """Hit rates of one simulated capacity; null rates without accesses."""

    blocks: int
    share: float | None
    """Of the blocks that a cache sees."""
    bytes: int | None
    hit_rate: float | None
    fits_a_step: bool
    """False below the p95 of what a step needs at once."""
    policies: dict[str, float | None]


def runs(document: dict[str, Any]) -> list[Run]:
    """The runs of ``document``, in its order."""
    grouped = [list(found) for _, found in groupby(document["results"], key=lambda result: result["trace_dir"])]
    labels = _labels([found[0] for found in grouped])
    return [
        Run(label, tuple(sorted(found, key=lambda result: int(result["block_size_tokens"]))), _lead(found))
        for label, found in zip(labels, grouped, strict=True)
    ]


def curve(result: Result, mode: str | None = None) -> Curve:
    """The curve of one LRU mode, by default the one that the result is about."""
    found, points = result["lru_curve"], result["lru_curve"][mode or result["lru_mode"]]
    return Curve(points["capacity_blocks"], points["hits"], found["accesses"], points["knee"])


def capacities(result: Result) -> list[Capacity]:
    """The simulated capacities, ascending, each with the other policies' hit rates."""
    seen = result["lru_curve"]["blocks_per_cache"]
    made = [
        Capacity(
            entry["capacity_blocks"],
            entry["capacity_blocks"] / seen if seen else None,
            bytes_of(result, entry["capacity_blocks"]),
            entry["hit_rate"],
            not entry["below_step_set_p95"],
            {name: found[key]["hit_rate"] for name, found in policies(result).items()},
        )
        for key, entry in result["cache_sim"].items()
    ]
    return sorted(made, key=lambda capacity: capacity.blocks)


def policies(result: Result) -> dict[str, Any]:
    """Simulated policies by the name to show; plain LRU is there only where the curve is not the same."""
    return {
        "lru by step" if name == "lru" else name: found
        for name, found in result["policies"].items()
        if name != "lru" or result["lru_mode"] != "step"
    }


def ceiling(result: Result) -> float | None:
    """The hit rate that no capacity exceeds: a cache's first access of a block misses."""
    found = result["lru_curve"]
    return 1 - found["first_accesses"] / found["accesses"] if found["accesses"] else None


def opt_gain(result: Result) -> float | None:
    """The most that the offline bound hits more than LRU, among capacities that hold a step's set."""
    gains = []
    for capacity in capacities(result):
        bound = capacity.policies.get("opt")
        if capacity.fits_a_step and capacity.hit_rate is not None and bound is not None:
            gains.append(bound - capacity.hit_rate)
    return max(gains, default=None)


def reuse_within(result: Result, steps: int) -> float | None:
    """Share of reuses at most ``steps`` steps after the last read; None where the cap hides it."""
    temporal = result["temporal_locality"]
    if not temporal["reuse_samples"] or temporal["reuse_cap_steps"] <= steps:
        return None
    points = temporal["reuse_distance_cdf_steps"]
    return max((point["cdf"] for point in points if point["reuse_distance_steps"] <= steps), default=0.0)


def bytes_of(result: Result, blocks: float) -> int | None:
    """Bytes of so many blocks of one layer's keys and values.

    None where the trace does not say how large a token is, or where a block stands for several layers.
    """
    model = (result["run_meta"] or {}).get("model")
    row = model.get("kv_bytes_per_token_layer") if isinstance(model, dict) else None
    if merges_layers(result) or type(row) is not int:
        return None
    return int(blocks * result["block_size_tokens"] * row)


def advised_capacity(result: Result) -> int | None:
    """Blocks that the decision calls for; None where there is no decision, or nothing to decide."""
    found = (entry["measured"].get("capacity_blocks") for entry in result.get("decision", []))
    return next((capacity for capacity in found if isinstance(capacity, int)), None)


def merges_layers(result: Result) -> bool:
    """Whether a cache takes block 5 of one layer and block 5 of another for the same."""
    one_stream = result["cache_scope"] == "stream" and result["key_mode"] == "request"
    return bool(result["step_union"] or one_stream)


def cache_scope(result: Result) -> str:
    """What shares a cache, in words."""
    scope = result["cache_scope"]
    if scope == "stream":
        return "each request" if merges_layers(result) else "each layer of each request"
    names = {"layer": "each layer, shared by all requests", "request": "each request, shared by its layers"}
    return names.get(scope, "the whole run, shared by all requests and layers")


def layers(result: Result) -> list[tuple[str, Result]]:
    """Layers with their figures, by id."""
    return sorted(result["layers"].items(), key=lambda item: int(item[0]))


def _lead(found: list[Result]) -> Result:
    own = (found[0]["run_meta"] or {}).get("block_size_tokens")
    return next((result for result in found if result["block_size_tokens"] == own), found[0])


def _labels(found: list[Result]) -> list[str]:
    """The data set's name where it tells runs apart, else the run's folder, else the whole path."""
    datasets = [str((result["run_meta"] or {}).get("dataset") or "") for result in found]
    paths = [PurePath(result["trace_dir"]) for result in found]
    folders = [path.parent.name if path.name.startswith("block") and path.parent.name else path.name for path in paths]
    labels = []
    for dataset, folder, path in zip(datasets, folders, paths, strict=True):
        if dataset and Counter(datasets)[dataset] == 1 and folder.startswith(dataset):  # else it was named on purpose
            labels.append(dataset)
        else:
            labels.append(folder if folder and Counter(folders)[folder] == 1 else str(path))
    return [printable(label) for label in labels]
