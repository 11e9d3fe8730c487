"""Count, extremes, mean and spread of a figure, exact enough to be merged from any number of parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class Distribution:
    """Running moments by the pairwise update of Chan, Golub and LeVeque, "Algorithms for computing the sample
    variance" (1983): no difference of large sums, so the spread of large, close values is not lost.
    """

    count: int = 0
    min: float = math.inf
    max: float = -math.inf
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared differences from the mean."""

    def add(self, values: NDArray[Any]) -> None:
        """Take in ``values`` [n]; the order in which arrays come is part of the result's last digits."""
        if len(values) == 0:
            return
        floats = values.astype(np.float64)
        mean = float(floats.mean())
        part = Distribution(
            len(floats), float(floats.min()), float(floats.max()), mean, float(np.square(floats - mean).sum())
        )
        self.merge(part)

    def merge(self, other: Distribution) -> None:
        """Take in what ``other`` has seen."""
        if other.count == 0:
            return
        count = self.count + other.count
        shift = other.mean - self.mean
        self.squares += other.squares + shift * shift * (self.count * other.count / count)
        self.mean += shift * (other.count / count)
        self.count = count
        self.min = min(self.min, other.min)
        self.max = max(self.max, other.max)

    def result(self) -> dict[str, Any]:
        """``{count,min,max,mean,std}``; ``std`` is the sample standard deviation (n-1; 0 for n=1). Null but ``count``
        when empty.
        """
        if self.count == 0:
            return {"count": 0, "min": None, "max": None, "mean": None, "std": None}
        # Rounding may carry a mean past the extremes.
        mean = min(max(self.mean, self.min), self.max)
        std = math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0
        return {"count": self.count, "min": self.min, "max": self.max, "mean": mean, "std": std}
