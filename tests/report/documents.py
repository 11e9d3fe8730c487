"""Documents to report on: small traces, written and analyzed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from dsakv.analysis.run import analyze_trace
from dsakv.config import AnalyzeConfig
from dsakv.trace.open import find_traces

NASTY = '</script><script>alert("1")</script><b>[red]&amp;\x1b[31m'


def write_trace(
    run: Path,
    *,
    layers: int = 2,
    steps: int = 30,
    needles: bool = False,
    name: str = "ruler",
    random: bool = False,
    caveat: str | None = None,
) -> None:
    """Two requests whose layers read other tokens step by step."""
    trace = run / "block4"
    trace.mkdir(parents=True)
    model = {
        "name": name,
        "random_weights": random,
        "caveat": caveat,
        "kv_bytes_per_token_layer": 1000,
        "n_layers": layers,
    }
    meta = {"block_size_tokens": 4, "dataset": name, "model": model}
    (trace / "run_meta.json").write_bytes(orjson.dumps(meta))
    with (trace / "trace_steps.jsonl").open("wb") as file:
        for step in range(steps):
            for request in range(2):
                for layer in range(layers):
                    entry = {
                        "request_id": request,
                        "layer_id": layer,
                        "step_idx": step,
                        "engine_step": step,
                        "seq_len_current": 900,
                    }
                    chosen = list(range(step * (1 + layer % 3), 300 + layer, 3 + request))
                    file.write(orjson.dumps({**entry, "selected_token_pos": chosen}) + b"\n")
    if needles:
        spans = [{"request_id": request, "needle_spans": [[20, 30]], "prefix_owners": []} for request in range(2)]
        (run / "requests.jsonl").write_bytes(b"".join(orjson.dumps(span) + b"\n" for span in spans))


def analyzed(folder: Path, **options: Any) -> dict[str, Any]:
    """All traces below ``folder``."""
    config = AnalyzeConfig(**{"lru_caps": (16, 60, 100), **options})
    return {"results": [made for trace in find_traces(folder) for made in analyze_trace(trace, config, lambda n: None)]}


def document(folder: Path, **options: Any) -> dict[str, Any]:
    """One run with needles."""
    write_trace(folder / "run", needles=True)
    return analyzed(folder, **options)


def four_runs(folder: Path, **options: Any) -> dict[str, Any]:
    for place, name in enumerate(("burstgpt", "longbenchv2", "ruler", "sharegpt")):
        write_trace(folder / f"{name}_{place}", steps=24 + place, needles=name == "ruler", name=name)
    return analyzed(folder, **options)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "several block sizes, all policies": {"block_sizes": (2, 4, 8), "policies": ("all",)},
    "no policies": {"policies": ("none",)},
    "sequential": {"lru_mode": "sequential"},
    "union": {"step_union": True},
    "one stream a request": {"key_mode": "request"},
    "a cache for a layer": {"cache_scope": "layer"},
    "a cache for a request": {"cache_scope": "request"},
    "a cache for the run": {"cache_scope": "run"},
    "one step": {"max_steps_per_stream": 1},
    "no capacities, no windows": {"lru_caps": (), "ws_windows": (), "recent_block_windows": ()},
    "capped reuse": {"reuse_cap_steps": 1},
}
"""Options that leave figures out, or null."""
