"""The tilelang programs without a GPU: their arithmetic on tilelang's CPU backend, and that they compile for CUDA.

On CPU a program runs its thread blocks one after the other and its parallel loops in order, with all buffers local
and all operands in float32: indices, masks, scales and the online softmax are the program's, threads and tensor cores
are not.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from dsakv.kernels import reference, tile
from dsakv.kernels.contract import Quantized

tilelang = pytest.importorskip("tilelang", reason="tilelang is not installed")

from dsakv.kernels import tile_programs  # noqa: E402


class Sequential:
    """tilelang's language with one thread for a whole block."""

    float8_e4m3fn = float16 = "float32"

    def __getattr__(self, name: str) -> Any:
        return getattr(tilelang.language, name)

    def alloc_shared(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return tilelang.language.alloc_local(shape, dtype)

    alloc_fragment = alloc_shared

    def Parallel(self, *extents: Any) -> Any:  # noqa: N802
        return tilelang.language.grid(*extents)

    def Pipelined(self, extent: Any, num_stages: int) -> Any:  # noqa: N802
        return tilelang.language.serial(extent)

    def StridedTensor(self, shape: Any, strides: Any, dtype: Any) -> Any:  # noqa: N802
        return tilelang.language.Tensor(shape, dtype)  # this backend does not pass strides on

    def cast(self, value: Any, dtype: Any) -> Any:
        return value


@pytest.fixture(autouse=True)
def sequential(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "arch" not in request.fixturenames:
        monkeypatch.setattr(tile_programs, "T", Sequential())


def run(program: Any, *tensors: Tensor) -> None:
    tilelang.compile(program, target="c")(*tensors)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("power_of_two", [True, False])
def test_act_quant(power_of_two: bool) -> None:
    x = randn(37, 128) * 10 ** randn(37, 1, seed=1)
    values, scale = torch.empty(37, 128), torch.empty(37)
    run(tile_programs.act_quant("float32", 128, power_of_two), x, values, scale)
    expected = reference.act_quant(x, power_of_two_scale=power_of_two)
    assert torch.equal(scale, expected.scale.squeeze(1))
    assert torch.equal(values.to(torch.float8_e4m3fn).float(), expected.values.float())


@pytest.mark.parametrize(
    ("n", "tokens", "blocks", "native"),
    [(300, 3, (16, 32), True), (300, 3, (16, 32), False), (576, 70, (64, 64), True), (200, 130, (128, 128), True)],
)
def test_fp8_gemm(n: int, tokens: int, blocks: tuple[int, int], native: bool) -> None:
    x = reference.act_quant(randn(tokens, 384), power_of_two_scale=True)
    weight = Quantized(randn(n, 384).mul(100).to(torch.float8_e4m3fn), randn(-(-n // 128), 3).abs() + 0.5)
    out = torch.full((tokens, n), 7.0)
    operands = (x.values.float(), x.scale, weight.values.float(), weight.scale)
    run(tile_programs.fp8_gemm(n, 384, *blocks, native), *operands, out)
    torch.testing.assert_close(out, reference.fp8_gemm(x, weight), atol=0.05, rtol=1e-5)


@pytest.mark.parametrize(("tokens", "heads", "dim", "keys"), [(1, 64, 128, 300), (17, 80, 32, 77), (9, 5, 96, 1)])
@pytest.mark.parametrize("scaled", [True, False])
def test_index_scores(tokens: int, heads: int, dim: int, keys: int, scaled: bool) -> None:
    q, weights, k = randn(tokens, heads, dim), randn(tokens, heads, seed=1), randn(keys, dim, seed=2)
    scale = randn(keys, seed=3).abs() if scaled else None
    out, expected = torch.full((tokens, keys), 7.0), torch.empty(tokens, keys)
    program = tile_programs.index_scores(heads, dim, "float32", "float32", scaled)
    run(program, q, weights, k, torch.empty(1) if scale is None else scale, out)
    reference.index_scores(q, weights, k, scale, expected)
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize(
    ("heads", "dim", "value_dim", "selected", "blocks", "parts"),
    [
        (16, 96, 64, 70, (16, 32, 2), 1),
        (5, 96, 64, 1, (16, 64, 2), 1),
        (40, 192, 128, 100, (32, 64, 1), 2),
        (70, 64, 64, 300, (64, 32, 2), 4),
    ],
)
def test_sparse_attention(
    heads: int, dim: int, value_dim: int, selected: int, blocks: tuple[int, int, int], parts: int
) -> None:
    q, rows = randn(3, heads, dim), randn(3, selected, dim, seed=1)
    counts = torch.tensor([min(3, selected), (selected + 1) // 2, selected])
    out, log_weight = torch.full((parts, 3, heads, value_dim), 7.0), torch.full((parts, 3, heads), 7.0)
    program = tile_programs.sparse_attention(heads, dim, value_dim, 0.2, *blocks, "float32")
    run(program, q, rows, counts.int(), out, log_weight)
    expected = reference.sparse_attention(q, rows, counts, 0.2, value_dim)
    torch.testing.assert_close(tile.merged(out, log_weight), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize(("arch", "capability"), [("sm_80", (8, 0)), ("sm_90a", (9, 0))])
def test_programs_compile_for_gpus_that_are_not_there(arch: str, capability: tuple[int, int]) -> None:
    blocks = tile.attention_blocks(128, 576, capability)
    assert blocks is not None
    native = capability >= tile.NATIVE_FP8
    programs = [
        tile_programs.act_quant("bfloat16", 128, True),
        tile_programs.fp8_gemm(300, 256, 16, 32, native),
        tile_programs.fp8_gemm(300, 256, 128, 128, native),
        tile_programs.index_scores(64, 128, "float16", "float8_e4m3fn", True),
        tile_programs.sparse_attention(128, 576, 512, 0.1, *blocks, "bfloat16"),
    ]
    for program in programs:
        assert tile_programs.compiled(program, {"kind": "cuda", "arch": arch}) is not None
