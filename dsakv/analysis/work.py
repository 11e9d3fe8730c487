"""Parts of a trace, counted side by side: in this process, in several, or on the machines of a Dask cluster.

Figures add up in any order, so that who counts what, and when, changes nothing. A part whose worker dies is counted
again by another one.
"""

from __future__ import annotations

import ctypes
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context
from urllib.parse import urlsplit

from dsakv.analysis.part import PartFigures, Task, analyze_part
from dsakv.errors import DsakvError
from dsakv.trace.units import Unit

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_ANSWER_SECONDS = 10
_ATTEMPTS = 3
"""Times that workers may die before a part is given up."""


def count_parts(
    units: Sequence[Unit], task: Task, workers: int, scheduler: str | None, advance: Callable[[int], None]
) -> Iterator[PartFigures]:
    """The figures of each unit, in the order of the trace.

    Raises:
        InputError: a bad record, where the configuration is strict.
        DsakvError: a file that cannot be read, workers that keep dying, a scheduler that does not answer.
    """
    if scheduler is not None:
        yield from _on_cluster(units, task, scheduler, advance)
    elif min(workers, len(units)) == 1:
        for unit in units:
            yield analyze_part([unit], task, advance)
    else:
        yield from _in_processes(units, task, min(workers, len(units)), advance)


def _count(unit: Unit, task: Task) -> PartFigures:
    return analyze_part([unit], task, lambda done: None)


def _same(task: Task) -> Task:
    return task


def _in_processes(
    units: Sequence[Unit], task: Task, workers: int, advance: Callable[[int], None]
) -> Iterator[PartFigures]:
    done = deaths = 0
    while done < len(units):
        with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker) as pool:
            todo = iter(units[done:])
            # A few ahead keep the workers busy; with all of them, figures would pile up here.
            with _deaf_to_interrupts():
                waiting = deque(pool.submit(_count, unit, task) for unit in islice(todo, 2 * workers))
            try:
                while waiting:
                    part = waiting.popleft().result()
                    waiting += [pool.submit(_count, unit, task) for unit in islice(todo, 1)]
                    advance(units[done].bytes)
                    done, deaths = done + 1, 0
                    yield part
            except BrokenProcessPool as error:  # nobody can tell which part was to blame: all that wait start again
                deaths += 1
                if deaths == _ATTEMPTS:
                    raise DsakvError(
                        f"worker processes were killed {deaths} times in a row, most likely for lack of memory",
                        "try again with fewer --workers",
                    ) from error
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes that start meanwhile say nothing to Ctrl-C before :func:`_start_worker` has run in them."""
    if threading.current_thread() is not threading.main_thread():  # only there can signals be set
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker at once and without a traceback
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)  # and so does the end of who started it, by any cause


def _on_cluster(
    units: Sequence[Unit], task: Task, scheduler: str, advance: Callable[[int], None]
) -> Iterator[PartFigures]:
    from distributed import Client
    from distributed.client import FutureCancelledError
    from distributed.scheduler import KilledWorker

    try:
        _knock(scheduler)  # a client that does not find its scheduler goes on trying behind the scenes
        client = Client(scheduler, timeout=_ANSWER_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise DsakvError(
            f"no Dask scheduler answers at {scheduler}: {' '.join(str(error).split())}",
            "start one with dask scheduler, and workers with dask worker, or count here with --workers",
        ) from error
    with client:
        if not client.scheduler_info()["workers"]:
            raise DsakvError(
                f"the Dask scheduler at {scheduler} has no workers", f"start some: dask worker {scheduler}"
            )
        shared = client.submit(_same, task, pure=False)  # sent once a machine, and anew where a worker dies with it
        futures = [client.submit(_count, unit, shared, pure=False, retries=_ATTEMPTS) for unit in units]
        for unit, future in zip(units, futures, strict=True):
            try:
                part = future.result()
            except (KilledWorker, FutureCancelledError) as error:
                raise DsakvError(
                    f"Dask workers died over {unit.path}: {error}", "give them more memory, or look into their logs"
                ) from error
            future.release()
            advance(unit.bytes)
            yield part


def _knock(scheduler: str) -> None:
    """Raise OSError or ValueError where nothing listens at ``tcp://host:port``."""
    address = urlsplit(scheduler)
    if address.scheme not in ("tcp", "tls") or address.hostname is None or address.port is None:
        raise ValueError("an address looks like tcp://host:8786")
    socket.create_connection((address.hostname, address.port), _ANSWER_SECONDS).close()
