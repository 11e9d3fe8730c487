"""Several ranks for one command: how many there are, who starts them, and what is said when one dies.

A command is started in one of three ways. Alone it runs in its own process. Asked for several ranks it starts them
through ``torch.distributed.run``'s launcher, waits, and passes on how rank 0 ended. Started by torchrun or by Slurm's
srun it is one of the ranks already. No torch is imported before ranks are started.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from dsakv.config import Config, ModelConfig
from dsakv.console import Console
from dsakv.errors import PEER_LOST, DsakvError, InputError
from dsakv.layout import converted_ranks
from dsakv.models.shapes import check_ranks_of, read_config, shape_of

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

LAST_LINES = 5
"""Lines of a dead rank's log that are shown."""


class Place(NamedTuple):
    """Where a process stands among the ranks, and where they meet."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int


def find_place(environ: Mapping[str, str]) -> Place | None:
    """This process's place, where torchrun or a Slurm step of several tasks has started it; None elsewhere.

    Raises InputError for variables that do not go together.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in names if name not in environ]:
            raise InputError(f"RANK is set, but not {missing[0]}", "start the ranks with torchrun, or unset RANK")
        numbers = [_number(environ, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")]
        return _sensible(Place(numbers[0], numbers[1], numbers[2], environ["MASTER_ADDR"], numbers[3]))
    # Not SLURM_NTASKS: it is also set in a batch script, whose commands are one process each.
    if "SLURM_PROCID" in environ and _number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
        address = environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", ""))
        job = _number(environ, "SLURM_JOB_ID", 0)
        port = _number(environ, "MASTER_PORT", 20000 + job % 20000)  # the same for all tasks, another for other jobs
        size, local = _number(environ, "SLURM_STEP_NUM_TASKS"), _number(environ, "SLURM_LOCALID", 0)
        return _sensible(Place(_number(environ, "SLURM_PROCID"), size, local, address, port))
    return None


def _sensible(place: Place) -> Place:
    """The same, unless nobody could stand there."""
    rank, size, _, address, port = place
    if not (rank < size and 0 < port < 1 << 16 and re.fullmatch(r"[\w.:-]+", address)):
        raise InputError(
            f"rank {rank} of {size} that meet at {address}:{port} makes no sense",
            "start the ranks with torchrun or srun, which set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT",
        )
    return place


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: ``gpu[03-05,9],login`` begins with ``gpu03``."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?", nodes)
    if match is None:
        raise InputError("Slurm does not say which nodes the step has", "set MASTER_ADDR to the first one's name")
    return match[1] + (match[2] or "")


def ranks_to_start(config: Config, environ: Mapping[str, str]) -> int:
    """How many ranks this process has to start; 1 where it runs alone or is one of them.

    Raises InputError where the configuration asks for another number than there are, or than can be.
    """
    launch = config.launch
    made_for = _converted_for(config.model.ckpt_path)
    wanted = launch.model_parallel or made_for or 1
    place = find_place(environ)
    if place is not None:
        if launch.nnodes > 1:
            raise InputError("--nnodes, but the ranks are started already", "leave it to torchrun or srun")
        if launch.model_parallel not in (0, place.size):
            raise InputError(
                f"--model-parallel {launch.model_parallel}, but {place.size} ranks were started",
                "leave it out: torchrun or srun says how many there are",
            )
        return 1
    endpoint = launch.rdzv_endpoint or ""
    if launch.nnodes > 1 and not re.fullmatch(r".+:\d+", endpoint):
        raise InputError(
            f"--nnodes {launch.nnodes}, but --rdzv-endpoint is {endpoint or 'not given'}",
            "give all machines the same HOST:PORT, a free port of the one with --node-rank 0",
        )
    if launch.node_rank >= launch.nnodes:
        raise InputError(
            f"--node-rank {launch.node_rank}, but --nnodes {launch.nnodes}", "machines are numbered from 0 on"
        )
    if made_for not in (None, wanted):
        raise InputError(
            f"{config.model.ckpt_path} was converted for {made_for} ranks, --model-parallel is {wanted}",
            "leave it out, or convert the checkpoint for as many",
        )
    if wanted % launch.nnodes:
        raise InputError(
            f"--model-parallel {wanted} does not divide among {launch.nnodes} machines", "give a multiple of them"
        )
    if wanted > 1:
        _check_shared(config.model, wanted)
    return wanted


def _check_shared(model: ModelConfig, n_ranks: int) -> None:
    """Raise InputError for a model that cannot be shared, as far as that is seen without starting a process."""
    if model.ckpt_path is None:
        if model.name != "tiny-random":
            raise InputError(f"the model {model.name} runs on one rank", "leave --model-parallel out; MP counts too")
        return
    path = Path(os.path.expanduser(model.ckpt_path)) / "config.json"
    if path.is_file() and model.config is None:
        check_ranks_of(shape_of(read_config(path), str(path)), n_ranks, str(path))


def start_ranks(job: str, config: Config, n_ranks: int) -> int:
    """Run ``job`` on ``n_ranks`` ranks, those of them that belong on this machine; returns the exit code.

    Rank 0 has this process's terminal, the others write into logs. Raises DsakvError where a rank dies for a reason
    that it could not say on this terminal: with its number, the place of its log and the log's last lines.
    """
    launch = config.launch
    console, local = Console(), n_ranks // launch.nnodes
    others = f", waiting for the other machines at {launch.rdzv_endpoint}" if launch.nnodes > 1 else ""
    console.info(f"starting {local} rank{'s' if local > 1 else ''}{others} ...")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of every socket that another rank closes first
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig as Settings
    from torch.distributed.launcher.api import elastic_launch

    alone = launch.nnodes == 1
    logs = Path(tempfile.mkdtemp(prefix="dsakv-ranks-"))
    first = 0 if launch.node_rank == 0 else -1  # the local rank that has the terminal
    settings = Settings(
        min_nodes=launch.nnodes,
        max_nodes=launch.nnodes,
        nproc_per_node=local,
        run_id="dsakv",
        role="rank",
        rdzv_backend="c10d" if alone else "static",
        rdzv_endpoint="127.0.0.1:0" if alone else str(launch.rdzv_endpoint),
        rdzv_configs={} if alone else {"rank": launch.node_rank},
        local_addr="127.0.0.1" if alone else None,
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(
            log_dir=str(logs), redirects={rank: Std.NONE if rank == first else Std.ALL for rank in range(local)}
        ),
    )
    document = logs / "config.json"
    document.write_bytes(msgspec.json.encode(config))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // local)))
    logging.disable(logging.CRITICAL)  # the launcher's own account: which signals it sends to whom
    try:
        elastic_launch(settings, sys.executable)("-m", "dsakv.worker", job, str(document))
    except ChildFailedError as error:
        return _explain(error.failures, first, logs, console)
    except SignalException as error:
        shutil.rmtree(logs, ignore_errors=True)
        return 128 + int(error.sigval)
    except DistError as error:
        shutil.rmtree(logs, ignore_errors=True)
        raise DsakvError(
            f"the machines do not meet at {settings.rdzv_endpoint}: {error}",
            "start the command on every machine, with the name and a free port of the one with --node-rank 0",
        ) from error
    finally:
        logging.disable(logging.NOTSET)
        document.unlink(missing_ok=True)  # a rank's log may stay; what it was started with may hold a password
    shutil.rmtree(logs, ignore_errors=True)
    return 0


def _explain(failures: Mapping[int, ProcessFailure], first: int, logs: Path, console: Console) -> int:
    """The exit code that rank 0 ended with after saying why, or a DsakvError that tells of the rank that died."""
    ended = (PEER_LOST, -signal.SIGTERM, -signal.SIGINT)  # because of others
    rank, failure = min(failures.items(), key=lambda item: (item[1].exitcode in ended, item[1].timestamp, item[0]))
    if failure.local_rank == first or failure.exitcode == PEER_LOST:
        shutil.rmtree(logs, ignore_errors=True)
    if failure.local_rank == first and failure.exitcode > 0 and failure.exitcode != PEER_LOST:
        return failure.exitcode
    if failure.exitcode == PEER_LOST:
        raise DsakvError("a rank is gone, and none of this machine's", "the command on its own machine says why")
    how = f"exit code {failure.exitcode}" if failure.exitcode > 0 else f"signal {failure.signal_name()}"
    if failure.local_rank == first:
        raise DsakvError(f"rank {rank} died: {how}", "where memory ran out, use more ranks or shorter prompts")
    log = next(logs.glob(f"**/{failure.local_rank}/stderr.log"), logs)
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    if lines:
        console.info(f"rank {rank} said last:")
    for line in lines[-LAST_LINES:]:
        console.info(f"  {line}")
    raise DsakvError(f"rank {rank} died: {how}", f"its log is {log}")


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise InputError(f"{name} is {text!r}, not a number", "start the ranks with torchrun or srun, which set it")
    return int(text)


def _converted_for(ckpt_path: str | None) -> int | None:
    """How many ranks a checkpoint was converted for; None for one that is in Hugging Face's layout."""
    return None if ckpt_path is None else converted_ranks(Path(os.path.expanduser(ckpt_path)))
