"""The next token from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from dsakv.errors import DsakvError


def sample(logits: Tensor, temperature: float, generators: list[torch.Generator]) -> list[int]:
    """One token a row of ``logits`` ``[n, vocab]``; temperature 0 takes the highest, the lowest id among equals.

    Each row draws from its own generator, so that a sequence's tokens do not depend on the batch. Raises DsakvError
    for logits that are not finite.
    """
    if not logits.isfinite().all():
        raise DsakvError(
            "the model's logits are not finite", "try --dtype float32; if that does not help, the weights are damaged"
        )
    if temperature == 0:
        return _ints(logits.argmax(-1))
    # The largest logit becomes 0 first, in double: dividing by a tiny temperature can then overflow downwards only.
    probabilities = ((logits - logits.amax(-1, keepdim=True)).double() / temperature).softmax(-1)
    draws = [torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, generators, strict=True)]
    return _ints(torch.cat(draws))


def _ints(tokens: Tensor) -> list[int]:
    return [int(token) for token in tokens.tolist()]
