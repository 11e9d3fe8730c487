"""Block hashes and the prefix index against comparing the prompts themselves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsakv.prefix import PrefixIndex, block_hashes, prefix_key

STABLE_HASHES = ["2cc5e4d47c5f3c5fbe635a5a5b7bb392", "66ca1890a7b0edaee5b40586c64fbba2"]
STABLE_KEY = "e23540807f31d2665a22fdaabba4c54a"

# Few distinct tokens and a repeated start, so that prompts share blocks.
prompts = st.lists(
    st.tuples(st.integers(0, 12), st.lists(st.integers(0, 1), max_size=8)).map(lambda p: [7] * p[0] + p[1]),
    min_size=1,
    max_size=8,
)


@given(prompts, st.integers(1, 5))
def test_lookup_is_the_longest_shared_run_of_full_blocks(requests: list[list[int]], block_size: int) -> None:
    index = PrefixIndex(block_size)
    for i, ids in enumerate(requests):
        expected = 0
        for blocks in range((len(ids) - 1) // block_size + 1 if ids else 0):
            n = blocks * block_size
            if any(len(earlier) >= n and earlier[:n] == ids[:n] for earlier in [[], *requests[:i]]):
                expected = blocks
        owners = index.lookup(ids)
        assert (owners[-1][1] // block_size if owners else 0) == expected
        before = 0
        for owner, tokens in owners:  # each is the first to have had these tokens, and no earlier one had more of them
            assert tokens > before
            assert requests[owner][:tokens] == ids[:tokens]
            assert all(earlier[:tokens] != ids[:tokens] for earlier in requests[:owner])
            assert owner == min(r for r in range(i) if requests[r][: before + block_size] == ids[: before + block_size])
            before = tokens
        index.add(ids, i)


@given(prompts, st.integers(1, 5))
def test_equal_hashes_mean_equal_prompts_up_to_there(requests: list[list[int]], block_size: int) -> None:
    seen: dict[bytes, list[int]] = {}
    for ids in requests:
        hashes = block_hashes(ids, block_size)
        assert len(hashes) == len(ids) // block_size
        for i, block in enumerate(hashes, 1):
            assert seen.setdefault(block, ids[: i * block_size]) == ids[: i * block_size]
    assert len(seen) == len({tuple(ids) for ids in seen.values()})


def test_hashes_are_the_same_everywhere() -> None:
    assert [h.hex() for h in block_hashes([1, 2, 3, 4, 5], 2)] == STABLE_HASHES
    assert prefix_key(list(range(300)), 256) == STABLE_KEY


def test_prefix_key_covers_the_first_tokens_only() -> None:
    assert prefix_key([1, 2, 3, 4], 2) == prefix_key([1, 2, 9], 2) != prefix_key([1, 2, 3, 4], 3)
    assert prefix_key([1, 2], 256) == prefix_key([1, 2], 2)


def test_a_block_holds_at_least_one_token() -> None:
    with pytest.raises(ValueError, match="block_size"):
        block_hashes([1], 0)
