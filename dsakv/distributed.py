"""The ranks that run one model together, and what they tell each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dsakv.errors import DsakvError

_T = TypeVar("_T")


class PeerLostError(DsakvError):
    """Another rank is gone, and with it this one's work. Which, and why, whoever started the ranks can say."""

    exit_code = 71


@dataclass(frozen=True)
class World:
    """``size`` processes, of which this is number ``rank``. One alone has nobody to talk to.

    Every method is a collective: all ranks call it, in the same order. Raises PeerLostError where a rank is gone.
    """

    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None
    """Carries what is no tensor of the model, on the host; ranks may wait there for as long as a user thinks."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x``, in place and the same bits on every rank."""
        if self.size > 1:
            with _peers():
                dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """All ranks' ``x`` ``[..., n]``, in their order: ``[..., size * n]``."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with _peers():
            dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's ``x``; those of others only say the shape and are written over."""
        if self.size > 1:
            x = x.contiguous()
            with _peers():
                dist.broadcast(x, src=0)
        return x

    def share(self, value: _T) -> _T:
        """Rank 0's ``value``, any Python object."""
        if self.size == 1:
            return value
        box = [value]
        with _peers():
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def collect(self, value: _T) -> list[_T]:
        """All ranks' values, on every rank."""
        if self.size == 1:
            return [value]
        boxes: list[_T] = [value] * self.size
        with _peers():
            dist.all_gather_object(boxes, value, group=self.control)
        return boxes


ALONE = World()


class _peers:  # noqa: N801 (reads as a statement)
    """Turns the backend's complaint about a rank that is gone into PeerLostError."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            raise PeerLostError(f"another rank is gone: {error}", "its own message says why") from error
