"""The same work on many things, in threads, with results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")

AHEAD = 256
"""Tasks that are begun before the first of them is asked for: a consumer that pauses does not hold the threads up."""


def in_order(tasks: Iterable[_Task], work: Callable[[_Task], _Result], workers: int) -> Iterator[tuple[_Task, _Result]]:
    """Each task with what ``work`` makes of it, in the order of ``tasks``.

    An exception of ``work`` comes out at its task. However the iteration ends, no work goes on behind it.
    """
    todo = iter(tasks)
    with ThreadPoolExecutor(workers) as pool:
        running: deque[tuple[_Task, Future[_Result]]] = deque()
        try:
            running.extend((task, pool.submit(work, task)) for task in islice(todo, AHEAD))
            while running:
                task, future = running.popleft()
                result = future.result()
                running.extend((following, pool.submit(work, following)) for following in islice(todo, 1))
                yield task, result
        finally:
            pool.shutdown(cancel_futures=True)
