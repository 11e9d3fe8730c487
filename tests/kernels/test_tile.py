"""The CUDA kernels: on a GPU against the reference, anywhere what they leave to it and what they need."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from dsakv.cli import guarded
from dsakv.kernels import reference, tile
from dsakv.kernels.contract import Kernels, Quantized
from dsakv.kernels.select import kernels_for, why_slow

gpu = pytest.mark.gpu
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16


def randn(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def block_scaled(n: int, k: int, device: str = "cpu") -> Quantized:
    scale = randn(-(-n // 128), -(-k // 128), seed=2, device=device).abs() + 0.5
    return Quantized(randn(n, k, seed=1, device=device).mul(100).to(FP8), scale)


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_importing_the_kernels_needs_no_tilelang() -> None:
    program = "import sys; from dsakv.kernels import select, tile; sys.exit('tilelang' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_missing_tilelang_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tilelang", None)
    monkeypatch.delitem(sys.modules, "dsakv.kernels.tile_programs", raising=False)
    monkeypatch.delattr("dsakv.kernels.tile_programs", raising=False)

    def launch() -> None:
        tile._kernel("act_quant", ("bfloat16", 128, True), (8, 0))

    assert guarded(launch) == 1
    assert "needs tilelang, which is not installed" in capsys.readouterr().err


def test_a_device_gets_the_kernels_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    installed = find_spec("tilelang") is not None
    assert kernels_for(cpu) is reference
    assert kernels_for(cuda) is (tile if installed else reference)
    assert why_slow(reference, cpu) is None
    assert "tilelang" in (why_slow(reference, cuda) or "")
    monkeypatch.setattr(tile, "capability", lambda device: (7, 5))
    assert "older" in (why_slow(tile, cuda) or "")
    monkeypatch.setattr(tile, "capability", lambda device: (8, 0))
    assert why_slow(tile, cuda) is None


def test_tile_has_all_kernels() -> None:
    kernels: Kernels = tile
    assert all(callable(getattr(kernels, name)) for name in vars(Kernels) if not name.startswith("_"))


def test_without_cuda_the_kernels_are_the_reference() -> None:
    x = randn(3, 256)
    mine, theirs = (m.act_quant(x, power_of_two_scale=True) for m in (tile, reference))
    assert torch.equal(mine.values.float(), theirs.values.float())
    assert torch.equal(mine.scale, theirs.scale)
    weight = block_scaled(300, 256)
    assert torch.equal(tile.fp8_gemm(mine, weight), reference.fp8_gemm(theirs, weight))
    out, expected = torch.empty(3, 50), torch.empty(3, 50)
    for kernels, scores in ((tile, out), (reference, expected)):
        kernels.index_scores(randn(3, 4, 32), randn(3, 4), randn(50, 32, seed=1), None, scores)
    assert torch.equal(out, expected)
    attended = [m.sparse_attention(randn(2, 4, 12), randn(2, 6, 12), torch.tensor([2, 6]), 0.3, 8)
                for m in (tile, reference)]  # fmt: skip
    assert torch.equal(*attended)
    assert torch.equal(tile.hadamard(x), reference.hadamard(x))
    with pytest.raises(ValueError, match="multiple"):
        tile.act_quant(randn(3, 100), power_of_two_scale=True)


@pytest.mark.parametrize(
    ("x", "block", "covered"),
    [
        (empty(5, 256), 128, True),
        (empty(2, 5, 64, dtype=torch.float32), 64, True),
        (empty(5, 256, dtype=torch.float16), 128, True),
        (empty(5, 256, dtype=torch.float64), 128, False),
        (empty(5, 200), 128, False),
        (empty(5, 48), 48, False),
        (empty(0, 256), 128, False),
    ],
)
def test_which_numbers_are_quantized_by_a_program(x: Tensor, block: int, covered: bool) -> None:
    assert tile.covers_act_quant(x, block) is covered


@pytest.mark.parametrize(
    ("tokens", "n", "k", "covered"),
    [(1, 300, 256, True), (64, 1, 128, True), (0, 300, 256, False), (3, 300, 200, False)],
)
def test_which_products_have_a_program(tokens: int, n: int, k: int, covered: bool) -> None:
    f32 = torch.float32
    x = Quantized(empty(tokens, k, dtype=FP8), empty(tokens, -(-k // 128), dtype=f32))
    weight = Quantized(empty(n, k, dtype=FP8), empty(-(-n // 128), -(-k // 128), dtype=f32))
    assert tile.covers_fp8_gemm(x, weight) is covered
    assert not tile.covers_fp8_gemm(Quantized(x.values, empty(tokens, k // 64, dtype=f32)), weight)
    assert not tile.covers_fp8_gemm(Quantized(x.values.to(BF16), x.scale), weight)
    assert not tile.covers_fp8_gemm(Quantized(empty(2, tokens, k, dtype=FP8), x.scale), weight)


@pytest.mark.parametrize(
    ("q_dtype", "key_dtype", "dim", "covered"),
    [
        (FP8, FP8, 128, True),
        (BF16, BF16, 64, True),
        (torch.float16, torch.float16, 128, True),
        (BF16, FP8, 128, False),
        (torch.float32, torch.float32, 128, False),
        (BF16, BF16, 40, False),
        (BF16, BF16, 512, False),
    ],
)
def test_which_scores_have_a_program(q_dtype: torch.dtype, key_dtype: torch.dtype, dim: int, covered: bool) -> None:
    f32 = torch.float32
    q, keys = empty(3, 5, dim, dtype=q_dtype), empty(70, dim, dtype=key_dtype)
    weights, scale, out = empty(3, 5, dtype=f32), empty(70, dtype=f32), empty(3, 100, dtype=f32)[:, 7:77]
    assert tile.covers_index_scores(q, weights, keys, scale, out) is covered
    assert tile.covers_index_scores(q, weights, keys, None, out) is covered
    assert not tile.covers_index_scores(q, weights, keys, None, empty(70, 3, dtype=f32).T)
    assert not tile.covers_index_scores(q, weights, keys, None, out[:0])


@pytest.mark.parametrize(
    ("dtype", "dim", "value_dim", "covered"),
    [
        (BF16, 576, 512, True),
        (BF16, 96, 64, True),
        (torch.float16, 576, 512, True),
        (torch.float32, 576, 512, False),
        (BF16, 72, 64, False),
        (BF16, 96, 48, False),
        (BF16, 640, 576, False),
    ],
)
def test_which_attention_has_a_program(dtype: torch.dtype, dim: int, value_dim: int, covered: bool) -> None:
    q, rows = empty(3, 5, dim, dtype=dtype), empty(3, 9, dim, dtype=dtype)
    assert tile.covers_sparse_attention(q, rows, value_dim) is covered
    assert not tile.covers_sparse_attention(q, rows[:, :0], value_dim)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("heads", [1, 16, 17, 40, 128])
def test_blocks_of_attention_fit_the_shared_memory(capability: tuple[int, int], heads: int) -> None:
    limit = {(8, 0): 163, (9, 0): 227, (10, 0): 227}.get(capability, 99) << 10
    chosen = tile.attention_blocks(heads, 576, capability)
    assert chosen is not None
    head_block, block, stages = chosen
    assert head_block in (16, 32, 64)
    assert 2 * (head_block * 576 + stages * block * 576 + head_block * block) < limit
    assert head_block < 2 * max(16, heads)
    assert tile.attention_blocks(heads, 8192, capability) is None


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_averages_of_parts_merge_to_that_of_the_whole(parts: int) -> None:
    logits, values = randn(2, 3, 20).double(), randn(20, 8).double()
    pieces = list(zip(logits.tensor_split(parts, -1), values.tensor_split(parts), strict=True))
    averages = torch.stack([piece.softmax(-1) @ value for piece, value in pieces])
    weights = torch.stack([piece.logsumexp(-1) for piece, _ in pieces])
    if parts > 2:  # a part without rows
        averages = torch.cat((averages, torch.full_like(averages[:1], torch.nan)))
        weights = torch.cat((weights, torch.full_like(weights[:1], -torch.inf)))
    torch.testing.assert_close(tile.merged(averages, weights), logits.softmax(-1) @ values)


def test_few_programs_are_cut_into_parts() -> None:
    assert tile.attention_parts(programs=1, blocks=32, processors=132) == 16
    assert tile.attention_parts(programs=33, blocks=32, processors=132) == 4
    assert tile.attention_parts(programs=1000, blocks=32, processors=132) == 1
    assert tile.attention_parts(programs=1, blocks=0, processors=132) == 1


@gpu
@on_cuda
@pytest.mark.parametrize("tokens", [1, 3, 64, 257])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize(("n", "block"), [(7168, 128), (64, 64)])
def test_act_quant_has_the_bits_of_the_reference(
    tokens: int, dtype: torch.dtype, power_of_two: bool, n: int, block: int
) -> None:
    x = (randn(2, tokens, n) * 10 ** randn(2, tokens, 1, seed=1)).to(dtype)
    x[0, 0, :block] = 0
    x[1, 0, :block] = 448 * 0.25  # its scale is a power of two as it is
    expected = reference.act_quant(x, power_of_two_scale=power_of_two, block=block)
    for kernels in (tile, reference):
        quantized = kernels.act_quant(x.cuda(), power_of_two_scale=power_of_two, block=block)
        assert torch.equal(quantized.scale.cpu(), expected.scale)
        assert torch.equal(quantized.values.cpu().view(torch.uint8), expected.values.view(torch.uint8))


@gpu
@on_cuda
@pytest.mark.parametrize("tokens", [1, 3, 64, 257])
@pytest.mark.parametrize(("n", "k"), [(300, 384), (576, 7168), (2048, 128), (7, 256)])
def test_fp8_gemm_multiplies_as_the_reference(tokens: int, n: int, k: int) -> None:
    x = reference.act_quant(randn(tokens, k, device="cuda"), power_of_two_scale=True)
    weight = block_scaled(n, k, "cuda")
    wide = torch.empty(n, k, device="cuda")
    reference.dequantize_into(wide, weight.values, weight.scale, (0, 0))
    size = reference.dequantize(x).abs() @ wide.abs().T
    error = (tile.fp8_gemm(x, weight) - reference.fp8_gemm(x, weight)).abs()
    assert (error <= size * 2**-9).all(), (error / size).max()


@gpu
@on_cuda
@pytest.mark.parametrize("tokens", [1, 3, 64, 257])
@pytest.mark.parametrize(("heads", "dim"), [(64, 128), (5, 64), (80, 96)])
@pytest.mark.parametrize("keys", [1, 127, 5001])
@pytest.mark.parametrize("fp8", [True, False])
def test_index_scores_are_those_of_the_reference(tokens: int, heads: int, dim: int, keys: int, fp8: bool) -> None:
    dtype = FP8 if fp8 else BF16
    q, k = randn(tokens, heads, dim, device="cuda").to(dtype), randn(keys, dim, seed=1, device="cuda").to(dtype)
    weights = randn(tokens, heads, seed=2, device="cuda")
    scale = randn(keys, seed=3, device="cuda").abs() if fp8 else None
    whole = torch.full((tokens, keys + 8), 7.0, device="cuda")
    out, expected = whole[:, 3 : keys + 3], torch.empty(tokens, keys, device="cuda")
    tile.index_scores(q, weights, k, scale, out)
    reference.index_scores(q, weights, k, scale, expected)
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=1e-4)
    assert (whole[:, :3] == 7).all()
    assert (whole[:, keys + 3 :] == 7).all()


@gpu
@on_cuda
@pytest.mark.parametrize("tokens", [1, 3, 64, 257])
@pytest.mark.parametrize("heads", [16, 5, 128])
@pytest.mark.parametrize(("dim", "value_dim"), [(576, 512), (96, 64)])
@pytest.mark.parametrize("selected", [1, 100, 2048])
def test_sparse_attention_is_that_of_the_reference(
    tokens: int, heads: int, dim: int, value_dim: int, selected: int
) -> None:
    q = randn(tokens, heads, dim, device="cuda").to(BF16)
    rows = randn(selected, dim, seed=1, device="cuda").to(BF16).expand(tokens, -1, -1)
    counts = torch.arange(tokens, device="cuda") * 37 % selected + 1
    counts[-1] = selected
    out = tile.sparse_attention(q, rows, counts, dim**-0.5, value_dim)
    assert out.dtype == BF16
    for t in {0, tokens // 2, tokens - 1}:
        one = slice(t, t + 1)
        expected = reference.sparse_attention(q[one].float(), rows[one].float(), counts[one], dim**-0.5, value_dim)
        torch.testing.assert_close(out[one].float(), expected, atol=1e-2, rtol=2e-2)


@gpu
@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_hadamard_on_cuda_is_the_reference(dtype: torch.dtype) -> None:
    x = randn(5, 64, 128, device="cuda").to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(tile.hadamard(x).float(), reference.hadamard(x.float()), atol=tolerance, rtol=tolerance)
