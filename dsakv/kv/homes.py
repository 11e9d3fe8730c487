"""Where blocks live behind the device: in an arena of host memory, in a remote pool, or one before the other."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsakv.errors import DsakvError
from dsakv.kv.tiers.contract import RemotePool
from dsakv.policies.base import Ints
from dsakv.policies.placement import LOCAL, REMOTE


class HostArena:
    """``slots`` blocks in host memory, in one allocation; pinned where a CUDA device copies from it.

    Raises DsakvError where there is no room for them.
    """

    def __init__(
        self, slots: int, block_numbers: int, dtype: torch.dtype, *, pin: bool, hint: str = "free some memory"
    ) -> None:
        try:
            self.blocks = torch.empty(slots, block_numbers, dtype=dtype, pin_memory=pin)
        except (RuntimeError, MemoryError) as error:
            size = slots * block_numbers * dtype.itemsize
            raise DsakvError(f"no host memory for a KV pool of {size / 1e9:.1f} GB", hint) from error


class Home:
    """Blocks by number; content is in host memory, ``[n, block_numbers]``."""

    def __init__(
        self, arena: HostArena | None, remote: RemotePool | None, n_numbers: int, block_numbers: int, dtype: torch.dtype
    ) -> None:
        """With ``remote`` the ``arena``, if there is one, holds copies of what was read there."""
        self.arena, self.remote = arena, remote
        self.tier = LOCAL if remote is None else REMOTE
        self.copy: Ints = np.full(n_numbers if remote is not None else 0, -1, dtype=np.int64)
        """The slot of the host's copy of each block, -1 where it has none."""
        self._free = list(range(len(arena.blocks))) if arena and remote else []
        self._bytes = block_numbers * dtype.itemsize

    def held(self, numbers: Ints) -> NDArray[np.uint8]:
        """The nearest tier that holds each of these blocks."""
        if self.remote is None:
            return np.full(len(numbers), LOCAL, dtype=np.uint8)
        return np.where(self.copy[numbers] >= 0, LOCAL, REMOTE).astype(np.uint8)

    def read_local(self, numbers: Ints, out: Tensor) -> None:
        """Blocks that host memory holds."""
        assert self.arena is not None
        slots = numbers if self.remote is None else self.copy[numbers]
        torch.index_select(self.arena.blocks, 0, torch.from_numpy(slots), out=out)

    def read_remote(self, numbers: Ints, out: Tensor) -> None:
        """Blocks of the remote pool."""
        assert self.remote is not None
        self.remote.get(numbers, _bytes(out))

    def write(self, numbers: Ints, content: Tensor) -> None:
        """Bring blocks home."""
        if self.remote is not None:
            self.remote.put(numbers, _bytes(content))
        else:
            assert self.arena is not None
            self.arena.blocks.index_copy_(0, torch.from_numpy(numbers), content)

    def keep(self, numbers: Ints, content: Tensor) -> None:
        """Keep copies of these blocks in host memory, where enough slots are free."""
        assert self.arena is not None
        slots = np.array([self._free.pop() for _ in range(len(numbers))], dtype=np.int64)
        self.copy[numbers] = slots
        self.arena.blocks.index_copy_(0, torch.from_numpy(slots), content)

    def let_go(self, numbers: Ints) -> None:
        """Give up the host's copies of those blocks of a remote pool that have one."""
        if self.remote is None:
            return
        held = numbers[self.copy[numbers] >= 0]
        self._free += self.copy[held].tolist()
        self.copy[held] = -1

    @property
    def retries(self) -> int:
        """Operations that a remote pool had to try again so far."""
        return 0 if self.remote is None else self.remote.counted.retries

    def close(self) -> None:
        if self.remote is not None:
            self.remote.close()


def _bytes(content: Tensor) -> NDArray[np.uint8]:
    """The bytes of ``content`` ``[n, block_numbers]``, which they share."""
    array: NDArray[np.uint8] = content.view(torch.uint8).numpy()
    return array
