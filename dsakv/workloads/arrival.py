"""When requests reach the server: the times of a trace, or a made-up process.

The made-up ones are those that serving benchmarks such as vLLM's offer: gaps between arrivals are drawn independently,
with mean ``1 / rate``. ``constant``: every gap is the mean. ``poisson``: exponential gaps, arrivals that know nothing
of each other. ``gamma``: gamma gaps of shape ``burstiness`` and scale ``1 / (rate * burstiness)``, whose coefficient
of variation is ``1 / sqrt(burstiness)``; shape 1 is ``poisson``, smaller ones come in bursts, larger ones are even.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dsakv.config import ServingConfig
from dsakv.errors import InputError
from dsakv.request import Request

LATEST = 1e9
"""Seconds: some thirty years, up to which a clock tells microseconds apart."""
RATED = ("poisson", "gamma", "constant")
"""Processes that are made up from a rate."""


def arrange(requests: Sequence[Request], config: ServingConfig, seed: int) -> list[Request]:
    """The requests with ``arrival_s`` set, in the order of arrival (stable), numbered anew from 0.

    Raises InputError where the process lacks what it needs (times of all requests, a rate), where an option would do
    nothing, and where a time is negative or beyond ``LATEST``.
    """
    if not requests:
        return []
    process = _resolve(requests, config)
    _check_options(process, config)
    if process in RATED:
        times = _draw(process, len(requests), config, seed)
    elif process == "trace":
        times = np.array([request.arrival_s for request in requests], np.float64) * config.time_scale
    else:
        times = np.zeros(len(requests))
    if not ((times >= 0) & (times <= LATEST)).all():  # neither is a time that is no number
        raise InputError(
            f"an arrival time is negative, or more than {LATEST:.0e} s after the first",
            "check the times of the workload, --time-scale, --request-rate and --burstiness",
        )
    order = np.argsort(times, kind="stable").tolist()
    return [replace(requests[i], request_id=new, arrival_s=float(times[i])) for new, i in enumerate(order)]


def check_arrival(config: ServingConfig) -> None:
    """Raise InputError for options at odds, as far as they can be judged without the requests."""
    _check_options("trace" if config.arrival == "auto" else config.arrival, config)


def _resolve(requests: Sequence[Request], config: ServingConfig) -> str:
    """The process; for ``auto`` that of the workload."""
    if config.arrival not in ("auto", "trace"):
        return config.arrival
    timed = sum(request.arrival_s is not None for request in requests)
    if timed < len(requests) and (timed or config.arrival == "trace"):
        untimed = next(request for request in requests if request.arrival_s is None)
        name = untimed.source_id or f"request {untimed.request_id}"
        raise InputError(
            f"{len(requests) - timed} of {len(requests)} requests have no arrival time, the first of them {name}",
            "give every request a time, or name another process with --arrival (all-at-once, poisson, ...)",
        )
    return "trace" if timed else "all-at-once"


def _check_options(process: str, config: ServingConfig) -> None:
    if process in RATED and not config.request_rate:
        raise InputError(f"--arrival {process} needs a rate", "add --request-rate N, in requests a second")
    name = process if process == config.arrival else f"{config.arrival} ({process} for this workload)"
    idle = (
        ("--request-rate", config.request_rate != 0 and process not in RATED, "--arrival poisson, gamma or constant"),
        ("--burstiness", config.burstiness != 1 and process != "gamma", "--arrival gamma"),
        ("--time-scale", config.time_scale != 1 and process != "trace", "--arrival trace"),
    )
    for flag, does_nothing, instead in idle:
        if does_nothing:
            raise InputError(f"{flag} does nothing with --arrival {name}", f"leave it out, or use {instead}")


def _draw(process: str, count: int, config: ServingConfig, seed: int) -> NDArray[np.float64]:
    """Seconds of ``count`` (at least 1) arrivals, ascending, the first at 0."""
    rng = np.random.default_rng(seed)
    gaps = count - 1
    with np.errstate(over="ignore", divide="ignore"):
        mean = np.float64(1) / np.float64(config.request_rate)
        if process == "constant":
            drawn = np.full(gaps, mean)
        elif process == "poisson":
            drawn = rng.exponential(mean, gaps)
        else:
            drawn = rng.gamma(config.burstiness, mean / config.burstiness, gaps)
        return np.concatenate([[0.0], np.cumsum(drawn)])
