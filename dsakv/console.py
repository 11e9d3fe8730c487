"""What a run says: data on stdout, log and progress on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console as Terminal
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

LINE_EVERY = 10.0
"""Seconds between two progress lines where stderr is no terminal."""
MB = 1_000_000
PLAIN_WIDTH = 120
"""Columns of a table where stdout is no terminal."""


class Console:
    """Where a run writes. ``stdout``, ``stderr`` and ``clock`` (seconds) are the process's own unless given."""

    def __init__(
        self,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stdout = stdout or sys.stdout
        self._stderr = stderr or sys.stderr
        self._clock = clock
        # Rich takes control codes off and folds at its own width; log lines stay whole.
        self._log = Terminal(file=self._stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def print_data(self, text: str, end: str = "\n") -> None:
        """Write ``text`` to stdout as it is, at once."""
        self._stdout.write(text + end)
        self._stdout.flush()

    def print_model_text(self, text: str) -> None:
        """Write what a model generated, without a line end; a terminal gets no character that would steer it."""
        if self._stdout.isatty():
            text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
        self.print_data(text, end="")

    def print_table(self, table: RenderableType) -> None:
        """Write a rich table, panel or other renderable to stdout."""
        self._render(table, self._stdout)

    def info_table(self, table: RenderableType) -> None:
        """Likewise to stderr, where stdout holds other data."""
        self._render(table, self._stderr)

    def _render(self, table: RenderableType, stream: TextIO) -> None:
        width = None if stream.isatty() else PLAIN_WIDTH
        Terminal(file=stream, width=width, highlight=False, markup=False, emoji=False).print(table)
        stream.flush()

    def info(self, text: str) -> None:
        self._log.print(text)

    def warn(self, text: str) -> None:
        self._log.print(f"warning: {text}")

    @contextmanager
    def progress(self, total: int | None, description: str, unit: str) -> Iterator[Callable[[int], None]]:
        """Show how far a piece of work is; the body calls what it gets with the number of ``unit`` just done.

        A bar with rate and time left on a terminal; elsewhere a line every ``LINE_EVERY`` seconds and one at the end.
        """
        if not self._log.is_terminal:
            lines = _Lines(self.info, self._clock, total, description, unit)
            yield lines.advance
            lines.finish()
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(unit),
            TimeRemainingColumn(),
        )
        # Data may go to the same terminal: rich must not take it over to stderr.
        with Progress(
            *columns, console=self._log, get_time=self._clock, redirect_stdout=False, redirect_stderr=False
        ) as bar:
            task = bar.add_task(description, total=total)
            yield lambda done: bar.advance(task, done)

    @contextmanager
    def megabytes(self, total: int | None, description: str) -> Iterator[Callable[[int], None]]:
        """:meth:`progress` for work that is counted in bytes; it is shown in megabytes."""
        done = 0
        with self.progress(None if total is None else _megabytes(total), description, "MB") as advance:

            def count(size: int) -> None:
                nonlocal done
                before, done = done, done + size
                advance(_megabytes(done) - _megabytes(before))

            yield count


def _megabytes(size: int) -> int:
    return -(-size // MB)


class _Rate(ProgressColumn):
    """Units done a second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {self._unit}/s")


class _Lines:
    """Progress as plain lines."""

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float], total: int | None, description: str, unit: str
    ) -> None:
        self._say = say
        self._clock = clock
        self._total = total
        self._description = description
        self._unit = unit
        self._done = 0
        self._said: int | None = None
        self._start = self._last = clock()

    def advance(self, done: int) -> None:
        self._done += done
        if self._clock() - self._last >= LINE_EVERY:
            self._line()

    def finish(self) -> None:
        if self._said != self._done:
            self._line()

    def _line(self) -> None:
        self._last, self._said = self._clock(), self._done
        elapsed = self._last - self._start
        whole = "" if self._total is None else f"/{self._total}"
        facts = [f"{elapsed:.0f} s"]
        if self._done and elapsed > 0:
            rate = self._done / elapsed
            facts.append(f"{rate:.1f} {self._unit}/s")
            if self._total is not None and self._done < self._total:
                facts.append(f"{(self._total - self._done) / rate:.0f} s left")
        self._say(f"{self._description}: {self._done}{whole} {self._unit} ({', '.join(facts)})")
