"""The live tracer: takes the engine's steps, writes shards, ``requests.jsonl`` and ``summary.json``.

The model's thread only puts each step into a short queue. One writer thread gathers some hundred records, derives
and writes them at once, so that a record costs microseconds; a full queue makes the model wait rather than lose
anything.
"""

from __future__ import annotations

import io
import queue
import shlex
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dsakv.config import TraceConfig
from dsakv.request import Completion, Request, Step
from dsakv.trace.files import disk_error, locked, write_all, write_json
from dsakv.trace.formats import FORMATS, ShardWriter, shard_path
from dsakv.trace.jsonl_writer import request_line
from dsakv.trace.records import PrefixFacts, derive, to_batch
from dsakv.trace.run_dir import RunDir
from dsakv.trace.serving import serving
from dsakv.trace.summary import Summary, from_shards

QUEUED_STEPS = 4  # of V3.2 at batch 64 a step is some 60 MB
BATCH_RECORDS = 256
HELD_BYTES = 128 << 20  # of records that open shards keep in memory

_Outcomes = dict[int, tuple[str | None, float | None]]  # text and score by request id


class TraceWriter:
    """``with TraceWriter(...) as writer: for step in engine.run(requests): writer.write(step)``.

    Also where the loop is left by an error or Ctrl-C, whole records are on disk and every file is complete.
    """

    def __init__(
        self,
        run: RunDir,
        options: TraceConfig,
        *,
        seed: int,
        requests: Sequence[Request],
        prefix: Mapping[int, PrefixFacts],
        inputs: dict[str, Any],
        text: Callable[[Completion], str | None] | None = None,
        score: Callable[[Completion], float | None] | None = None,
        resumable: bool = True,
    ) -> None:
        """Prepare to write; entering the context starts the writer thread.

        Args:
            run: the folder. Of a resumed run, ``requests`` are those that are not in ``run.finished``, and its
                engine steps are numbered on.
            seed: of the sampling of steps.
            requests: the requests that steps will hold records of; ``expect`` adds others.
            prefix: prefix facts by request id.
            inputs: for the summary: ``{"kept": n, "truncated": n, "dropped": {reason: n}}``, of the whole run.
            text: what a completion says, for ``--trace-store-text``.
            score: the workload's score of a completion. Like ``text``, called from :meth:`write`.
            resumable: whether the command that runs can go on with this run, should the disk be full.

        Raises:
            InputError: the trace to go on with is damaged.
        """
        self._run, self._options, self._seed, self._inputs = run, options, seed, inputs
        self._text, self._score, self._resumable = text, score, resumable
        self._requests: dict[int, Request] = {}
        self._prefix: dict[int, PrefixFacts] = {}
        self._shards: dict[int, Path] = {}
        self._unfinished: Counter[Path] = Counter()
        for request in requests:
            self.expect(request, prefix[request.request_id])
        self._summary = from_shards(run.trace_dir, run.block_size) if run.finished else Summary()
        self._summary.resumed = bool(run.finished)
        self._done = len(run.finished)
        self._format = FORMATS[options.format]
        self._open: dict[Path, ShardWriter] = {}
        self._log: io.FileIO | None = None
        self._lines: dict[Path, list[bytes]] = {}  # of requests.jsonl, until the shard with their records is on disk
        self._gathered: list[Step] = []
        self._gathered_records = 0
        self._written: Counter[int] = Counter()
        self._decode_steps: Counter[int] = Counter()
        self._error: Exception | None = None
        self._closed = False
        self._lock = ExitStack()
        self._queue: queue.Queue[tuple[Step, _Outcomes] | None] = queue.Queue(QUEUED_STEPS)
        self._thread = threading.Thread(target=self._work, name="trace-writer", daemon=True)

    def expect(self, request: Request, prefix: PrefixFacts) -> None:
        """Announce a request that the constructor did not name, before the first step that runs it (a chat's turn)."""
        self._requests[request.request_id] = request
        self._prefix[request.request_id] = prefix
        shard = shard_path(self._run.trace_dir, request.request_id, self._options)
        self._shards[request.request_id] = shard
        self._unfinished[shard] += 1

    def write(self, step: Step) -> None:
        """Hand over a step. Its arrays must not be written to any more.

        Raises:
            DsakvError: the disk is full or not writable, or scores are not finite.
            ValueError: the engine broke its contract. Either may belong to an earlier step.
        """
        if self._error is not None:
            raise self._error
        outcomes = {
            completion.request_id: (
                self._text(completion) if self._text and self._options.store_text else None,
                self._score(completion) if self._score else None,
            )
            for completion in step.finished
        }
        self._queue.put((step, outcomes))

    def close(self) -> None:
        """Write what is queued, and the summary.

        Raises:
            As :meth:`write`.
        """
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join()
        if self._error is not None:
            raise self._error
        path = self._run.trace_dir / "summary.json"
        try:
            write_json(path, self.summary())
        except OSError as error:
            raise disk_error(error, path, self._how_to_go_on()) from None

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` says; to be asked after :meth:`close`."""
        return self._summary.to_dict(self._inputs) | {"serving": serving(self._run.requests_path)}

    def __enter__(self) -> TraceWriter:
        self._lock.enter_context(locked(self._run.path))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as own:
            if own is not error:  # else write() raised it already
                raise
        finally:
            self._lock.close()

    def _work(self) -> None:
        ended = False
        failed: OSError | None = None
        try:
            with _naming(self._run.requests_path):
                self._log = open(self._run.requests_path, "ab", buffering=0)  # noqa: SIM115  closed by _close_files
            while not ended:
                item = self._queue.get()
                if item is None:
                    ended = True
                    self._flush()
                else:
                    self._take(*item)
        except OSError as error:
            failed = error
        except Exception as error:
            self._error = error
        finally:
            self._close_files()
        if failed is not None:  # only now is it known how many requests are complete
            path = Path(failed.filename) if failed.filename else self._run.path
            self._error = disk_error(failed, path, self._how_to_go_on())
        while not ended:  # write() may wait for a place in the queue
            ended = self._queue.get() is None

    def _close_files(self) -> None:
        """Complete what is open; some disks tell only now that they did not take all."""
        for path in list(self._open):
            try:
                self._close(path)
            except OSError as error:
                self._error = self._error or disk_error(error, path, self._how_to_go_on())
            except Exception as error:  # write() must hear of it, whatever it is
                self._error = self._error or error
        if self._log is not None:
            try:
                self._log.close()
            except OSError as error:
                self._error = self._error or disk_error(error, self._run.requests_path, self._how_to_go_on())

    def _take(self, step: Step, outcomes: _Outcomes) -> None:
        self._summary.traffic.add(step.traffic)
        if step.records is not None:
            if unknown := set(step.records.request_id.tolist()) - self._requests.keys():
                raise ValueError(f"step {step.index} holds records of unknown requests: {sorted(unknown)}")
            self._decode_steps.update(step.records.request_id[step.records.step_idx >= 0].tolist())
            self._gathered.append(step)
            self._gathered_records += step.records.positions.shape[0] * step.records.positions.shape[1]
        if step.finished or self._gathered_records >= BATCH_RECORDS:
            self._flush()
        if step.finished:
            self._finish(step.finished, outcomes)

    def _flush(self) -> None:
        steps, self._gathered, self._gathered_records = self._gathered, [], 0
        batch = to_batch(steps, self._seed, self._options.sample_rate, self._run.engine_steps)
        if batch is None:
            return
        requests = batch.request_id.tolist()
        facts = [self._prefix[request_id] for request_id in requests]
        prefix_blocks = np.array([f.prefix_cached_blocks for f in facts])
        derived = derive(batch, self._run.block_size, prefix_blocks)
        rows = self._format.encode(batch, derived, self._run.block_size, facts, self._options)
        by_shard: dict[Path, list[int]] = {}
        for r, request_id in enumerate(requests):
            by_shard.setdefault(self._shards[request_id], []).append(r)
        for path, which in by_shard.items():
            self._write(path, rows, which)
        while sum(shard.held for shard in self._open.values()) > HELD_BYTES:
            path = max(self._open, key=lambda path: self._open[path].held)
            with _naming(path):
                self._open[path].spill()
        self._written.update(requests)
        self._summary.add(batch, derived)

    def _finish(self, completions: list[Completion], outcomes: _Outcomes) -> None:
        for completion in completions:
            request_id = completion.request_id
            ran, traced = completion.decode_steps, self._decode_steps.pop(request_id, 0)
            if ran != traced:
                raise ValueError(f"request {request_id} ran {ran} decode steps, but {traced} were traced")
            line = request_line(
                self._requests[request_id],
                completion,
                self._prefix[request_id],
                self._written.pop(request_id, 0),
                *outcomes[request_id],
                self._options.store_text,
            )
            shard = self._shards[request_id]
            self._lines.setdefault(shard, []).append(line)
            self._unfinished[shard] -= 1
            self._summary.finish(request_id)
        for shard in dict.fromkeys(self._shards[completion.request_id] for completion in completions):
            self._settle(shard)

    def _settle(self, path: Path) -> None:
        """Some requests of a shard have finished: declare those whose records are on disk."""
        shard = self._open.get(path)
        if shard is None:
            self._declare(path)
            return
        with _naming(path):
            on_disk = shard.sync()
            if path not in {self._shards[request_id] for request_id in self._written}:
                shard.pause()
        if self._unfinished[path] == 0:
            self._close(path)
        elif on_disk:
            self._declare(path)

    def _write(self, path: Path, rows: Any, which: list[int]) -> None:
        with _naming(path):
            if path not in self._open:
                self._open[path] = self._format.open(path, self._options)
            try:
                self._open[path].write(rows, which)
            except BaseException:
                self._open.pop(path).discard()
                raise

    def _close(self, path: Path) -> None:
        with _naming(path):
            self._open.pop(path).close()
        self._declare(path)

    def _declare(self, path: Path) -> None:
        """Give the finished requests of a shard that is on disk their lines in ``requests.jsonl``."""
        lines = self._lines.pop(path, [])
        if self._log is not None:
            with _naming(self._run.requests_path):
                write_all(self._log, b"".join(lines))
            self._done += len(lines)

    def _how_to_go_on(self) -> str:
        total = len(self._requests) + len(self._run.finished)
        if not (self._resumable and self._options.store_token_pos):
            return (
                f"{self._done} of {total} requests are complete: start over where there is more space, by --trace-out"
            )
        return (
            f"{self._done} of {total} requests are complete: free some space; then go on with "
            f"--resume --trace-out {shlex.quote(str(self._run.path))}"
        )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let errors of the disk say which file they are about."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
