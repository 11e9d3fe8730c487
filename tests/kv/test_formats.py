"""Packed rows and float8 index keys: the rounding, the bytes, and that storing them adds nothing to either."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsakv.kernels import reference
from dsakv.kv.formats import PackedRows, PlainRows, row_format
from dsakv.kv.paged import PagedCache
from dsakv.kv.step import BlockTable, Span
from dsakv.models.contracts import Fp8Kv, Selection

CPU = torch.device("cpu")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def rounded_in_place(rows: Tensor, latent: int, block: int, *, ue8m0: bool) -> Tensor:
    """Rows with the latent replaced by what fp8 keeps of it, as the reference does, and nothing packed."""
    out = rows.clone()
    for start in range(0, latent, block):
        part = rows[..., start : start + block].float()
        scale = part.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448
        if ue8m0:
            scale = torch.exp2(torch.ceil(torch.log2(scale.double()))).float()
        kept = (part / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        out[..., start : start + block] = kept.to(rows.dtype)
    return out


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, int, bool]:
    """Rows of any magnitude, also of zeros, and how many numbers of each are the latent."""
    latent = draw(st.sampled_from([4, 32, 128, 256, 512]))
    rest = 2 * draw(st.integers(1, 33))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    rows = torch.randn(draw(st.integers(1, 5)), latent + rest, generator=generator)
    rows *= 10.0 ** draw(st.integers(-8, 4))
    return rows.to(draw(DTYPES)), latent, draw(st.booleans())


@given(cases())
def test_what_is_read_is_what_was_written_rounded(case: tuple[Tensor, int, bool]) -> None:
    rows, latent, ue8m0 = case
    packed = PackedRows(rows.shape[1], rows.dtype, Fp8Kv(reference, ue8m0, latent))
    stored = packed.encode(rows)
    assert stored.shape == (len(rows), packed.width)
    assert stored.element_size() * packed.width == packed.row_bytes
    read = packed.decode(stored)
    assert read.dtype == rows.dtype
    assert torch.equal(read, rounded_in_place(rows, latent, min(128, latent), ue8m0=ue8m0))
    assert torch.equal(read[:, latent:], rows[:, latent:])
    assert torch.equal(packed.decode(stored.view(len(rows), 1, -1))[:, 0], read)


def test_bytes_are_those_of_engines() -> None:
    fp8 = Fp8Kv(reference, True, 512)
    assert row_format(576, torch.bfloat16, fp8).row_bytes == 512 + 4 * 4 + 64 * 2 == 656
    assert row_format(576, torch.float32, fp8).row_bytes == 512 + 4 * 4 + 64 * 4
    for plain in (None, Fp8Kv(reference, True)):  # keys alone in float8
        assert isinstance(row_format(576, torch.bfloat16, plain), PlainRows)
        assert row_format(576, torch.bfloat16, plain).row_bytes == 1152
    cache = make_cache(fp8, torch.bfloat16, 576, 128)
    slots = 2 * 12 * 4
    assert cache.row_bytes == 656
    assert cache.resident.rows.nbytes == slots * 656
    assert cache.index_scale is not None
    assert cache.index_rows.nbytes + cache.index_scale.nbytes == slots * 132


@pytest.mark.parametrize(("latent", "dim"), [(6, 8), (130, 132), (128, 129)])
def test_rows_that_fill_no_words_are_refused(latent: int, dim: int) -> None:
    with pytest.raises(ValueError, match="cannot be packed"):
        PackedRows(dim, torch.bfloat16, Fp8Kv(reference, False, latent))


def make_cache(fp8: Fp8Kv | None, dtype: torch.dtype, row_dim: int, index_dim: int) -> PagedCache:
    return PagedCache(
        n_layers=2,
        n_blocks=12,
        block_size=4,
        row_dim=row_dim,
        index_dim=index_dim,
        dtype=dtype,
        device=CPU,
        fp8=fp8,
    )


@pytest.mark.parametrize("ue8m0", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_cache_reads_like_a_plain_one_of_rounded_rows(dtype: torch.dtype, ue8m0: bool) -> None:
    """Also the tokens that the step itself appends, and a sequence over scattered blocks."""
    latent, dim, key_dim = 256, 320, 128
    fp8 = Fp8Kv(reference, ue8m0, latent)
    packed, plain = make_cache(fp8, dtype, dim, key_dim), make_cache(None, dtype, dim, key_dim)
    tables = [BlockTable([7, 2, 3, 9], CPU), BlockTable([4, 5, 6], CPU)]
    generator = torch.Generator().manual_seed(1)
    for starts, lengths in [((0, 0), (6, 5)), ((6, 5), (8, 3)), ((14, 8), (1, 1))]:
        rows = torch.randn(sum(lengths), dim, generator=generator).to(dtype)
        keys = torch.randn(sum(lengths), key_dim, generator=generator).to(dtype)
        spans = list(map(Span, tables, starts, lengths))
        views = [cache.bind(spans, decode=False).layer(1) for cache in (packed, plain)]
        views[0].append(rows, keys)
        rounded_keys = rounded_in_place(keys.float(), key_dim, key_dim, ue8m0=ue8m0)
        views[1].append(rounded_in_place(rows, latent, 128, ue8m0=ue8m0), keys)
        for i, segment in enumerate(views[0].segments):
            values, scale = views[0].index_keys(i)
            assert values.dtype == torch.float8_e4m3fn
            assert scale is not None
            assert scale.shape == (segment.seq_len,)
            new = segment.rows
            read = values.float() * scale.unsqueeze(1)
            assert torch.equal(read[-(new.stop - new.start) :], rounded_keys[new])
            wanted = torch.arange(segment.seq_len).flip(0).expand(new.stop - new.start, -1)
            chosen = everything(wanted, new, len(rows))
            for view in views:
                view.fetch(chosen)
            assert torch.equal(*(view.gather(new) for view in views))
            assert views[0].reads[-1].rows == new
            assert views[0].reads[-1].begin.us_until(views[0].reads[-1].end) > 0


def everything(positions: torch.Tensor, rows: slice, queries: int) -> Selection:
    """A selection of ``positions`` ``[t, K]`` for the queries ``rows``, of the first token for the others."""
    chosen = torch.zeros(queries, positions.shape[1], dtype=torch.int64)
    chosen[rows] = positions
    return Selection(chosen, torch.zeros(chosen.shape), torch.full((queries,), positions.shape[1]))


def test_only_the_keys_are_float8_where_the_model_says_so() -> None:
    cache = make_cache(Fp8Kv(reference, False), torch.float32, 6, 32)
    view = cache.bind([Span(BlockTable([0, 1], CPU), 0, 5)], decode=False).layer(0)
    generator = torch.Generator().manual_seed(2)
    rows, keys = torch.randn(5, 6, generator=generator), torch.randn(5, 32, generator=generator)
    view.append(rows, keys)
    assert torch.equal(view.sequence(0), rows)
    values, scale = view.index_keys(0)
    assert scale is not None
    assert torch.equal(values.float() * scale.unsqueeze(1), rounded_in_place(keys, 32, 32, ue8m0=False))
    view.append(rows, None)  # a layer without an indexer leaves them untouched
    assert torch.equal(view.index_keys(0).values.view(torch.uint8), values.view(torch.uint8))
