"""Compile a loop over arrays to machine code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
T = TypeVar("T")

_IN_PLACE: dict[str, Any] = {"_nrt": False, "forceinline": True}


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Compile ``function`` on its first call, for the types of its arguments; the code is kept on disk.

    It may use numbers, arrays, tuples of them and other compiled functions. Arithmetic is that of IEEE 754, in the
    order in which it stands; indices are not checked.
    """
    return cast("Callable[P, T]", numba.njit(cache=True, nogil=True)(function))


def compiled_in_place(function: Callable[P, T]) -> Callable[P, T]:
    """:func:`compiled`, for one that makes no arrays, and calls no function but of its kind.

    Its code becomes part of its callers', and arrays need not be reference-counted, which takes longer than what a
    function does with a byte.
    """
    return cast("Callable[P, T]", numba.njit(cache=True, nogil=True, **_IN_PLACE)(function))
