"""Compile a loop over arrays to machine code."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
T = TypeVar("T")


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Compile ``function`` on its first call, for the types of its arguments; the code is kept on disk.

    It may use numbers, arrays, tuples of them and other compiled functions. Arithmetic is that of IEEE 754, in the
    order in which it stands; indices are not checked.
    """
    return cast("Callable[P, T]", numba.njit(cache=True, nogil=True)(function))
