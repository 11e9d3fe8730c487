"""Prefill and decode speed and peak memory of dsakv beside transformers, on the same weights and tokens.

Each measurement is a process of its own, the two programs in turn, so that memory is theirs alone and a slow phase
of the machine hits both. Decode figures are medians over single steps. transformers gets its prompt in chunks of the
same size as dsakv's: its own prefill builds a mask over the whole context.

    python scripts/bench_engine.py --lengths 2048 8192 32768 --ours-only 65500
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

from dsakv.threads import wait_briefly

CHUNK = 512


def prompt_of(length: int) -> list[int]:
    import torch

    return [int(t) for t in torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(1))]


def run_dsakv(length: int, steps: int) -> dict[str, float]:
    from dsakv.config import ModelConfig
    from dsakv.engine.engine import Engine
    from dsakv.engine.options import EngineOptions
    from dsakv.jobs.model import load_model
    from dsakv.request import Request

    model = load_model(ModelConfig(name="tiny-random", device="cpu", dtype="float32")).model
    prefill, decode = 0.0, []
    request = Request(0, prompt_of(length), steps + 1)
    begin = time.perf_counter()
    for step in Engine(model, EngineOptions(prefill_chunk=CHUNK)).run([request]):
        now = time.perf_counter()
        if step.kind == "prefill":
            prefill += now - begin
        else:
            decode.append(now - begin)
        begin = now
    return result(length, prefill, decode)


def run_transformers(length: int, steps: int) -> dict[str, float]:
    import torch
    from transformers import DeepseekV32ForCausalLM, DynamicCache

    from dsakv.models.tiny import ensure_tiny_model
    from dsakv.settings import cache_home

    model = DeepseekV32ForCausalLM.from_pretrained(ensure_tiny_model(cache_home()), dtype=torch.float32)
    ids = torch.tensor([prompt_of(length)])
    model.eval()  # type: ignore[no-untyped-call]
    cache, decode = DynamicCache(config=model.config), []
    with torch.inference_mode():
        begin = time.perf_counter()
        for start in range(0, length, CHUNK):
            logits = model(ids[:, start : start + CHUNK], past_key_values=cache, logits_to_keep=1).logits
        prefill = time.perf_counter() - begin
        for _ in range(steps):
            begin = time.perf_counter()
            logits = model(logits[:, -1:].argmax(-1), past_key_values=cache).logits
            decode.append(time.perf_counter() - begin)
    return result(length, prefill, decode)


def result(length: int, prefill: float, decode: list[float]) -> dict[str, float]:
    # Linux reports kilobytes, macOS bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"prefill": length / prefill, "decode": 1 / statistics.median(decode), "peak_mb": peak / 1e6}


PROGRAMS = {"dsakv": run_dsakv, "transformers": run_transformers}


def measure(program: str, length: int, steps: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--program", program, "--lengths", str(length), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{program} at {length} tokens failed:\n{done.stderr}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768], help="prompt tokens")
    parser.add_argument("--ours-only", type=int, nargs="*", default=[65500], help="lengths without transformers")
    parser.add_argument("--steps", type=int, default=20, help="decode steps")
    parser.add_argument("--program", choices=PROGRAMS, help=argparse.SUPPRESS)
    options: Any = parser.parse_args()
    wait_briefly(os.environ)  # for both programs: the children inherit it
    if options.program:
        print(json.dumps(PROGRAMS[options.program](options.lengths[0], options.steps)))
        return
    print("tokens  program       prefill tok/s  decode tok/s  peak MB   (ratio dsakv : transformers)")
    for length in [*options.lengths, *options.ours_only]:
        programs = ["dsakv"] if length in options.ours_only else list(PROGRAMS)
        rows = {program: measure(program, length, options.steps) for program in programs}
        for program, row in rows.items():
            ratio = ""
            if program == "transformers":
                ratio = "   " + ", ".join(f"{key} {rows['dsakv'][key] / row[key]:.2f}" for key in row)
            speeds = f"{row['prefill']:13.0f}  {row['decode']:12.1f}  {row['peak_mb']:7.0f}"
            print(f"{length:6}  {program:12}  {speeds}{ratio}", flush=True)


if __name__ == "__main__":
    main()
