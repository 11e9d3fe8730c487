"""The ranks that run one model together, and what they tell each other."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dsakv.errors import DsakvError, PeerLostError

_T = TypeVar("_T")

FOR_EVER = timedelta(days=365)
"""How long a rank waits for what a user does next."""


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
            with _talking():
                dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """All ranks' ``x`` ``[..., n]``, in their order: ``[..., size * n]``."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with _talking():
            dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's ``x``; those of others only say the shape and are written over."""
        if self.size > 1:
            x = x.contiguous()
            with _talking():
                dist.broadcast(x, src=0)
        return x

    def share(self, value: _T) -> _T:
        """Rank 0's ``value``, any Python object."""
        if self.size == 1:
            return value
        box = [value]
        with _talking():
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def collect(self, value: _T) -> list[_T]:
        """All ranks' values, on every rank."""
        if self.size == 1:
            return [value]
        boxes: list[_T] = [value] * self.size
        with _talking():
            dist.all_gather_object(boxes, value, group=self.control)
        return boxes


ALONE = World()


@contextmanager
def joined(rank: int, size: int, address: str, port: int, device: torch.device) -> Iterator[World]:
    """The world of ``size`` ranks that meet at ``address:port``, as rank ``rank`` on ``device``, until the block ends.

    Tensors go over NCCL on CUDA and over gloo on the CPU. Raises DsakvError where the ranks cannot meet.
    """
    host = f"[{address}]" if ":" in address else address
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"tcp://{host}:{port}",
            rank=rank,
            world_size=size,
        )
        control = dist.new_group(backend="gloo", timeout=FOR_EVER)
    except (RuntimeError, ValueError) as error:
        raise DsakvError(
            f"rank {rank} of {size} cannot meet the others at {address}:{port}: {error}",
            "the address must be that of rank 0's machine, and reachable from all",
        ) from error
    try:
        yield World(rank, size, control)
    except BaseException:
        if rank == 0:  # the others end because of it, and their launcher must not cut off its last words
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if device.type == "cuda":  # NCCL's orderly end may wait for the others, and they for this rank
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()  # its threads would not survive the end of the interpreter


@contextmanager
def _talking() -> Iterator[None]:
    """Turns the backend's complaint about a rank that is gone into PeerLostError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PeerLostError(f"another rank is gone: {error}", "its own message says why") from error
