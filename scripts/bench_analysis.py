"""How fast ``dsakv analyze`` is: records and megabytes a second, beside a plain implementation, from one run.

A synthetic trace (see ``synthetic_trace.py``: 2048 of 64K positions) is written as JSONL and as Parquet. Analyzed are
three block sizes in one pass with every figure of record locality, reuse, working sets and the full LRU curves; then
what OPT and the other policies add; then one worker against two on a longer trace; then memory at 1,000 live streams
for a short and a long trace. The plain implementation parses with ``json`` and counts with the standard library, one
block size and four LRU capacities, on the first records of the same trace.

    python scripts/bench_analysis.py --records 20480 --long-records 204800
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import msgspec

from dsakv.analysis.run import analyze_trace
from dsakv.config import AnalyzeConfig
from dsakv.trace.open import find_traces

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripts.synthetic_trace import draw, write_jsonl

TOKENS, TOPK = 65536, 2048
BLOCK_SIZES = (16, 32, 64)
REQUESTS, LAYERS, STEPS = 4, 16, 80
"""Of a shard."""
SHARD = REQUESTS * LAYERS * STEPS
CONFIG = AnalyzeConfig(block_sizes=BLOCK_SIZES, policies=("none",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=4 * SHARD, help=f"of the first trace, in shards of {SHARD}")
    parser.add_argument("--long-records", type=int, default=40 * SHARD, help="for one worker against two")
    parser.add_argument("--plain-records", type=int, default=600, help="for the plain implementation")
    options: Any = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options)


def measure(folder: Path, options: Any) -> None:
    from dsakv.trace.convert import to_parquet  # workers import this file, and need none of that

    drawn = draw(REQUESTS * LAYERS, STEPS, TOKENS, TOPK)
    lines, columns = folder / "jsonl", folder / "parquet"
    shards = max(1, options.records // SHARD)
    write_jsonl(lines, drawn, TOKENS, requests=REQUESTS, layers=LAYERS, shards=shards)
    to_parquet(find_traces(lines), lines, columns, print, lambda done: None)
    columns = columns / lines.name
    for path in (lines, columns):  # compiles, and loads what each format needs
        analyze(path, msgspec.structs.replace(CONFIG, max_steps_per_stream=2, policies=("all",)))

    plain = plain_speed(lines, options.plain_records)
    print(f"plain json + Counter, one block size: {plain:,.0f} records/s")
    base = {}
    for name, path in (("jsonl", lines), ("parquet", columns)):
        base[path] = report(f"{name}, blocks of 16, 32 and 64, 1 worker", path, shards * SHARD, plain)
    for policies in (("opt",), ("lru", "opt"), ("all",)):
        changed = msgspec.structs.replace(CONFIG, policies=policies)
        seconds = analyze(columns, changed)
        added = (seconds - base[columns]) / (shards * SHARD) * 1e6
        speed = shards * SHARD / seconds
        print(f"parquet, with --policies {','.join(policies)}: {speed:,.0f} records/s, {added:.0f} us a record more")

    shutil.rmtree(lines)
    shutil.rmtree(columns.parent)
    shards = max(2, options.long_records // SHARD)
    write_jsonl(lines, drawn, TOKENS, requests=REQUESTS, layers=LAYERS, shards=shards)
    alone = report(f"jsonl, {shards * SHARD:,} records, 1 worker", lines, shards * SHARD, plain)
    shared = report(f"jsonl, {shards * SHARD:,} records, 2 workers", lines, shards * SHARD, plain, workers=2)
    print(f"2 workers / 1 worker: {alone / shared:.2f}")
    shutil.rmtree(lines)

    for batches, steps in ((1, STEPS), (4, STEPS), (1, 4 * STEPS)):
        # Batches of 20 requests x 50 layers follow each other in one file, so that nothing ends with its shard.
        write_jsonl(lines, drawn, TOKENS, requests=20, layers=50, shards=batches, repeats=steps // STEPS, one_file=True)
        records = batches * 20 * 50 * steps
        print(
            f"{batches} x 1,000 streams of {steps} steps, {records:,} records: "
            f"peak memory {peak_memory(lines) / 1e6:,.0f} MB"
        )
        shutil.rmtree(lines)


def analyze(path: Path, config: AnalyzeConfig) -> float:
    """Seconds that it takes."""
    (trace,) = find_traces(path)
    os.sync()  # what was written shall not be on its way to the disk meanwhile
    begin = time.perf_counter()
    analyze_trace(trace, config, lambda done: None)
    return time.perf_counter() - begin


def report(name: str, path: Path, records: int, plain: float, workers: int = 1) -> float:
    seconds = analyze(path, msgspec.structs.replace(CONFIG, workers=workers))
    size = sum(shard.stat().st_size for shard in path.glob("trace_steps*"))
    ratio = records / seconds * len(BLOCK_SIZES) / plain
    print(
        f"{name}: {records / seconds:,.0f} records/s, {size / seconds / 1e6:,.0f} MB/s "
        f"({size / records:,.0f} bytes a record), {ratio:.0f} times plain per block size"
    )
    return seconds


def peak_memory(path: Path) -> int:
    """Bytes that the whole command needs at most."""
    command = [sys.executable, "-m", "dsakv", "analyze", "--input", str(path), "--block-sizes", "16,32,64"]
    child = os.posix_spawn(
        sys.executable,
        [*command, "--policies", "none", "--out", str(path / "analysis.json")],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)],
    )
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"the command failed with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024


def plain_speed(path: Path, records: int) -> float:
    """Records a second of a straightforward implementation."""
    lines: list[bytes] = []
    for shard in sorted(path.glob("trace_steps*")):
        with shard.open("rb") as file:
            lines += [line for line, _ in zip(file, range(records - len(lines)), strict=False)]
    begin = time.perf_counter()
    plain_figures(lines, 64)
    return len(lines) / (time.perf_counter() - begin)


def plain_figures(lines: list[bytes], block_size: int) -> None:
    """The figures of seed-like scripts: streams by (request, layer), one block size."""
    last_seen: dict[Any, dict[int, int]] = {}
    windows: dict[Any, dict[int, tuple[deque[set[int]], Counter[int]]]] = {}
    caches: dict[Any, dict[int, OrderedDict[int, None]]] = {}
    previous: dict[Any, set[int]] = {}
    sums: defaultdict[str, float] = defaultdict(float)
    reuse: Counter[int] = Counter()
    for line in lines:
        record = json.loads(line)
        positions, length = record["selected_token_pos"], record["seq_len_current"]
        key = (record["request_id"], record["layer_id"])
        counts = Counter(position // block_size for position in positions)
        blocks, unique, current = set(counts), len(counts), (length - 1) // block_size
        sums["unique"] += unique
        sums["span"] += max(blocks) - min(blocks) + 1
        shares = [count / len(positions) for count in counts.values()]
        sums["entropy"] += -sum(p * math.log(p) for p in shares) / math.log(unique) if unique > 1 else 0
        ranked = sorted(counts.values())
        sums["gini"] += 2 * sum(i * x for i, x in enumerate(ranked, 1)) / (unique * len(positions)) - 1
        sums["distance"] += sum(current - block for block in blocks) / unique
        for window in (256, 1024, 4096):
            sums[f"tokens{window}"] += sum(length - 1 - position <= window for position in positions) / len(positions)
        for window in (4, 16, 64):
            sums[f"blocks{window}"] += sum(current - block <= window for block in blocks) / unique
        if key in previous:
            sums["jaccard"] += len(blocks & previous[key]) / len(blocks | previous[key])
        previous[key] = blocks
        seen = last_seen.setdefault(key, {})
        for block in blocks:
            if block in seen:
                reuse[record["step_idx"] - seen[block]] += 1
            seen[block] = record["step_idx"]
        for window, (held, inside) in windows.setdefault(
            key, {w: (deque(), Counter()) for w in (1, 4, 16, 64)}
        ).items():
            held.append(blocks)
            inside.update(blocks)
            if len(held) > window:
                gone = held.popleft()
                inside.subtract(gone)
                for block in gone:
                    if not inside[block]:
                        del inside[block]
            sums[f"window{window}"] += len(inside)
        for capacity, cache in caches.setdefault(key, {c: OrderedDict() for c in (128, 256, 512, 1024)}).items():
            sums[f"hits{capacity}"] += len(blocks & cache.keys())
            for block in sorted(blocks):
                cache[block] = None
                cache.move_to_end(block)
            while len(cache) > capacity:
                cache.popitem(last=False)


if __name__ == "__main__":
    main()
