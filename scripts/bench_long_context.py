"""Memory and time of a prefill chunk and of decode steps far into a context, with the shapes of the released model.

Two layers, eight experts and a small vocabulary, since only the first two differ in kind; random weights in bfloat16,
and a KV cache of random rows. First what the memory must be by formula, then what it was: resident memory before the
step, and the most that the step added.

    python scripts/bench_long_context.py --context 131072 --chunk 512
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dsakv.kernels import reference
from dsakv.kernels.contract import Kernels
from dsakv.kv.paged import PagedCache
from dsakv.kv.step import BlockTable, Span
from dsakv.models.contracts import Selection
from dsakv.models.deepseek_v32 import DeepseekV32
from dsakv.models.deepseek_v32_shape import parse_shape
from dsakv.models.dsa_shape import DsaShape
from dsakv.models.options import ModelOptions

CONFIG = Path(__file__).parents[1] / "configs" / "config_671B_v3.2.json"
CUT = {
    "n_layers": 2,
    "n_dense_layers": 1,
    "n_routed_experts": 8,
    "n_activated_experts": 4,
    "n_expert_groups": 2,
    "n_limited_groups": 1,
    "vocab_size": 1024,
}
CPU = torch.device("cpu")
BLOCK = 64
LIBRARIES = 100_000_000
"""Bytes that the allocator and the math libraries may take for themselves, code that is paged in on first use too."""
MB = 1e6


def cut_shape() -> DsaShape:
    return parse_shape(json.loads(CONFIG.read_text()) | CUT, CONFIG.name)


def random_model(shape: DsaShape, kernels: Kernels = reference) -> DeepseekV32:
    """A model of random weights, made in place: there is never a second copy."""
    model = DeepseekV32(shape, ModelOptions(torch.bfloat16, kernels=kernels))
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).bfloat16()
    for module in list(model.modules()):
        for leaf, declared in list(module.named_parameters(recurse=False)):
            value = torch.empty(declared.shape, dtype=declared.dtype)
            scaled = noise * value.shape[-1] ** -0.5 if value.dim() > 1 else noise
            for part in value.view(-1).split(len(noise)):  # drawing a billion numbers would take longer than the test
                part.copy_(scaled[: len(part)])
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    return model


def random_cache(model: DeepseekV32, tokens: int) -> PagedCache:
    """A cache with random rows and index keys for so many tokens."""
    cache = PagedCache(
        n_layers=len(model.layers),
        n_blocks=-(-tokens // BLOCK),
        block_size=BLOCK,
        row_dim=model.kv_row_dim,
        index_dim=model.index_key_dim,
        dtype=model.dtype,
        device=CPU,
    )
    generator = torch.Generator().manual_seed(1)
    for pool in (cache.resident.rows, cache.index_rows):
        for part in pool.view(-1).split(1 << 22):
            part.copy_(torch.randn(len(part), generator=generator))
    return cache


def scattered(cache: PagedCache) -> BlockTable:
    """Blocks in two runs, so that index keys have to be put together."""
    n = cache.resident.rows.shape[1] // BLOCK
    return BlockTable([*range(n // 2, n), *range(n // 2)], CPU)


@torch.inference_mode()
def step(model: DeepseekV32, cache: PagedCache, table: BlockTable, start: int, length: int) -> list[Selection]:
    """Run ``length`` tokens from position ``start`` on; the layers' selections."""
    bound = cache.bind([Span(table, start, length)], decode=False)
    hidden = model.embed(torch.arange(length) % model.vocab_size)
    rope = model.rope(bound.positions)
    selections: list[Selection] = []
    for i, layer in enumerate(model.layers):
        previous = selections[-1] if selections else None
        output = layer(hidden, rope, bound.positions, bound.layer(i), previous)
        hidden = output.hidden
        selections.append(output.selection)
    model.logits(hidden[-1:])
    return selections


def working_bytes(shape: DsaShape, context: int, chunk: int, itemsize: int = 2) -> dict[str, dict[str, int]]:
    """Bounds by formula of what a step of ``chunk`` tokens needs beside weights and cache, by phase and part.

    Phases follow each other, so that the largest counts.
    """
    heads, row = shape.n_heads, shape.kv_lora_rank + shape.qk_rope_head_dim
    per_head = shape.qk_nope_head_dim + shape.qk_rope_head_dim + row + 3 * shape.kv_lora_rank + shape.v_head_dim
    tiles = 4 * reference.tile_elements(CPU) * 4
    selected = chunk * min(shape.index_topk, context) * (2 * 8 + 2 * 4)
    index_query = shape.index_n_heads * shape.index_head_dim
    repacks = chunk > 1  # GEMMs of few rows take matrices as they lie
    return {
        "select": {
            "scores of a tile of queries": min(chunk, reference.score_rows(context, CPU)) * context * 4,
            "index keys, put together from blocks": context * shape.index_head_dim * itemsize,
            "index queries": chunk * index_query * (3 * itemsize + 4),
            "selections": selected,
            "tiles": tiles,
            "libraries": LIBRARIES,
        },
        "attend": {
            "queries and outputs of all heads": chunk * heads * per_head * itemsize,
            "selections": selected,
            "tiles": tiles,
            "the output projection, repacked": repacks * heads * shape.v_head_dim * shape.dim * itemsize,
            "libraries": LIBRARIES,
        },
        "feed forward": {
            "inner dimensions": chunk * shape.inter_dim * 3 * itemsize,
            "rows of experts, in and out": chunk * shape.n_activated_experts * shape.dim * (2 * itemsize + 3 * 4),
            "the widest matrix, repacked": repacks * shape.dim * shape.inter_dim * itemsize,
            "libraries": LIBRARIES,
        },
    }


def bound_of(phases: dict[str, dict[str, int]]) -> int:
    return max(sum(parts.values()) for parts in phases.values())


@dataclass(frozen=True)
class Cost:
    """What a step took."""

    seconds: float
    added_bytes: int
    """The most that was resident during the step beyond what was before."""


def resident() -> tuple[int, int]:
    """Resident bytes now, and the most so far."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    now, most = (int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    return now, most


def measured(run: Callable[[], object]) -> Cost:
    """Run it, on memory that earlier steps have given back."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the most so far begins anew
    (before, _), begin = resident(), time.perf_counter()
    run()
    return Cost(time.perf_counter() - begin, resident()[1] - before)


def total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=131072, help="tokens in the cache when the chunk has run")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--decode", type=int, default=4, help="decode steps")
    options = parser.parse_args()
    context, chunk = options.context, options.chunk
    if not sys.platform.startswith("linux"):
        sys.exit("memory is read from /proc, which only Linux has")
    shape, (base, _) = cut_shape(), resident()
    model = random_model(shape)
    cache = random_cache(model, context + options.decode)
    table = scattered(cache)
    weights, kv = total_bytes(model.parameters()), total_bytes([cache.resident.rows, cache.index_rows])
    print(f"program {base / MB:,.0f} MB, weights {weights / MB:,.0f} MB, cache of {context:,} tokens {kv / MB:,.0f} MB")
    decoded = [measured(partial(step, model, cache, table, context + i, 1)) for i in range(options.decode)]
    prefilled = measured(partial(step, model, cache, table, context - chunk, chunk))
    for name, costs, length in (("decode step", decoded, 1), ("chunk", [prefilled], chunk)):
        phases = working_bytes(shape, context, length)
        print(f"{name} of {length}: {min(cost.seconds for cost in costs):.2f} s")
        for phase, parts in phases.items():
            print(f"  {sum(parts.values()) / MB:7,.1f} MB to {phase}")
            for part, size in parts.items():
                print(f"    {size / MB:7,.1f} MB {part}")
        most = max(cost.added_bytes for cost in costs)
        print(f"  {most / MB:7,.1f} MB measured, {bound_of(phases) / MB:,.1f} MB by formula")


if __name__ == "__main__":
    main()
