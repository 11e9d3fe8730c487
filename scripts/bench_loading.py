"""How fast weights are loaded, beside safetensors' own ``load_file`` on the same files.

A checkpoint of many small shards, in the page cache, so that the disk's speed is left out. Every pair of runs is
interleaved, and the ratio is of their best times. What is stored as it is needed is mapped by both and costs nothing
until it is used: so every page of the result is read.

    python scripts/bench_loading.py --gb 4 --shards 64
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsakv.weights.checkpoint import Checkpoint, Part
from dsakv.weights.layout import Layout
from dsakv.weights.load import load_parameters

N, K = 2048, 7168
"""A routed expert's matrix in the released model."""
CPU = torch.device("cpu")


def write(directory: Path, count: int, shards: int, dtype: torch.dtype) -> None:
    values = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).to(dtype)
    for shard in range(shards):
        tensors = {}
        for i in range(shard, count, shards):
            tensors[f"{i}.weight"] = values.clone()
            if dtype == torch.float8_e4m3fn:
                tensors[f"{i}.scale"] = torch.full((N // 128, K // 128), 0.01)
        save_file(tensors, directory / f"model-{shard:05}.safetensors")


def model_of(count: int, n: int, k: int, dtype: torch.dtype) -> nn.Module:
    layers = []
    for _ in range(count):
        layer = nn.Module()
        layer.weight = nn.Parameter(torch.empty(n, k, device="meta", dtype=dtype))
        layers.append(layer)
    return nn.ModuleList(layers)


def own(directory: Path, count: int, dtype: torch.dtype, part: Part = Part()) -> list[Tensor]:  # noqa: B008
    n, k = (size // part.total if dim == part.dim else size for dim, size in enumerate((N, K)))
    model = model_of(count, n, k, dtype)
    with Checkpoint(directory) as checkpoint:
        load_parameters(model, checkpoint, Layout(part=lambda name: part), device=CPU)
    return list(model.parameters())


def theirs(directory: Path, dtype: torch.dtype, part: Part = Part()) -> list[Tensor]:  # noqa: B008
    tensors = []
    for path in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if name.endswith("weight"):
                piece = tensor if part.dim is None else tensor.chunk(part.total, part.dim)[part.number]
                tensors.append(piece.to(dtype).contiguous())
    return tensors


def seconds(load: Callable[[], list[Tensor]]) -> float:
    """Until every page of what was loaded has been read."""
    begin = time.perf_counter()
    for tensor in load():
        tensor.view(-1).view(torch.uint8)[::4096].max()
    return time.perf_counter() - begin


def compare(what: str, size: int, ours: Callable[[], list[Tensor]], other: Callable[[], list[Tensor]]) -> None:
    pairs = [(seconds(ours), seconds(other)) for _ in range(4)][1:]
    mine, reference = (min(times) for times in zip(*pairs, strict=True))
    speeds = f"{size / mine / 1e9:6.2f} GB/s, load_file {size / reference / 1e9:6.2f} GB/s"
    print(f"  {what:34} {speeds}: {mine / reference:.2f} of its time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="bytes of a checkpoint, in units of 10^9")
    parser.add_argument("--shards", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        count = max(options.shards, round(options.gb * 1e9 / (N * K * 2)))
        size = count * N * K * 2
        write(directory, count, options.shards, torch.bfloat16)
        print(f"bfloat16, {size / 1e9:.1f} GB, {count} tensors in {options.shards} files; GB of what is needed")
        for dtype in (torch.bfloat16, torch.float32):
            name = str(dtype).removeprefix("torch.")
            compare(f"whole, as {name}", size, lambda: own(directory, count, dtype), lambda: theirs(directory, dtype))  # noqa: B023
            for dim in (0, 1):
                part = Part(dim, 2, 4)
                compare(
                    f"1 of 4 ranks, dimension {dim}, as {name}",
                    size // 4,
                    lambda: own(directory, count, dtype, part),  # noqa: B023
                    lambda: theirs(directory, dtype, part),  # noqa: B023
                )
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        count = max(options.shards, round(options.gb * 1e9 / (N * K)))
        size = count * N * K
        write(directory, count, options.shards, torch.float8_e4m3fn)
        print(f"float8, {size / 1e9:.1f} GB; load_file converts without scales")
        for dtype in (torch.bfloat16, torch.float32):
            name = str(dtype).removeprefix("torch.")
            compare(f"whole, as {name}", size, lambda: own(directory, count, dtype), lambda: theirs(directory, dtype))  # noqa: B023


if __name__ == "__main__":
    main()
