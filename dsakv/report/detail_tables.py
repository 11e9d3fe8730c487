"""Tables of a result's distributions, of its layers, and of the tiers of its run."""

from __future__ import annotations

from typing import Any

from dsakv.report.compare import Result, layers
from dsakv.report.measures import layer_measures
from dsakv.report.tables import BELOW, below_note
from dsakv.report.text import TableData, figure, percent, plural, printable

_SPREAD = ("mean", "std", "min", "max")
_TIERS = {"hbm": "the device", "local_pool": "host memory", "remote_pool": "the remote pool"}


def locality(result: Result) -> TableData:
    """Distributions over the records."""
    stats = result["record_stats"]
    recent, spread_over = stats["recent_locality"], stats["block_concentration"]
    rows = [
        _spread("unique blocks", stats["unique_blocks"]),
        _spread("block span", stats["block_span"]),
        _spread("block density", stats["block_density"]),
        _spread("tokens per block", stats["tokens_per_block_mean"]),
        _spread("read amplification", result["read_amplification"]["measured"]),
        _spread("read amplification by chance", result["read_amplification"]["uniform"]),
        _spread("normalized entropy", spread_over["normalized_entropy"]),
        _spread("gini", spread_over["gini"]),
        _spread("mean block distance", recent["mean_block_distance"]),
    ]
    rows += [_spread(f"share of tokens at most {w} back", d) for w, d in recent["recent_token_ratio"].items()]
    rows += [_spread(f"share of blocks at most {w} back", d) for w, d in recent["recent_block_ratio"].items()]
    rows += [
        _spread(f"{what} {name}", result["overlap"][key][name])
        for key, what in (("steps", "with the step before:"), ("layers", "with the layer before:"))
        for name in ("jaccard", "kept")
        if result["overlap"][key][name]["count"]
    ]
    if result["needle_recall"] is not None:
        rows += [_spread(f"needle recall, {name}", d) for name, d in result["needle_recall"].items()]
    return TableData("Locality of a record", ("figure", *_SPREAD), rows)


def working_set(result: Result) -> TableData:
    rows = [_spread(window, d) for window, d in result["working_set"].items()]
    return TableData("Working set, distinct blocks", ("last records", *_SPREAD), rows, words=frozenset())


def reuse(result: Result) -> TableData:
    """Shares of reuses at distances of powers of two, and how many blocks are never read again."""
    temporal = result["temporal_locality"]
    rows = [
        ("blocks touched for the first time", figure(temporal["first_touch_blocks"])),
        ("blocks touched only once", figure(temporal["single_touch_blocks"])),
        ("reuses", figure(temporal["reuse_samples"])),
    ]
    rows += [(f"share of reuses after at most {plural(d, 'step')}", percent(share)) for d, share in reuse_marks(result)]
    points, cap = temporal["reuse_distance_cdf_steps"], temporal["reuse_cap_steps"]
    if points and points[-1]["reuse_distance_steps"] == cap:
        before = points[-2]["cdf"] if len(points) > 1 else 0.0
        rows.append((f"share of reuses after {cap} steps or more", percent(1 - before)))
    return TableData("Reuse", ("figure", "value"), rows)


def reuse_marks(result: Result) -> list[tuple[int, float]]:
    """Share of reuses within 1, 2, 4, ... steps, and within the greatest distance below the cap."""
    temporal = result["temporal_locality"]
    points = [(point["reuse_distance_steps"], point["cdf"]) for point in temporal["reuse_distance_cdf_steps"]]
    if not points:
        return []
    last = points[-1][0]
    distances = [2**i for i in range(last.bit_length()) if 2**i < last]
    if last < temporal["reuse_cap_steps"]:
        distances.append(last)
    return [(within, max((cdf for d, cdf in points if d <= within), default=0.0)) for within in distances]


def by_layer(result: Result) -> TableData:
    chosen = layer_measures(result)
    rows = [
        (layer, figure(one["records"]), *(measure.show(measure.value(one)) for measure in chosen))
        for layer, one in layers(result)
    ]
    columns = ("layer", "records", *(measure.name for measure in chosen))
    return TableData("Figures by layer", columns, rows, words=frozenset())


def hit_rate_by_layer(result: Result) -> TableData | None:
    """None where layers share caches."""
    found = layers(result)
    if not found or any(one["cache_sim"] is None for _, one in found) or not result["cache_sim"]:
        return None
    entries = sorted(result["cache_sim"].items(), key=lambda item: int(item[1]["capacity_blocks"]))
    rows = [(layer, *(percent(one["cache_sim"][key]["hit_rate"]) for key, _ in entries)) for layer, one in found]
    columns = (
        "layer",
        *(f"{entry['capacity_blocks']:,} blocks{BELOW if entry['below_step_set_p95'] else ''}" for _, entry in entries),
    )
    return TableData("LRU hit rate by layer", columns, rows, below_note(result), frozenset())


def kv_tiers(result: Result) -> TableData | None:
    """Where decode found its blocks, in the run and in the replay of its trace; None where all were on the device."""
    tiers = result.get("kv_tiers")
    if tiers is None:
        return None
    sides = [tiers[side] or {} for side in ("measured", "replayed")]
    rows = [
        (words, *(figure(side[name].get("hits", 0)) if name in side else "0" if side else "-" for side in sides))
        for name, words in _TIERS.items()
        if any(name in side for side in sides)
    ]
    notes = [_hit_rate(sides[0] or sides[1])]
    if tiers["agree"]:
        notes.append("The replay finds as many as the run did in each tier, and moves as much: others can be tried "
                     "on this trace without running them.")  # fmt: skip
    else:
        what = "Not compared" if tiers["agree"] is None else "They disagree"
        notes.append(f"{what}: {printable(tiers['reason'])}.")
    columns = ("blocks found in", "measured", "replayed")
    return TableData("KV tiers in decode", columns, rows, " ".join(note for note in notes if note))


def _hit_rate(transfers: dict[str, dict[str, Any]]) -> str:
    """The share of blocks that the device had, over all and over those that some cache could have had."""
    found, cold = (sum(tier.get(name) or 0 for tier in transfers.values()) for name in ("hits", "cold"))
    near = transfers.get("hbm", {}).get("hits") or 0
    if not found:
        return ""
    again = percent(near / (found - cold)) if found > cold else "-"
    return (
        f"Hit rate {percent(near / found)}; {again} without the {plural(int(cold), 'block')} that came to the device "
        "for the first time, which no policy has there before."
    )


def _spread(name: str, distribution: dict[str, Any]) -> tuple[str, ...]:
    return (name, *(figure(distribution[key]) for key in _SPREAD))
