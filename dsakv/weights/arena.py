"""One piece of host memory that all weights lie in and pass through."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from dsakv.errors import DsakvError
from dsakv.weights.direct import ALIGN, read_memory


class Arena:
    """``size`` bytes on pages of their own, pinned for a CUDA device; handed out from the beginning, and reused.

    One allocation: torch rounds each pinned one up to a power of two, and fresh memory is slow to read into.
    Raises DsakvError where there is not as much memory.
    """

    def __init__(self, size: int, *, pin: bool) -> None:
        self._taken = 0
        try:
            self._map = read_memory(max(size, ALIGN))
        except (OSError, ValueError, OverflowError) as error:
            raise DsakvError(
                f"no host memory for {size / 1e9:.1f} GB of weights", "lower the budget, or free some memory"
            ) from error
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)  # [size]
        self._pinned = pin and size > 0
        if self._pinned:
            _check(torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), self._bytes.numel(), 0))

    def take(self, size: int) -> Tensor:
        """The next ``size`` bytes ``[size]`` uint8; they begin at a page."""
        begin = self._taken
        self._taken += -(-size // ALIGN) * ALIGN
        assert self._taken <= self._bytes.numel(), "the plan asked for less"
        return self._bytes[begin : begin + size]

    def close(self) -> None:
        """Undo the pinning; the memory goes when its last tensor does."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
            self._pinned = False


def _check(code: object) -> None:
    """Raise DsakvError for a CUDA call that failed."""
    if int(code) != 0:  # type: ignore[call-overload]
        raise DsakvError(
            f"CUDA cannot pin host memory for weights (error {code})", "lower --host-budget, or raise ulimit -l"
        )
