"""Each CUDA kernel beside its physical limit and the reference, at the shapes of the 671B model and 128K keys.

The limit is the longer of two times: what must be read and written at this device's bandwidth, and the arithmetic at
the speed of its tensor cores; both rates are measured here, as a large copy and a large product in bfloat16 (float8
is taken to be twice as fast). Caches are flushed before every run, figures are medians.

    python scripts/bench_kernels.py --ranks 8
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsakv.kernels import reference, tile
from dsakv.kernels.contract import Kernels, Quantized
from dsakv.kernels.select import kernels_for

KEYS, SELECTED = 131072, 2048
HEADS, LATENT, VALUES = 128, 576, 512
INDEX_HEADS, INDEX_DIM = 64, 128
HIDDEN, DENSE = 7168, 18432


class Case(NamedTuple):
    """A kernel at one shape: the call, the bytes it has to move and the operations it has to do."""

    name: str
    call: Callable[[Kernels], object]
    moved: int
    operations: float
    fp8: bool = False


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def act_quant(tokens: int) -> Case:
    x = randn(tokens, HIDDEN)
    moved = size(x) + x.numel() + x.numel() // 32
    return Case(f"act_quant {tokens} x {HIDDEN}", lambda k: k.act_quant(x, power_of_two_scale=True), moved, 0)


def fp8_gemm(tokens: int, ranks: int) -> Case:
    n = DENSE // ranks
    x = reference.act_quant(randn(tokens, HIDDEN), power_of_two_scale=True)
    scale = torch.rand(-(-n // 128), HIDDEN // 128, device="cuda")
    weight = Quantized(randn(n, HIDDEN).to(torch.float8_e4m3fn), scale)
    name = f"fp8_gemm {tokens} x {HIDDEN} @ {n}"
    moved = size(*x, *weight) + 4 * tokens * n
    return Case(name, lambda k: k.fp8_gemm(x, weight), moved, 2.0 * tokens * n * HIDDEN, fp8=True)


def index_scores(tokens: int) -> Case:
    q = randn(tokens, INDEX_HEADS, INDEX_DIM).to(torch.float8_e4m3fn)
    keys = randn(KEYS, INDEX_DIM).to(torch.float8_e4m3fn)
    weights, scale = torch.rand(tokens, INDEX_HEADS, device="cuda"), torch.rand(KEYS, device="cuda")
    out = torch.empty(tokens, KEYS, device="cuda")
    operations = 2.0 * tokens * INDEX_HEADS * INDEX_DIM * KEYS
    name = f"index_scores {tokens} x {INDEX_HEADS} heads, {KEYS} keys"
    moved = size(q, keys, weights, scale, out)
    return Case(name, lambda k: k.index_scores(q, weights, keys, scale, out), moved, operations, fp8=True)


def sparse_attention(tokens: int, ranks: int) -> Case:
    heads = HEADS // ranks
    q, rows = randn(tokens, heads, LATENT), randn(tokens, SELECTED, LATENT)
    counts = torch.full((tokens,), SELECTED, device="cuda")
    operations = 2.0 * tokens * heads * SELECTED * (LATENT + VALUES)
    moved = size(q, rows) + 2 * tokens * heads * VALUES
    name = f"sparse_attention {tokens} x {heads} heads, {SELECTED} rows"
    return Case(name, lambda k: k.sparse_attention(q, rows, counts, 0.1, VALUES), moved, operations)


def cases(ranks: int) -> Iterator[Case]:
    for tokens in (1, 512):
        yield act_quant(tokens)
        yield fp8_gemm(tokens, ranks)
    for tokens in (1, 128):
        yield index_scores(tokens)
        yield sparse_attention(tokens, ranks)


def seconds(runs: int, call: Callable[..., object], *arguments: object) -> float:
    """Median time on the device, with nothing of the operands left in its caches."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    call(*arguments)  # compiles
    times: list[float] = []
    for _ in range(runs):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call(*arguments)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def rates(runs: int) -> tuple[float, float]:
    """Bytes and bfloat16 operations a second of this device."""
    source, target = torch.empty(2, 1 << 30, dtype=torch.uint8, device="cuda")
    bandwidth = 2 * len(source) / seconds(runs, target.copy_, source)
    side = 8192
    a, b = randn(side, side), randn(side, side)
    return bandwidth, 2.0 * side**3 / seconds(runs, torch.matmul, a, b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8, help="ranks that share heads and dense layers")
    parser.add_argument("--runs", type=int, default=20, help="runs of which the median counts")
    options: Any = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing to measure")
        return
    device = torch.device("cuda")
    if kernels_for(device) is reference:
        sys.exit("tilelang is not installed: there are no kernels to compare with the reference")
    bandwidth, speed = rates(options.runs)
    print(f"{torch.cuda.get_device_name()}: {bandwidth / 1e9:.0f} GB/s, {speed / 1e12:.0f} TFLOP/s in bfloat16")
    print(f"{'kernel':44}  {'limit us':>9}  {'tile us':>9}  {'of limit':>8}  {'reference us':>12}  {'speedup':>7}")
    native = tile.capability(device) >= tile.NATIVE_FP8
    for case in cases(options.ranks):
        rate = speed * (2 if case.fp8 and native else 1)
        limit = max(case.moved / bandwidth, case.operations / rate)
        ours, theirs = (seconds(options.runs, case.call, kernels) for kernels in (tile, reference))
        figures = f"{limit * 1e6:9.1f}  {ours * 1e6:9.1f}  {limit / ours:8.2f}  {theirs * 1e6:12.1f}"
        print(f"{case.name:44}  {figures}  {theirs / ours:7.1f}", flush=True)


if __name__ == "__main__":
    main()
