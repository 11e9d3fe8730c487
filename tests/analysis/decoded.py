"""A small run as decode leaves it: selections, block tables, times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson

from dsakv.trace.open import TraceDir, find_traces

LAYERS, ROW, KEY = 2, 640, 32
STEPS, PROMPTS = (9, 14, 6), (60, 41, 77)


def write(run: Path, *, wall: bool = True, sample_rate: float = 1.0, **meta: Any) -> TraceDir:
    """Three requests that decode together from step 5 on; the positions of a step are drawn."""
    folder = run / "block4"
    folder.mkdir(parents=True)
    model = {"kv_bytes_per_token_layer": ROW, "n_layers": LAYERS, "index_head_dim": 8, "dtype": "float32"}
    about = {"block_size_tokens": 4, "model": model, "trace": {"sample_rate": sample_rate}, **meta}
    (folder / "run_meta.json").write_bytes(orjson.dumps(about))
    rng = np.random.default_rng(3)
    lines = []
    for step in range(max(STEPS)):
        for request, (count, prompt) in enumerate(zip(STEPS, PROMPTS, strict=True)):
            if step >= count:
                continue
            for layer in range(LAYERS):
                seq_len = prompt + step + 1
                chosen = sorted(rng.choice(seq_len, 12, replace=False).tolist())
                one = {"request_id": request, "layer_id": layer, "step_idx": step, "engine_step": 5 + step,
                       "seq_len_current": seq_len, "selected_token_pos": chosen}  # fmt: skip
                lines.append(one | ({"step_wall_us": 1000 + 100 * step} if wall else {}))
    (folder / "trace_steps.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    (run / "requests.jsonl").write_bytes(
        b"".join(
            orjson.dumps({"request_id": r, "prompt_tokens": p, "decode_steps": n, "kv_blocks": [[30 * r, 30]]}) + b"\n"
            for r, (n, p) in enumerate(zip(STEPS, PROMPTS, strict=True))
        )
    )
    (found,) = find_traces(run)
    return found
