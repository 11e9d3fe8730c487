"""How rotary position embedding is stretched for contexts longer than the original: constants. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (Peng et al., 2023, https://arxiv.org/abs/2309.00071)."""

    factor: float
    original_max_seq_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    rope_scale: float = 1.0
    """Factor on cosine and sine (the paper's attention factor)."""
    softmax_scale: float = 1.0
    """Factor on the attention logits."""


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's: dimensions that turn fewer than ``low_freq_factor`` times within the original context are slowed
    down by ``factor``, those that turn more than ``high_freq_factor`` times are kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int


def mscale(factor: float, weight: float) -> float:
    """YaRN's temperature ``0.1 * weight * ln(factor) + 1`` (section 3.4), 1 where nothing is extended."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
