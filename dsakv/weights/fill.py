"""From stored numbers to the numbers of a parameter."""

from __future__ import annotations

from torch import Tensor

from dsakv.kernels.reference import dequantize_into


def fill_tensor(value: Tensor, stored: Tensor, scale: Tensor | None, start: tuple[int, ...]) -> None:
    """Write ``stored`` to ``value``, which has its shape, in whatever dtype and place either has.

    ``scale`` (float32, one for each square of 128) multiplies float8 numbers, of which ``stored`` is the part that
    begins at ``start`` of the whole tensor.
    """
    # Where dtypes differ the narrower numbers travel, and the device of ``value`` converts them.
    moved = stored.to(value.device, non_blocking=True) if stored.dtype != value.dtype else stored
    if scale is None:
        value.copy_(moved, non_blocking=True)
    else:
        dequantize_into(value, moved, scale.to(value.device, non_blocking=True), start)
