"""A job on this process's rank: the first does the job, the others take part in what its engine runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import torch

from dsakv.config import Config
from dsakv.console import Console
from dsakv.distributed import ALONE, World, joined
from dsakv.engine.engine import dismiss
from dsakv.errors import DsakvError, InputError, PeerLostError
from dsakv.jobs.loaded import LoadedModel
from dsakv.jobs.model import choose_device, load_model
from dsakv.jobs.run import make_engine
from dsakv.launch import Place


def run_on_ranks(
    job: Callable[[World], object], config: Config, place: Place | None, *, ignore_eos: bool = False
) -> None:
    """Do ``job`` in this process, or take part in it where ``place`` is that of a rank behind the first.

    ``ignore_eos`` is what the job gives :func:`make_engine`. Raises what the job raises, and PeerLostError where
    another rank is gone.
    """
    if place is None or place.size == 1:
        job(ALONE)
        return
    device = choose_device(config.model.device)
    if device.type == "cuda":
        if place.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"rank {place.rank} has no CUDA device: this machine has {torch.cuda.device_count()}",
                "use fewer ranks, or more machines with --nnodes",
            )
        torch.cuda.set_device(place.local_rank)
    with joined(place.rank, place.size, place.address, place.port, device) as world:
        if world.rank == 0:
            job(world)
            dismiss(world)
        else:
            with closing(load_together(config, world)) as loaded:
                make_engine(config, loaded, world, record=False, ignore_eos=ignore_eos).follow()


def load_together(config: Config, world: World, console: Console | None = None) -> LoadedModel:
    """This rank's share of the model. Where one rank cannot load its own, rank 0 says why, and all end.

    Raises InputError and DsakvError as ``load_model`` does.
    """
    loaded, error = None, None
    try:
        loaded = load_model(config.model, world, console, config.weights)
    except DsakvError as raised:
        error = raised
    problems = world.collect(error)
    if error is not None and world.rank == 0:
        raise error
    for rank, problem in enumerate(problems):
        if problem is not None and world.rank > 0:
            raise PeerLostError("a rank cannot load the model", "rank 0 says why")
        if problem is not None:
            problem.message = f"rank {rank}: {problem.message}"
            raise problem
    assert loaded is not None
    return loaded
