"""Drawing the next token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsakv.engine.sampling import sample


def draws(logits: list[float], top_p: float, n: int = 400) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.tensor(logits).expand(n, -1)
    return sample(rows, 1.0, [generator] * n, top_p)


@given(
    st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=12),
    st.floats(0.05, 0.999),
)
def test_only_the_nucleus_is_drawn_from(logits: list[float], top_p: float) -> None:
    shares = torch.tensor(logits).double().softmax(-1).tolist()
    ranked = sorted(range(len(shares)), key=lambda token: (-shares[token], token))
    nucleus, total = set(), 0.0
    for token in ranked:
        if total >= top_p - 1e-9:
            break
        nucleus.add(token)
        total += shares[token]
    assert set(draws(logits, top_p, 50)) <= nucleus


def test_all_of_the_nucleus_is_drawn_in_its_proportions() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    found = draws(logits, 0.8, 4000)
    counts = [found.count(token) for token in range(4)]
    assert counts[2] == counts[3] == 0
    assert counts[0] / counts[1] == pytest.approx(5 / 3, rel=0.15)


def test_all_is_what_it_was_without() -> None:
    logits = torch.randn(8, 30, generator=torch.Generator().manual_seed(0))
    one, other = ([torch.Generator().manual_seed(i) for i in range(8)] for _ in range(2))
    assert sample(logits, 0.7, one) == sample(logits, 0.7, other, 1.0)
