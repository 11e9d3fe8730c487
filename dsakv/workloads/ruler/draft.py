"""An item whose haystack is still to be sized, and the search for its size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Draft:
    """One generated item; ``prompt(n)`` writes it with a haystack of ``n`` units (sentences or words).

    ``prompt`` gives the same text for the same ``n``, and grows with it.
    """

    prompt: Callable[[int], str]
    answer_prefix: str
    answers: tuple[str, ...]
    smallest: int
    """Fewest units that make a valid item."""
    largest: int | None = None
    """Most units that there are; None without end."""


def largest_fit(size: Callable[[int], int], budget: int, smallest: int, largest: int | None = None) -> int | None:
    """The largest ``n`` in ``smallest..largest`` with ``size(n) <= budget``; None where even the smallest is too large.

    ``size`` grows with ``n``, about linearly: the next guess is read off the line through the ends of the bracket,
    and every third is its middle, so few sizes are measured even of a long prompt.
    """
    low, low_size = smallest, size(smallest)
    if low_size > budget:
        return None
    step = 8
    while True:  # find an n that is too large
        high = low + step if largest is None else min(low + step, largest)
        if high == low:
            return low
        high_size = size(high)
        if high_size > budget:
            break
        slope = max(high_size - low_size, 1) / (high - low)
        step = max(2 * step, int((budget - high_size) / slope * 1.01) + 2)
        low, low_size = high, high_size
    turn = 0
    while high - low > 1:
        turn += 1
        share = 0.5 if turn % 3 == 0 else (budget - low_size) / (high_size - low_size)
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        middle_size = size(middle)
        if middle_size <= budget:
            low, low_size = middle, middle_size
        else:
            high, high_size = middle, middle_size
    return low
