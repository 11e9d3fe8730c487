"""How fast JSONL traces are read: plain, with spaces, unsorted, with string ids, compressed.

First what any reader has to do, copying the file out of the page cache, and what it costs to let orjson parse it. Then
the scanner on bytes in memory, and the whole reader. The figures are the best of several passes.

    python scripts/bench_reading.py --records 3000 --positions 2048
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from dsakv.trace.intake import Intake
from dsakv.trace.jsonl_reader import BATCH_RECORDS, read_jsonl
from dsakv.trace.jsonl_scan import DONE, make_columns, scan

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LAYERS = 4
CONTEXT = 60_000


def records(count: int, positions: int) -> list[dict[str, Any]]:
    """Records with the fields that the tracer writes."""
    generator = np.random.default_rng(0)
    unused = {"hit_blocks": 0, "bytes_read": 0, "read_ops": 0, "latency_us": None, "batch_size": 0}
    used = {"hit_blocks": 832, "bytes_read": 2359296, "read_ops": positions, "latency_us": 133.4, "batch_size": 16}
    made = []
    for step, layer in (divmod(i, LAYERS) for i in range(count)):
        chosen = np.sort(generator.choice(CONTEXT + step, positions, replace=False))
        record: dict[str, Any] = {"event": "dsa_topk", "request_id": 0, "layer_id": layer, "index_layer_id": layer}
        record |= {
            "step_idx": step,
            "engine_step": step + 100,
            "step_wall_us": 12345,
            "seq_len_current": CONTEXT + step,
        }
        record |= {"unique_token_pos_count": positions, "offset_min": 0, "offset_p50": 31234, "offset_max": 59321}
        record |= {"block_size_tokens": 64, "unique_blocks": 832, "touched_block_ratio": 0.887123}
        record |= {"tokens_per_touched_block": {"mean": 2.4615384, "p50": 2, "p95": 6}}
        record |= {"kv_fetch": {"hbm": used, "local_pool": unused, "remote_pool": unused}}
        record |= {"prefix": {"prefix_cache_hit": True, "prefix_key": "a3f0c4b2e1d09876", "intersection_ratio": 0.0036}}
        record |= {
            "scores_stats": {"min": -1.1e-5, "mean": 0.39183, "max": 3.2001},
            "selected_token_pos": chosen.tolist(),
        }
        made.append(record)
    return made


def variants(made: list[dict[str, Any]]) -> dict[str, bytes]:
    """The records as files, by what is special about them."""

    def compact(changed: list[dict[str, Any]]) -> bytes:
        return b"".join(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in changed)

    shuffled = np.random.default_rng(1).permutation
    return {
        "plain": compact(made),
        "spaced": b"".join(json.dumps(record).encode() + b"\n" for record in made),
        "unsorted": compact([{**r, "selected_token_pos": shuffled(r["selected_token_pos"]).tolist()} for r in made]),
        "string ids": compact([{**r, "request_id": "req-0"} for r in made]),
        "zstd": zstd.compress(compact(made), 3),
    }


def report(what: str, size: int, count: int, run: Callable[[], object]) -> None:
    run()  # compiles
    best = min(_seconds(run) for _ in range(7))
    print(f"  {what:10} {size / best / 1e6:7,.0f} MB/s  {best / count * 1e6:7.2f} us a record")


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def scan_all(text: np.ndarray[Any, np.dtype[np.uint8]]) -> bool:
    """Scan [N] bytes over and over the same columns; False at a line that is not plain."""
    columns = make_columns(BATCH_RECORDS, 1 << 20)
    at = 0
    while at < len(text):
        before = at
        at, _, outcome = scan(text, at, columns, 0, 0)
        if outcome != DONE and at == before:
            return False
    return True


def parse_all(lines: list[bytes]) -> None:
    for line in lines:
        orjson.loads(line)


def read_all(path: Path) -> None:
    for _ in read_jsonl(path, Intake("strict")):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=3000)
    parser.add_argument("--positions", type=int, default=2048, help="in each record")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, data in variants(records(options.records, options.positions)).items():
            path = Path(folder, "trace_steps.jsonl" + ".zst" * (name == "zstd"))
            path.write_bytes(data)
            size, count = len(data), options.records
            print(f"{name}: {size / count / 1e3:.1f} KB a record")
            report("copy", size, count, path.read_bytes)
            if name == "plain":
                report("orjson", size, count, partial(parse_all, data.splitlines()))
            text = np.frombuffer(bytearray(data), dtype=np.uint8)
            if scan_all(text):
                report("scanner", size, count, partial(scan_all, text))
            report("reader", size, count, partial(read_all, path))


if __name__ == "__main__":
    main()
