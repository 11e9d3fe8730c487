"""What the engine asks of whoever keeps the model's weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from dsakv.request import WeightTraffic


class Weights(Protocol):
    """Puts weights in place for as long as a context lasts.

    A pass asks for the embedding, then for the two halves of each layer in order, then for the head where it said that
    it would; the next pass begins again. That order may be relied upon: it is what lets weights be read ahead.
    """

    @property
    def streamed(self) -> bool:
        """Whether some have to be brought in for each pass: prompts then go through the layers as a whole."""
        ...

    def embedding(self, *, head: bool) -> AbstractContextManager[None]:
        """Begin a pass; ``head``: whether it ends with logits."""
        ...

    def attention(self, layer_id: int) -> AbstractContextManager[None]: ...

    def feed_forward(self, layer_id: int) -> AbstractContextManager[None]: ...

    def head(self) -> AbstractContextManager[None]: ...

    def traffic(self) -> WeightTraffic | None:
        """What was moved since this was last asked; None where nothing ever is."""
        ...

    def close(self) -> None:
        """Nothing is asked for any more."""
        ...


class InPlace:
    """All weights, where they are used."""

    streamed = False

    def embedding(self, *, head: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def attention(self, layer_id: int) -> AbstractContextManager[None]:
        return nullcontext()

    def feed_forward(self, layer_id: int) -> AbstractContextManager[None]:
        return nullcontext()

    def head(self) -> AbstractContextManager[None]:
        return nullcontext()

    def traffic(self) -> WeightTraffic | None:
        return None

    def close(self) -> None: ...


IN_PLACE = InPlace()
