"""How fast a checkpoint is converted beside `cp` of the same bytes, and how much memory it takes.

A synthetic checkpoint (fp8 projections with their scales, bf16 embedding, head, gates and norms) is made first. Then
`cp`, which is what any program has to do at least, and `dsakv convert` run in turn: with the source in the page cache,
and with the source dropped from it. What was written before is put on the disk and removed before each run. `convert`
waits until its files are on the disk, `cp` does not, so `cp` is also shown with that wait.

    python scripts/bench_convert.py --gigabytes 4 --model-parallel 8 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsakv.convert.architecture import may_be_fp8, scale_shape, tensors
from dsakv.header import ITEM_BYTES, Stored, format_header
from dsakv.models.deepseek_v32_names import hf_name
from dsakv.models.shapes import dsa_shape_of, read_config

SHARD_BYTES = 1 << 30
CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v32",
    "vocab_size": 16384,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "q_lora_rank": 512,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_n_heads": 16,
    "index_head_dim": 128,
    "index_topk": 2048,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
}
MEASURED = """
import sys
from dsakv.cli import run
code = run(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1], file=sys.stderr)
sys.exit(code)
"""
"""Runs a command line and prints the greatest resident memory of its process, in KB, as the last line."""


def stored_tensors(folder: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of each tensor of the model in ``folder``, under Hugging Face's names."""
    for name, shape in tensors(dsa_shape_of(read_config(folder / "config.json"), "config")):
        fp8 = may_be_fp8(name)
        yield hf_name(name), "F8_E4M3" if fp8 else "BF16", shape
        if fp8:
            yield hf_name(f"{name.removesuffix('weight')}scale"), "F32", scale_shape(shape)


def make(folder: Path, size: int) -> int:
    """Write a checkpoint of about ``size`` bytes, one MoE layer at least; its true size."""
    folder.mkdir()
    for layers in range(2, 10_000):
        (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
        named = list(stored_tensors(folder))
        total = sum(math.prod(shape) * ITEM_BYTES[dtype] for _, dtype, shape in named)
        if total >= size:
            break
    noise = np.random.default_rng(0).bytes(64 << 20)
    shard: list[Stored] = []
    number = end = 0
    for place, (name, dtype, shape) in enumerate(named):
        shard.append(Stored(name, dtype, shape, end, math.prod(shape) * ITEM_BYTES[dtype]))
        end += shard[-1].size
        if end < SHARD_BYTES and place < len(named) - 1:
            continue
        with open(folder / f"model-{number:05}.safetensors", "wb") as file:
            file.write(format_header(shard))
            for start in range(0, end, len(noise)):
                file.write(noise[: end - start])
        number, end, shard = number + 1, 0, []
    return total


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def settle(source: Path, target: Path, *, cold: bool) -> None:
    """Nothing left to be written by an earlier run, and the source in the page cache or not."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    for path in shards(source):
        with open(path, "rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                buffer = bytearray(16 << 20)
                while file.readinto(buffer):
                    pass


def cpu() -> float:
    """Seconds of processor time of all that was run so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def copy(source: Path, target: Path) -> tuple[float, float, float]:
    """Seconds that `cp` takes, with the wait for the disk too, and on a processor."""
    target.mkdir()
    begin, before = time.perf_counter(), cpu()
    subprocess.run(["cp", *map(str, shards(source)), str(target)], check=True)
    copied, used = time.perf_counter() - begin, cpu() - before
    subprocess.run(["sync", *map(str, shards(target))], check=True)
    return copied, time.perf_counter() - begin, used


def convert(source: Path, target: Path, *options: str) -> tuple[float, float, float]:
    """Seconds that `dsakv convert` takes, start of Python included, and on processors; its peak memory in MB."""
    command = [sys.executable, "-c", MEASURED, "convert", "--hf-ckpt-path", str(source), "--save-path", str(target)]
    begin, before = time.perf_counter(), cpu()
    ran = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
    return time.perf_counter() - begin, cpu() - before, int(ran.stderr.splitlines()[-1]) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--model-parallel", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--folder", help="on the disk to measure; by default the one for temporary files")
    options = parser.parse_args()
    ranks = ["--model-parallel", str(options.model_parallel), "--workers", str(options.workers)]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, target = Path(folder, "source"), Path(folder, "target")
        size = make(source, int(options.gigabytes * 1e9))
        print(f"{size / 1e9:.2f} GB, {options.model_parallel} ranks, {options.workers} workers")
        peaks = []
        for cold in (False, True):
            rows = []
            for _ in range(options.rounds):
                settle(source, target, cold=cold)
                copied, durable, copy_cpu = copy(source, target)
                settle(source, target, cold=cold)
                converted, convert_cpu, peak = convert(source, target, *ranks)
                peaks.append(peak)
                rows.append((copied, durable, converted, copy_cpu, convert_cpu))
            print("source dropped from the page cache" if cold else "source in the page cache")
            names = ("cp", "cp, on the disk", "convert", "cp, CPU", "convert, CPU")
            for name, column in zip(names, zip(*rows, strict=True), strict=True):
                middle, span = statistics.median(column), f"{min(column):.2f} to {max(column):.2f}"
                print(f"  {name:16} {size / middle / 1e6:7,.0f} MB/s  {middle:6.2f} s  ({span})")
            for name, place in (("cp", 0), ("cp, on the disk", 1)):
                ratios = [row[place] / row[2] for row in rows]
                span = f"{min(ratios):.2f} to {max(ratios):.2f}"
                print(f"  speed of convert over {name}: {statistics.median(ratios):.2f} ({span})")
        print(f"peak memory of convert: {max(peaks):.0f} MB")


if __name__ == "__main__":
    main()
