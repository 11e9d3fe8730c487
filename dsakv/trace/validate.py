"""Check a trace against its schema, every derived field computed once more in plain Python.

Nothing of the writer's arithmetic is used here: what the two agree on is right, or wrong twice in different ways.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from dsakv.errors import InputError
from dsakv.trace import schema
from dsakv.trace.files import read_lines
from dsakv.trace.formats import read_records, shard_paths
from dsakv.trace.serving import serving
from dsakv.trace.validate_tiers import TierChecks, check_kv_blocks


@dataclass(slots=True)
class Report:
    """What was checked, and found to be right."""

    trace_dir: Path
    files: int = 0
    requests: int = 0
    """Finished ones."""
    records: int = 0
    without_positions: int = 0
    """Records of which only the schema could be checked."""
    checks: Counter[str] = field(default_factory=Counter)
    """How often each thing was checked."""


def validate(trace_dir: Path) -> Report:
    """Check all files of a trace written by :class:`~dsakv.trace.writer.TraceWriter`.

    A run that was cut off is in order: requests without a line in ``requests.jsonl`` and a missing ``summary.json``.

    Raises:
        InputError: the first thing that is not in order, with its place.
    """
    try:
        return _Validator(trace_dir).run()
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}", "name the block folder of a run") from None


class _Validator:
    def __init__(self, trace_dir: Path) -> None:
        self.report = Report(trace_dir)
        meta = trace_dir / "run_meta.json"
        self.meta = schema.parse(str(meta), meta.read_bytes(), schema.META, schema.META_OPTIONAL)
        self.options: dict[str, Any] = self.meta["trace"]
        self.block_size: int = self.meta["block_size_tokens"]
        self.requests: dict[int, dict[str, Any]] = {}
        self.tiers = TierChecks(self._check, self.block_size, self.options["store_block_ids"])
        self.layers: list[int] | None = None
        self.totals: dict[str, Counter[Any]] = defaultdict(Counter)
        self.hot: dict[int, Counter[int]] = {}

    def run(self) -> Report:
        trace_dir = self.report.trace_dir
        log = trace_dir.parent / "requests.jsonl"
        for place, line in read_lines(log):
            entry = schema.parse(place, line, schema.REQUEST, schema.REQUEST_OPTIONAL)
            self._check("requests", entry["request_id"] not in self.requests, place, "the request is listed twice")
            hit = entry["prefix_cached_blocks"] > 0
            self._check("requests", entry["prefix_cache_hit"] is hit, place, "prefix_cache_hit")
            self._owners(place, entry)
            check_kv_blocks(self._check, place, entry, self.block_size)
            self.requests[entry["request_id"]] = entry
        for shard in shard_paths(trace_dir):
            self._shard(shard)
        for request_id, entry in self.requests.items():
            if request_id not in self.hot:
                place = f"{log}, request {request_id}"
                self._check("complete", entry["records"] == 0, place, "its records are missing")
        self.report.requests = len(self.requests)
        summary = trace_dir / "summary.json"
        if summary.exists() and not self.report.without_positions:
            found = schema.parse(str(summary), summary.read_bytes(), schema.SUMMARY, schema.SUMMARY_OPTIONAL)
            self._summary(str(summary), found)
            self.tiers.summary(str(summary), found.get("kv_tiers"))
            if "serving" in found:
                served = serving(log)
                self._check("summary", found["serving"] == served, str(summary), f"serving is not {served}")
        return self.report

    def _owners(self, place: str, entry: dict[str, Any]) -> None:
        """Earlier requests and tokens ascend up to the cached blocks; traces of older versions do not name them."""
        owners = entry.get("prefix_owners")
        if owners is None:
            return
        right = all(type(pair) is list and len(pair) == 2 and _integers(pair) for pair in owners)
        self._check("requests", right, place, "prefix_owners does not hold pairs of integers")
        tokens = entry["prefix_cached_blocks"] * self.block_size
        around = [[-1, 0], *owners, [entry["request_id"], tokens + 1]]
        right = all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(around)) and around[-2][1] == tokens
        self._check("requests", right, place, "prefix_owners")

    def _shard(self, shard: Path) -> None:
        start, stop = map(int, shard.stem.split("_")[2:])
        steps: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        fields = schema.record(self.options)
        for place, record in read_records(shard):
            schema.check(place, record, fields)
            request_id = record["request_id"]
            self._check("shard", start <= request_id < stop, place, f"request {request_id} is not of this shard")
            steps[request_id].append((record["step_idx"], record["layer_id"], record["engine_step"]))
            self._record(place, record)
            self.report.records += 1
        for request_id, seen in steps.items():
            self._order(f"{shard}, request {request_id}", seen, self.requests.get(request_id))
        self.report.files += 1

    def _order(self, place: str, seen: list[tuple[int, int, int]], entry: dict[str, Any] | None) -> None:
        """Every step holds every layer once, and a finished request every step."""
        pairs = [(step, layer) for step, layer, _ in seen]
        self._check("order", all(a < b for a, b in pairwise(pairs)), place, "records not in (step, layer) order")
        engine = [step for _, _, step in seen]
        self._check("order", engine == sorted(engine), place, "engine_step goes backwards")
        layers = sorted({layer for _, layer in pairs})
        self.layers = self.layers or layers
        self._check("layers", layers == self.layers, place, f"holds layers {layers}, other requests {self.layers}")
        steps = sorted({step for step, _ in pairs})
        whole = entry is not None
        self._check("layers", not whole or len(pairs) == len(steps) * len(layers), place, "a step lacks a layer")
        if entry is not None:
            self._check("complete", len(pairs) == entry["records"], place, "requests.jsonl counts other records")
            decode = [step for step in steps if step >= 0]
            expected = list(range(entry["decode_steps"]))
            if self.options["sample_rate"] < 1:
                self._check("complete", set(decode) <= set(expected), place, "has a step that was not run")
            else:
                self._check("complete", decode == expected, place, "a decode step is missing")

    def _record(self, place: str, record: dict[str, Any]) -> None:
        seq_len, count = record["seq_len_current"], record["unique_token_pos_count"]
        prefix, tokens = record["prefix"], record["tokens_per_touched_block"]
        cached = prefix["prefix_cached_blocks"]

        def equal(name: str, found: Any, expected: Any) -> None:
            self._check(name, found == expected, place, f"{name} is {found}, not {expected}")

        schema.check(place, tokens, schema.TOKENS)
        schema.check(place, prefix, schema.PREFIX)
        self.tiers.record(place, record)
        equal("event", record["event"], "dsa_topk")
        equal("block_size_tokens", record["block_size_tokens"], self.block_size)
        equal("prefix_cache_hit", prefix["prefix_cache_hit"], cached > 0)
        self._check("layers", 0 <= record["index_layer_id"] <= record["layer_id"], place, "index_layer_id")
        self._check("step_wall_us", record["step_wall_us"] >= 0, place, "step_wall_us is negative")
        entry = self.requests.get(record["request_id"])
        if entry is not None:
            equal("seq_len_current", seq_len, entry["prompt_tokens"] + record["step_idx"] + 1)
            equal("prefix_key", prefix["prefix_key"], entry["prefix_key"])
            equal("prefix_cached_blocks", cached, entry["prefix_cached_blocks"])
            limit = (entry["prompt_tokens"] - 1) // self.block_size
            self._check("prefix_cached_blocks", 0 <= cached <= limit, place, f"prefix_cached_blocks exceeds {limit}")
        self._scores(place, record, count)

        hot = self.hot.setdefault(record["request_id"], Counter())
        if "selected_token_pos" not in record:
            self.report.without_positions += 1
            return
        positions = record["selected_token_pos"]
        self._check("positions", _integers(positions) and len(positions) > 0, place, "positions are not integers")
        ascending = all(a < b for a, b in pairwise(positions))
        self._check("positions", ascending, place, "positions are not ascending and unique")
        self._check("positions", positions[0] >= 0 and positions[-1] < seq_len, place, "a position is out of range")
        offsets = sorted(seq_len - 1 - p for p in positions)
        per_block = Counter(p // self.block_size for p in positions)
        sizes = sorted(per_block.values())
        shared = [b for b in per_block if b < cached]
        equal("unique_token_pos_count", count, len(positions))
        equal("offset_min", record["offset_min"], offsets[0])
        equal("offset_p50", record["offset_p50"], _nearest_rank(offsets, 0.5))
        equal("offset_max", record["offset_max"], offsets[-1])
        equal("unique_blocks", record["unique_blocks"], len(per_block))
        touched = _binned(len(per_block), math.ceil(Fraction(seq_len, self.block_size)))
        equal("touched_block_ratio", record["touched_block_ratio"], touched)
        equal("tokens_per_touched_block.mean", tokens["mean"], len(positions) / len(per_block))
        equal("tokens_per_touched_block.p50", tokens["p50"], _nearest_rank(sizes, 0.5))
        equal("tokens_per_touched_block.p95", tokens["p95"], _nearest_rank(sizes, 0.95))
        equal("intersection_blocks", prefix["intersection_blocks"], len(shared))
        equal("intersection_ratio", prefix["intersection_ratio"], _binned(len(shared), len(per_block)))
        if self.options["store_block_ids"]:
            equal("selected_block_ids", record["selected_block_ids"], sorted(per_block))
        self.tiers.rows(place, record, per_block)
        self.totals["unique_blocks"][len(per_block)] += 1
        self.totals["tokens_per_touched_block"].update(sizes)
        self.totals["offsets"].update(offsets)
        self.totals["touched_block_ratio"][touched] += 1
        self.totals["prefix_intersection_ratio"][prefix["intersection_ratio"]] += 1
        hot.update(shared)

    def _scores(self, place: str, record: dict[str, Any], count: int) -> None:
        if self.options["store_scores"]:
            scores = record["scores_topk"]
            right = len(scores) == count and all(type(s) is float for s in scores)
            self._check("scores", right, place, "scores_topk does not hold a number for each position")
        else:
            stats = record["scores_stats"]
            schema.check(place, stats, schema.SCORES)
            slack = 1e-6 * max(abs(stats["min"]), abs(stats["max"]))  # the mean is rounded to float32
            right = stats["min"] - slack <= stats["mean"] <= stats["max"] + slack
            self._check("scores", right, place, "scores_stats: the mean is not between min and max")

    def _summary(self, place: str, summary: dict[str, Any]) -> None:
        for name in schema.DISTRIBUTIONS:
            found, expected = summary[name], _distribution(self.totals[name])
            right = found.keys() == expected.keys() and all(_close(found[key], expected[key]) for key in expected)
            self._check("summary", right, place, f"{name} is {found}, not {expected}")
        hot = {
            str(request_id): [
                {"block_id": block, "touches": n} for block, n in sorted(c.items(), key=lambda x: (-x[1], x[0]))[:20]
            ]
            for request_id, c in self.hot.items()
        }
        self._check("summary", summary["prefix_hot_blocks"] == hot, place, f"prefix_hot_blocks is not {hot}")
        self._check("summary", summary["inputs"] == self.meta["inputs"], place, "inputs differ from run_meta.json")

    def _check(self, name: str, right: bool, place: str, wrong: str) -> None:
        if not right:
            raise InputError(f"{place}: {wrong}", schema.HINT)
        self.report.checks[name] += 1


def _integers(values: Iterable[Any]) -> bool:
    return all(type(value) is int for value in values)


def _nearest_rank(ordered: list[int], q: float) -> int:
    return ordered[round((len(ordered) - 1) * q)]


def _binned(part: int, whole: int) -> float:
    return round(Fraction(part * 1_000_000, whole)) / 1_000_000


def _distribution(counter: Counter[Any]) -> dict[str, Any]:
    n = sum(counter.values())
    if n == 0:
        return {"count": 0, "min": None, "p50": None, "p95": None, "max": None, "mean": None}
    wanted = {"min": 0, "p50": round((n - 1) * 0.5), "p95": round((n - 1) * 0.95), "max": n - 1}
    figures: dict[str, Any] = {"count": n}
    for name, rank in wanted.items():
        upto = 0
        for value in sorted(counter):
            upto += counter[value]
            if upto > rank:
                figures[name] = value
                break
    figures["mean"] = math.fsum(value * times for value, times in counter.items()) / n
    return figures


def _close(found: Any, expected: Any) -> bool:
    if found is None or expected is None:
        return found is expected
    return isinstance(found, (int, float)) and math.isclose(found, expected, rel_tol=1e-12)
