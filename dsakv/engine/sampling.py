"""The next token from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from dsakv.errors import DsakvError


def sample(logits: Tensor, temperature: float, generators: list[torch.Generator], top_p: float = 1.0) -> list[int]:
    """One token a row of ``logits`` ``[n, vocab]``; temperature 0 takes the highest, the lowest id among equals.

    ``top_p`` draws from the fewest likeliest tokens that have together at least this probability (nucleus sampling,
    Holtzman et al., 2019, https://arxiv.org/abs/1904.09751). Each row draws from its own generator, so that a
    sequence's tokens do not depend on the batch. Raises DsakvError for logits that are not finite.
    """
    if not logits.isfinite().all():
        raise DsakvError(
            "the model's logits are not finite", "try --dtype float32; if that does not help, the weights are damaged"
        )
    if temperature == 0:
        return _ints(logits.argmax(-1))
    # The largest logit becomes 0 first, in double: dividing by a tiny temperature can then overflow downwards only.
    probabilities = ((logits - logits.amax(-1, keepdim=True)).double() / temperature).softmax(-1)
    if top_p < 1:
        probabilities = _nucleus(probabilities, top_p)
    draws = [torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, generators, strict=True)]
    return _ints(torch.cat(draws))


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """``probabilities`` ``[n, vocab]`` with zeros behind the nucleus; they need not add up to 1."""
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # of all likelier tokens
    return torch.zeros_like(probabilities).scatter_(-1, ids, ordered.masked_fill(before >= top_p, 0))


def _ints(tokens: Tensor) -> list[int]:
    return [int(token) for token in tokens.tolist()]
