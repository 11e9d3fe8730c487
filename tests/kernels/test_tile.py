"""The CUDA kernels: against the reference on a GPU, and their programs on the CPU.

tilelang can make serial C of a program. With threads and shared memory taken out, it shows that what the program
computes is right; not that it is fast, or that tensor cores round as expected: that takes a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dsakv.kernels import reference, tile
from dsakv.kernels.contract import Kernels, Quantized
from dsakv.kernels.select import kernels_for, why_slow

CPU = torch.device("cpu")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def block_scaled(n: int, k: int, device: str = "cpu") -> Quantized:
    scale = noise(-(-n // 128), k // 128, seed=1).abs() + 0.5
    return Quantized(noise(n, k, seed=2).mul(100).to(torch.float8_e4m3fn).to(device), scale.to(device))


def test_tile_has_all_kernels() -> None:
    kernels: Kernels = tile
    assert {name for name in vars(Kernels) if not name.startswith("_")} == set(tile.__all__)
    assert kernels.top_k is reference.top_k


def test_the_cpu_runs_the_reference() -> None:
    assert kernels_for(CPU) is reference
    assert why_slow(reference, CPU, fp8=True) is None


def test_a_gpu_that_cannot_run_its_own_kernels_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert "tilelang" in (why_slow(reference, cuda, fp8=False) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "--dtype bfloat16" in (why_slow(tile, cuda, fp8=True) or "")
    assert why_slow(tile, cuda, fp8=False) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why_slow(tile, cuda, fp8=True) is None


def test_what_no_program_fits_goes_to_the_reference() -> None:
    x = noise(3, 48)
    for ours, theirs in zip(
        tile.act_quant(x, power_of_two_scale=True, block=16),
        reference.act_quant(x, power_of_two_scale=True, block=16),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    q, rows, counts = noise(2, 3, 40), noise(2, 5, 40), torch.tensor([2, 5])
    expected = reference.sparse_attention(q, rows, counts, 0.2, 32)
    assert torch.equal(tile.sparse_attention(q, rows, counts, 0.2, 32), expected)
    out, exact = torch.empty(2, 7), torch.empty(2, 7)
    tile.index_scores(noise(2, 16, 64), noise(2, 16), noise(7, 64), None, out)  # float32
    reference.index_scores(noise(2, 16, 64), noise(2, 16), noise(7, 64), None, exact)
    assert torch.equal(out, exact)
    with pytest.raises(ValueError, match="multiple"):
        tile.act_quant(noise(3, 100), power_of_two_scale=True)


def test_rows_that_stand_apart_are_written_in_place_where_there_is_room() -> None:
    scores = torch.zeros(4, 10)
    assert tile._whole_rows(scores) is not None
    whole = tile._whole_rows(scores[1:3, :7])
    assert whole is not None
    assert whole.shape == (2, 10)
    assert whole.data_ptr() == scores[1].data_ptr()
    assert tile._whole_rows(scores[:, 3:9]) is None  # the last row would end behind the storage
    assert tile._whole_rows(scores.T) is None
    single = tile._whole_rows(scores[3:, 4:8])
    assert single is not None
    assert single.shape == (1, 4)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Compiles a program for the CPU: all memory its own, all loops serial, float32 in place of float8."""
    import tilelang
    from tilelang import language

    from dsakv.kernels import tile_programs

    monkeypatch.setattr(language, "alloc_fragment", language.alloc_local)
    monkeypatch.setattr(language, "alloc_shared", language.alloc_local)
    monkeypatch.setattr(language, "Parallel", language.grid)
    monkeypatch.setattr(tile_programs, "FP8", "float32")
    tilelang.disable_cache()
    yield lambda name, *sizes: tilelang.compile(getattr(tile_programs, name)(*sizes), target="c")
    tilelang.enable_cache()


@pytest.mark.parametrize("power_of_two", [True, False])
def test_the_program_of_act_quant(power_of_two: bool, on_cpu: Callable[..., Any]) -> None:
    x = noise(37, 256) * 3
    x[5, :128] = 448 * 2.0**-3
    x[6] = 0
    values, scale = torch.zeros(37, 256), torch.zeros(37, 2)
    on_cpu("act_quant", 256, 128, power_of_two, "float32")(x, values, scale)
    expected = reference.act_quant(x, power_of_two_scale=power_of_two)
    assert torch.equal(scale, expected.scale)
    assert torch.equal(values.to(torch.float8_e4m3fn).float(), expected.values.float())


def test_the_program_of_fp8_gemm(on_cpu: Callable[..., Any]) -> None:
    x, weight = reference.act_quant(noise(19, 256), power_of_two_scale=True), block_scaled(200, 256)
    out = torch.zeros(19, 200)
    on_cpu("fp8_gemm", 200, 256, 16)(x.values.float(), x.scale, weight.values.float(), weight.scale, out)
    torch.testing.assert_close(out, reference.fp8_gemm(x, weight), atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("scaled", [True, False])
def test_the_program_of_index_scores(scaled: bool, on_cpu: Callable[..., Any]) -> None:
    q, keys, weights = noise(19, 16, 64), noise(301, 64, seed=1), noise(19, 16, seed=2)
    unit = noise(301, seed=3).abs()
    out, expected = torch.full((19, 400), math.pi), torch.empty(19, 301)
    on_cpu("index_scores", 16, 64, "float32", scaled)(q, weights, keys, unit, out)
    reference.index_scores(q, weights, keys, unit if scaled else None, expected)
    torch.testing.assert_close(out[:, :301], expected, atol=1e-3, rtol=1e-4)
    assert (out[:, 301:] == math.pi).all()


def test_the_program_of_sparse_attention(on_cpu: Callable[..., Any]) -> None:
    q, rows = noise(5, 24, 80) * 3, noise(5, 130, 80, seed=1)
    counts = torch.tensor([1, 64, 65, 129, 130])
    for i, count in enumerate(counts.tolist()):
        rows[i, count:] = math.nan  # columns behind the valid ones may hold anything
    rows = rows.nan_to_num(nan=100.0)
    out = torch.zeros(5, 24, 64)
    on_cpu("sparse_attention", 24, 16, 64, 16, 0.3, "float32")(q, rows, counts, out)
    torch.testing.assert_close(out, reference.sparse_attention(q, rows, counts, 0.3, 64), atol=1e-5, rtol=1e-4)


class TestOnTheGpu:
    """Marked ``gpu``: every kernel against the reference on the same device."""

    pytestmark = gpu

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("power_of_two", [True, False])
    @pytest.mark.parametrize("shape", [(1, 128), (3, 7168), (257, 64, 128)])
    def test_act_quant(self, shape: tuple[int, ...], power_of_two: bool, dtype: torch.dtype) -> None:
        x = noise(*shape, dtype=dtype, device="cuda") * 5
        ours = tile.act_quant(x, power_of_two_scale=power_of_two)
        theirs = reference.act_quant(x, power_of_two_scale=power_of_two)
        assert torch.equal(ours.scale, theirs.scale)
        assert torch.equal(ours.values.view(torch.uint8), theirs.values.view(torch.uint8))

    @pytest.mark.parametrize("tokens", [1, 3, 64, 257])
    @pytest.mark.parametrize(("n", "k"), [(576, 7168), (128, 1536), (200, 256)])
    def test_fp8_gemm(self, tokens: int, n: int, k: int) -> None:
        x = reference.act_quant(noise(tokens, k, device="cuda"), power_of_two_scale=True)
        weight = block_scaled(n, k, "cuda")
        expected = reference.fp8_gemm(x, weight)
        # Hopper adds up 128 products with some 14 bits before they go into float32.
        spread = 2**-12 * math.sqrt(k) * 100
        torch.testing.assert_close(tile.fp8_gemm(x, weight), expected, atol=spread, rtol=2**-10)

    @pytest.mark.parametrize("kind", ["bfloat16", "float8", "float32"])
    @pytest.mark.parametrize(("queries", "n_keys"), [(1, 1), (3, 129), (64, 5000), (257, 301)])
    def test_index_scores(self, queries: int, n_keys: int, kind: str) -> None:
        q, keys = noise(queries, 64, 128, device="cuda"), noise(n_keys, 128, seed=1, device="cuda")
        weights, unit = noise(queries, 64, seed=2, device="cuda"), None
        if kind == "float8":
            keys, scale = reference.act_quant(keys, power_of_two_scale=True)
            q, unit = reference.act_quant(q, power_of_two_scale=True).values, scale.squeeze(-1)
        elif kind == "bfloat16":
            q, keys = q.bfloat16(), keys.bfloat16()
        out = torch.zeros(queries, n_keys + 50, device="cuda")
        expected = torch.empty(queries, n_keys, device="cuda")
        tile.index_scores(q, weights, keys, unit, out[:, :n_keys])
        reference.index_scores(q, weights, keys, unit, expected)
        torch.testing.assert_close(out[:, :n_keys], expected, atol=2e-2, rtol=1e-3)
        assert not out[:, n_keys:].any()

    @pytest.mark.parametrize("n_heads", [8, 16, 24, 128])
    @pytest.mark.parametrize("selected", [1, 100, 2048])
    def test_sparse_attention(self, selected: int, n_heads: int) -> None:
        q = noise(5, n_heads, 576, dtype=torch.bfloat16, device="cuda")
        rows = noise(5, selected, 576, seed=1, dtype=torch.bfloat16, device="cuda")
        counts = torch.tensor([1, selected, max(1, selected // 2), max(1, selected - 1), selected], device="cuda")
        ours = tile.sparse_attention(q, rows, counts, 0.07, 512)
        theirs = reference.sparse_attention(q.float(), rows.float(), counts, 0.07, 512)
        torch.testing.assert_close(ours.float(), theirs, atol=2e-2, rtol=2e-2)

    def test_hadamard(self) -> None:
        x = noise(7, 64, 128, device="cuda")
        torch.testing.assert_close(tile.hadamard(x), reference.hadamard(x), atol=1e-5, rtol=1e-5)
