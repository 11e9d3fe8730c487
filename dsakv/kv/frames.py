"""The device's part of a tiered cache: frames of one block each, and what is in them.

Hot frames hold copies that a policy keeps. Each running sequence has an open frame a layer: the block that it is
filling, which no policy may evict. Staging frames hold for one layer's step what that needs beside; there are as many
as the cache has blocks, so that any step finds room: one layer's KV.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsakv.errors import DsakvError
from dsakv.policies.base import Ints
from dsakv.policies.placement import Scope


class Frames:
    """Frames ``[F, block_size * width]`` on ``device``. Blocks go by number: ``block * layers + layer``."""

    def __init__(
        self,
        *,
        n_layers: int,
        n_blocks: int,
        hot: int,
        scope: Scope,
        seats: int,
        block_numbers: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """``hot`` frames a layer, ``seats`` sequences at a time, ``block_numbers`` numbers in a block.

        Raises DsakvError where the device has no room for them.
        """
        self.device = device
        self.hot_count, self.seats = hot * n_layers, seats
        self._staging = self.hot_count + n_layers * seats
        count = self._staging + n_blocks
        try:
            self.data = torch.empty(count, block_numbers, dtype=dtype, device=device)
        except (RuntimeError, MemoryError) as error:
            size = count * block_numbers * dtype.itemsize
            raise DsakvError(
                f"no room on {device} for {size / 1e9:.1f} GB of KV: the hot tier, and one layer of all to stage",
                "lower --kv-hot-capacity, --batch-size or --kv-blocks, or shorten the prompts",
            ) from error
        self.hot: Ints = np.full(n_blocks * n_layers, -1, dtype=np.int64)
        """The hot frame of each block, -1 where it has none."""
        self.readable = torch.zeros(n_blocks * n_layers, dtype=torch.int64, device=device)
        """The frame that this layer's step reads a block in; only right for blocks that it has fetched."""
        shared = scope == "shared"
        self._free = [list(range(self.hot_count))] if shared else [
            list(range(layer * hot, (layer + 1) * hot)) for layer in range(n_layers)
        ]  # fmt: skip
        self._n_layers = n_layers
        self.staged = 0
        """Staging frames in use."""

    def first_open(self, layer: int) -> int:
        """The open frame of the sequence in seat 0; those of the others follow."""
        return self.hot_count + layer * self.seats

    def stage(self, count: int) -> Ints:
        """So many staging frames."""
        first = self._staging + self.staged
        self.staged += count
        return np.arange(first, first + count)

    def clear_staging(self, keep: int = 0) -> None:
        """Use staging frames anew, behind the first ``keep``."""
        self.staged = keep

    def heat(self, numbers: Ints) -> Ints:
        """Give blocks of one layer hot frames, of which enough are free."""
        if not len(numbers):
            return numbers
        free = self._free[0 if len(self._free) == 1 else int(numbers[0]) % self._n_layers]
        frames = np.array(free[len(free) - len(numbers) :], dtype=np.int64)
        del free[len(free) - len(numbers) :]
        self.hot[numbers] = frames
        return frames

    def cool(self, numbers: Ints) -> None:
        """Take hot frames back. What is in them stays until others get them."""
        for number, frame in zip(numbers.tolist(), self.hot[numbers].tolist(), strict=True):
            self._free[0 if len(self._free) == 1 else number % self._n_layers].append(frame)
        self.hot[numbers] = -1

    def point(self, numbers: Ints, frames: Ints) -> None:
        """Let this step read these blocks in these frames."""
        if len(numbers):
            self.readable.index_copy_(0, self._tensor(numbers), self._tensor(frames))

    def put(self, frames: Ints, content: Tensor) -> None:
        """Fill frames with ``content`` ``[n, block_numbers]``, from host or device."""
        self.data.index_copy_(0, self._tensor(frames), content.to(self.device, non_blocking=True))

    def take(self, frames: Ints) -> Tensor:
        """A copy of what is in frames, ``[n, block_numbers]`` on the device."""
        return self.data.index_select(0, self._tensor(frames))

    def _tensor(self, values: Ints) -> Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)
