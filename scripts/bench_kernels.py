"""The CUDA kernels at the sizes of DeepSeek-V3.2 (671B): what they use, and how near they come to the device's limits.

On a machine with CUDA each is timed beside the reference on the same device, after the physical limit: the bytes that
have to be read over the memory's bandwidth, or the products over the tensor cores' speed, whichever takes longer.
Elsewhere, where nvcc is installed, the programs are compiled for two generations of GPUs, and what nvcc says of
registers and spilled bytes is printed. ``--peak-tflops`` and ``--bandwidth`` (GB/s) are the device's own figures.
"""

from __future__ import annotations

import argparse
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dsakv.kernels import reference, tile
from dsakv.kernels.contract import Kernels, Quantized

PROGRAMS: dict[str, tuple[Any, ...]] = {
    "act_quant": (7168, 128, True, "bfloat16"),
    "fp8_gemm": (24576, 1536, 64),
    "index_scores": (64, 128, "float8_e4m3fn", True),
    "index_scores, bfloat16": (64, 128, "bfloat16", False),
    "sparse_attention": (128, 64, 512, 64, 0.1, "bfloat16"),
    "sparse_attention, 16 heads": (16, 16, 512, 64, 0.1, "bfloat16"),
}
"""What is compiled, with the arguments of its maker in ``dsakv.kernels.tile_programs``."""
TARGETS = ("sm_80", "sm_90a")


class Work(NamedTuple):
    """One kernel on one input, and what it cannot do without."""

    kernel: str
    arguments: dict[str, Any]
    bytes: float
    products: float

    def call(self, kernels: Kernels) -> None:
        getattr(kernels, self.kernel)(**self.arguments)


def works(tokens: int) -> Iterator[Work]:
    """The kernels of a step of so many tokens, at a context of 128K."""
    device, context, top_k, n, inner = "cuda", 131072, 2048, 24576, 1536
    x = torch.randn(tokens, 7168, device=device, dtype=torch.bfloat16)
    yield Work("act_quant", {"x": x, "power_of_two_scale": True}, x.numel() * 3, 0)
    weight = torch.randn(n, inner, device=device).to(torch.float8_e4m3fn)
    rounded = reference.act_quant(torch.randn(tokens, inner, device=device), power_of_two_scale=True)
    operands = {"x": rounded, "weight": Quantized(weight, torch.rand(n // 128, inner // 128, device=device))}
    yield Work("fp8_gemm", operands, n * inner + tokens * (inner + 4 * n), tokens * n * inner)
    keys = reference.act_quant(torch.randn(context, 128, device=device), power_of_two_scale=True)
    scored = {
        "q": torch.randn(tokens, 64, 128, device=device).to(torch.float8_e4m3fn),
        "weights": torch.randn(tokens, 64, device=device),
        "keys": keys.values,
        "key_scale": keys.scale.squeeze(-1),
        "out": torch.empty(tokens, context, device=device),
    }
    yield Work("index_scores", scored, context * (132 + 4 * tokens), tokens * 64 * 128 * context)
    at_once = min(tokens, 32)  # a prefill chunk gathers its rows in such tiles
    attended = {
        "q": torch.randn(at_once, 128, 576, device=device, dtype=torch.bfloat16),
        "rows": torch.randn(at_once, top_k, 576, device=device, dtype=torch.bfloat16),
        "counts": torch.full((at_once,), top_k, device=device),
        "scale": 0.07,
        "value_dim": 512,
    }
    yield Work("sparse_attention", attended, at_once * top_k * 576 * 2, at_once * 128 * top_k * (576 + 512))


def milliseconds(call: Callable[[], object]) -> float:
    """The median of 20 calls, each between two events; the first three warm up."""
    times = []
    for _ in range(23):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)))
    return sorted(times[3:])[10]


def measure(bandwidth: float, peak: float) -> None:
    print(f"{torch.cuda.get_device_name()}; limits at {bandwidth:g} GB/s and {peak:g} TFLOP/s")
    print(f"{'kernel':18}{'tokens':>7}{'limit ms':>10}{'tile ms':>10}{'of limit':>10}{'reference':>12}{'times':>8}")
    for tokens, work in ((n, work) for n in (1, 32, 512) for work in works(n)):
        limit = max(work.bytes / (bandwidth * 1e6), 2 * work.products / (peak * 1e9))
        ours, theirs = (milliseconds(functools.partial(work.call, kernels)) for kernels in (tile, reference))
        print(
            f"{work.kernel:18}{tokens:7}{limit:10.4f}{ours:10.4f}{limit / ours:10.2f}{theirs:12.4f}{theirs / ours:8.1f}"
        )


def compile_all() -> None:
    import tilelang
    from tilelang import tvm
    from tilelang.engine.lower import lower

    from dsakv.kernels import tile_programs

    source = Path(tilelang.__file__).parent
    print(f"{'program':30}{'target':>8}{'registers':>11}{'spilled bytes':>15}")
    for target in TARGETS:
        for name, sizes in PROGRAMS.items():
            if target == "sm_80" and (name == "fp8_gemm" or "float8_e4m3fn" in sizes):
                continue  # the reference runs there
            with tempfile.TemporaryDirectory() as folder, tvm.target.Target({"kind": "cuda", "arch": target}) as kind:
                program = getattr(tile_programs, name.split(",")[0])(*sizes)
                code = Path(folder) / "program.cu"
                code.write_text(lower(program, target=kind, enable_device_compile=False).kernel_source)
                includes = [f"-I{source}/src", f"-I{source}/3rdparty/cutlass/include"]
                command = ["nvcc", "-std=c++17", "-O3", "-cubin", f"-arch={target}", *includes, "-Xptxas", "-v"]
                ran = subprocess.run(
                    [*command, "-o", f"{folder}/program.cubin", str(code)], capture_output=True, text=True, check=False
                )
            if ran.returncode:
                raise SystemExit(f"{name} for {target} does not compile:\n{ran.stderr}")
            registers = re.findall(r"Used (\d+) registers", ran.stderr)[-1]
            spilled = re.findall(r"(\d+) bytes spill stores", ran.stderr)[-1]
            print(f"{name:30}{target:>8}{registers:>11}{spilled:>15}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bandwidth", type=float, default=3350, help="GB/s of the device's memory (H100: 3350)")
    parser.add_argument("--peak-tflops", type=float, default=989, help="of its tensor cores in bfloat16 (H100: 989)")
    options = parser.parse_args()
    if torch.cuda.is_available():
        measure(options.bandwidth, options.peak_tflops)
    elif shutil.which("nvcc"):
        print("no CUDA device: nothing is timed, the programs are compiled")
        compile_all()
    else:
        print("neither a CUDA device nor nvcc: nothing to measure")


if __name__ == "__main__":
    main()
