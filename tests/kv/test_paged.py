"""The paged cache against a plain table of rows by (sequence, position)."""

from __future__ import annotations

import pytest
import torch

from dsakv.errors import DsakvError
from dsakv.kv.paged import PagedCache
from dsakv.kv.step import BlockTable, Span
from dsakv.models.contracts import Selection
from dsakv.policies.placement import HBM

CPU = torch.device("cpu")


def make_cache(block_size: int) -> PagedCache:
    return PagedCache(
        n_layers=2, n_blocks=12, block_size=block_size, row_dim=3, index_dim=2, dtype=torch.float32, device=CPU
    )


def test_scattered_blocks_read_like_one_array() -> None:
    cache = make_cache(4)
    tables = [BlockTable([7, 2, 3, 9], CPU), BlockTable([0, 11, 5], CPU)]
    assert tables[0].runs == [(7, 1), (2, 2), (9, 1)]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(15, 3, generator=generator), torch.randn(9, 3, generator=generator)]
    keys = [torch.randn(15, 2, generator=generator), torch.randn(9, 2, generator=generator)]
    # Unequal chunks, both sequences in one step, then a decode-like step of one token each.
    for starts, lengths in [((0, 0), (6, 5)), ((6, 5), (8, 3)), ((14, 8), (1, 1))]:
        step = cache.bind(list(map(Span, tables, starts, lengths)), decode=False)
        span = [slice(s, s + n) for s, n in zip(starts, lengths, strict=True)]
        view = step.layer(1)
        view.append(
            torch.cat([r[s] for r, s in zip(rows, span, strict=True)]),
            torch.cat([k[s] for k, s in zip(keys, span, strict=True)]),
        )
        assert step.positions.tolist() == [p for s in span for p in range(s.start, s.stop)]
        for i, segment in enumerate(view.segments):
            assert segment.seq_len == starts[i] + lengths[i]
            assert torch.equal(view.index_keys(i).values, keys[i][: segment.seq_len])
    wanted = torch.tensor([[0, 5, 14, 7], [8, 1, 3, 100]])  # 100 is padding beyond the sequence
    view.fetch(Selection(wanted, torch.zeros(2, 4), torch.tensor([4, 3])))
    read = view.gather(slice(0, 2))
    assert torch.equal(read[0], rows[0][wanted[0]])
    assert torch.equal(read[1, :3], rows[1][wanted[1, :3]])
    assert read[1, 3].isfinite().all()
    assert [(r.tier, r.rows) for r in view.reads] == [(HBM, slice(0, 2))]
    assert view.reads[0].begin.us_until(view.reads[0].end) > 0


def test_adjacent_blocks_are_read_in_place() -> None:
    cache = make_cache(4)
    view = cache.bind([Span(BlockTable([4, 5, 6], CPU), 0, 9)], decode=False).layer(0)
    view.append(torch.ones(9, 3), torch.ones(9, 2))
    assert view.index_keys(0).values.data_ptr() == cache.index_rows[0, 16].data_ptr()


def test_row_bytes_are_the_payload_of_one_token() -> None:
    assert make_cache(4).row_bytes == 12


def test_a_cache_too_large_for_the_device_is_a_plain_error() -> None:
    with pytest.raises(DsakvError, match="no room on cpu for a KV cache of 5805421"):
        PagedCache(
            n_layers=60,
            n_blocks=1 << 30,
            block_size=64,
            row_dim=576,
            index_dim=128,
            dtype=torch.bfloat16,
            device=CPU,
        )
