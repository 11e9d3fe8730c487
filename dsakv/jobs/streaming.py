"""What the configuration says of weights that do not fit."""

from __future__ import annotations

from typing import Literal

import torch

from dsakv.config import WeightsConfig
from dsakv.errors import InputError
from dsakv.settings import keys
from dsakv.sizes import parse_bytes
from dsakv.weights.direct import ALIGN
from dsakv.weights.options import StreamOptions

LARGEST_REQUEST = 1 << 30
"""Bytes."""


def check_weights(weights: WeightsConfig) -> None:
    """Raise InputError for sizes that are none, and for options that do nothing."""
    _budget(weights.host_budget, "--host-budget")
    _budget(weights.device_budget, "--device-budget")
    _request(weights.io_request)
    if weights.host_budget is None and weights.device_budget is None:
        given = [key for key in keys("weights") if getattr(weights, key.name) != key.default]
        if given:
            raise InputError(
                f"{given[0].flag} does nothing while all weights are loaded",
                "give --host-budget, such as 8GB (on CUDA --device-budget)",
            )
    elif weights.expert_policy != WeightsConfig().expert_policy and (
        weights.unit not in ("auto", "expert") or weights.residency == "none"
    ):
        raise InputError(
            f"--expert-policy {weights.expert_policy} does nothing where no experts are kept",
            "use --stream-unit expert without --residency none, or leave it out",
        )


def stream_options(weights: WeightsConfig, device: torch.device, *, has_experts: bool) -> StreamOptions | None:
    """How to stream weights; None where all are to be loaded.

    Raises InputError for budgets that the device does not have, and as :func:`check_weights` does.
    """
    host = _budget(weights.host_budget, "--host-budget")
    own = _budget(weights.device_budget, "--device-budget")
    if host is None and own is None:
        return None
    if device.type == "cpu" and own is not None:
        raise InputError("--device-budget, but the model runs on CPU", "give --host-budget: that is where it computes")
    if device.type == "cuda" and own is None:
        raise InputError(
            "--host-budget, but the device is to hold all weights", "give --device-budget, or run with --device cpu"
        )
    auto: Literal["layer", "expert"] = "expert" if has_experts else "layer"
    unit = auto if weights.unit == "auto" else weights.unit
    if weights.expert_policy != WeightsConfig().expert_policy and unit != "expert":
        raise InputError("--expert-policy, but the model has no routed experts", "leave it out")
    return StreamOptions(
        host_budget=host,
        device_budget=own,
        unit=unit,
        residency=weights.residency,
        expert_policy=weights.expert_policy,
        prefetch_depth=weights.prefetch_depth,
        io_request=_request(weights.io_request),
        io_threads=weights.io_threads,
    )


def _budget(text: str | None, flag: str) -> int | None:
    return None if text is None else _bytes(text, flag)


def _bytes(text: str, flag: str) -> int:
    n_bytes = parse_bytes(text)
    if n_bytes is None:
        raise InputError(f"{flag} {text!r} is no size", "give bytes with their unit, such as 8GB or 512MiB")
    return int(n_bytes)


def _request(text: str) -> int:
    n_bytes = _bytes(text, "--io-request")
    if not 0 < n_bytes <= LARGEST_REQUEST or n_bytes % ALIGN:
        raise InputError(
            f"--io-request {text} is not between 4KiB and 1GiB, or no multiple of 4KiB", "such as 4MiB or 16MiB"
        )
    return n_bytes
