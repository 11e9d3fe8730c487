"""From measured batches to a link."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dsakv.analysis.links import Floats, Link

_OP_SHARE = 0.9
"""Of a block's time at any size, what may at most be told to be independent of its size."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One measured kind of batch."""

    block_bytes: int
    blocks: int
    us: float
    """Median."""


def fit_link(batches: Sequence[Batch]) -> Link:
    """The link that comes nearest to ``batches``: the sum of squared relative errors is least, no term negative.

    Unknown are ``batch_us`` and the time of a block at each measured size; with one batch size a block size they
    could not be told apart. The part of a block's time that does not grow with its size is then fitted likewise, so
    that sizes between and beyond the measured ones get their share of it.

    Raises:
        ValueError: no batch, or one that takes no time.
    """
    if not batches or min(batch.us for batch in batches) <= 0:
        raise ValueError("batches that take time are needed")
    sizes = sorted({batch.block_bytes for batch in batches})
    costs = np.zeros((len(batches), 1 + len(sizes)))
    costs[:, 0] = 1
    for row, batch in enumerate(batches):
        costs[row, 1 + sizes.index(batch.block_bytes)] = batch.blocks
    batch_us, *times = _least_relative(costs, np.array([batch.us for batch in batches]))
    block_us = np.maximum(times, 1e-6)  # a size whose batches cost the same, however many blocks they have
    by_size = np.stack([np.ones(len(sizes)), np.array(sizes, dtype=np.float64)], axis=1)
    op_us = min(float(_least_relative(by_size, block_us)[0]), _OP_SHARE * float(block_us.min()))
    gb_s = [float(size / (time - op_us) / 1e3) for size, time in zip(sizes, block_us.tolist(), strict=True)]
    return Link(float(batch_us), ((sizes[0], op_us),), tuple(zip(sizes, gb_s, strict=True)))


def errors(link: Link, batches: Sequence[Batch]) -> Floats:
    """Of what ``link`` says of each batch: predicted over measured, less 1."""
    told = [float(link.batches_us(np.array([batch.blocks]), batch.block_bytes)[0]) for batch in batches]
    ratios: Floats = np.array(told) / np.array([batch.us for batch in batches]) - 1
    return ratios


def _least_relative(costs: Floats, measured: Floats) -> Floats:
    """x >= 0 with the least sum of ``(costs @ x / measured - 1)^2``."""
    scaled = costs / measured[:, None]
    weight = np.maximum(np.abs(scaled).max(axis=0), 1e-300)  # columns differ by many powers of ten
    found: Floats = _not_negative(scaled / weight, np.ones(len(measured))) / weight
    return found


def _not_negative(a: Floats, b: Floats) -> Floats:
    """Least squares with x >= 0: the active-set method of Lawson and Hanson, "Solving Least Squares Problems" (1974),
    chapter 23.
    """
    n = a.shape[1]
    x = np.zeros(n)
    passive = np.zeros(n, dtype=np.bool_)
    for _ in range(10 * n):
        slope = a.T @ (b - a @ x)
        if passive.all() or slope[~passive].max() <= 1e-10:
            break
        passive[np.argmax(np.where(passive, -np.inf, slope))] = True
        while True:
            found = np.zeros(n)
            found[passive] = np.linalg.lstsq(a[:, passive], b, rcond=None)[0]
            if not passive.any() or found[passive].min() > 0:
                break
            blocking = passive & (found <= 0)
            step = float((x[blocking] / (x[blocking] - found[blocking])).min())
            x += step * (found - x)
            passive &= x > 1e-12
        x = found
    return x
