"""Sets of block ids as batches."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from dsakv.policies import Steps


def sets(largest: int = 11, steps: int = 30) -> st.SearchStrategy[list[list[int]]]:
    """The sets of a cache's steps; small ones, large ones, empty ones."""
    some = st.one_of(
        st.sets(st.integers(0, largest), max_size=2),
        st.sets(st.integers(0, largest), max_size=largest + 1),
    )
    return st.lists(some.map(sorted), max_size=steps)


def batch(ids: list[list[int]], rows: list[int] | None = None) -> Steps:
    """Steps of cache 0, or of ``rows``."""
    return Steps.of(
        np.array([0] * len(ids) if rows is None else rows, dtype=np.int64),
        np.cumsum([0, *map(len, ids)]),
        np.array([block for part in ids for block in part], dtype=np.int64),
    )
