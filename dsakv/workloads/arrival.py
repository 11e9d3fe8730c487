"""When requests arrive."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from dsakv.config import ServingConfig
from dsakv.request import Request


def arrange(requests: Iterable[Request], config: ServingConfig, seed: int) -> list[Request]:
    """The requests in the order of their arrival, numbered from 0."""
    ordered = sorted(requests, key=lambda request: request.arrival_s or 0.0)
    return [replace(request, request_id=i) for i, request in enumerate(ordered)]
