"""Which requests run in each decode step of the engine: when they begin, when they end, what is missing of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dsakv.analysis.kv_facts import KvFacts, RequestKv
from dsakv.analysis.kv_tables import BlockTables
from dsakv.errors import InputError
from dsakv.policies.base import Ints
from dsakv.trace.batch import TraceBatch


@dataclass(frozen=True, slots=True)
class Planned:
    """The decode records of a batch, ``Q`` in ``R`` layer-steps; see :class:`~dsakv.analysis.kv_steps.KvSteps`."""

    batch: TraceBatch
    first: Ints  # [R + 1], into the records
    row: Ints  # [Q] in the tables
    begins: list[tuple[int, Ints]]
    ended: list[tuple[int, Ints]]


@dataclass(slots=True)
class _Running:
    facts: RequestKv | None
    step: int
    """The decode step that comes next."""


class Schedule:
    """Follows the requests through a trace, and keeps their block tables. For the arguments see
    :class:`~dsakv.analysis.kv_steps.KvStepper`.

    A request ends after its last decode step; one that never finished, when a step goes by without it.
    """

    def __init__(self, facts: KvFacts, block_size: int, id_of: Callable[[int], int | str], forced: bool) -> None:
        self.tables = BlockTables(facts, block_size)
        self.unfinished = 0
        self.gaps = 0
        self._facts, self._id_of = facts, id_of
        self._forced = forced
        self._layers = facts.layers
        self._running: dict[int, _Running] = {}
        self._known: dict[int, RequestKv | None] = {}  # by number of the request

    def plan(self, batch: TraceBatch) -> Planned:
        """Take in the next batch. Raises as :meth:`~dsakv.analysis.kv_steps.KvStepper.steps`."""
        self.tables.reuse_rows()
        batch = self._decoded(batch)
        begins: list[tuple[int, Ints]] = []
        ended: list[tuple[int, Ints]] = []
        if not len(batch):
            return Planned(batch, np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64), begins, ended)
        assert batch.engine_step is not None
        engine_step = batch.engine_step.astype(np.int64)
        new_step = np.append(True, engine_step[1:] != engine_step[:-1])
        opens = new_step | np.append(True, batch.layer_id[1:] != batch.layer_id[:-1])
        first = np.append(np.flatnonzero(opens), len(batch))
        layer_steps = np.append(np.flatnonzero(new_step[first[:-1]]), len(first) - 1)  # where engine steps begin
        if self._layers is None:
            self._layers = int(layer_steps[1])
        elif int(batch.layer_id.max()) >= self._layers:
            raise InputError(
                f"a record is of layer {batch.layer_id.max()}, the model has {self._layers}",
                "the files are not of one run",
            )
        numbers, inverse = np.unique(batch.request_id, return_inverse=True)
        # Each request of each engine step once, in this order: its first record, and how many it has.
        keys = (np.cumsum(new_step) - 1) * len(numbers) + inverse
        pair, at, which, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        self._require_same(batch, at, which)
        self.gaps += int(np.count_nonzero(counts != self._layers))
        bounds = np.searchsorted(pair // len(numbers), np.arange(len(layer_steps)))
        columns = (batch.request_id, batch.step_idx, batch.seq_len)
        pairs = list(zip(*(column[at].tolist() for column in columns), strict=True))
        layer_bounds = layer_steps.tolist()
        for e, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            requests = pairs[begin:end]
            if self.unfinished:
                self._end(self._vanished({request for request, _, _ in requests}), layer_bounds[e], ended)
            prompts = [ids for request in requests for ids in self._advance(*request)]
            if prompts and len(ids := np.unique(np.concatenate(prompts))):
                begins += [(r, ids) for r in range(layer_bounds[e], layer_bounds[e + 1])]
            self._end([request for request, step, _ in requests if self._is_last(request, step)],
                      layer_bounds[e + 1], ended)  # fmt: skip
        rows = np.array([self.tables.row(number) for number in numbers.tolist()], dtype=np.int64)
        return Planned(batch, first, rows[inverse], begins, ended)

    def _decoded(self, batch: TraceBatch) -> TraceBatch:
        """Without the prefill's tail, and perhaps without what was read and not decoded."""
        keep = batch.step_idx >= 0
        numbers, inverse = np.unique(batch.request_id, return_inverse=True)
        for number in numbers.tolist():
            if number not in self._known:
                self._known[number] = self._facts.requests.get(self._id_of(number))
                self.unfinished += self._known[number] is None
        if not self._forced:
            known = [self._known[number] for number in numbers.tolist()]
            keep &= ~np.array([facts is not None and facts.forced for facts in known], dtype=np.bool_)[inverse]
        return batch.take(keep)

    def _vanished(self, present: set[int]) -> list[int]:
        """Requests that never finished and are not ``present`` any more."""
        return [r for r, running in self._running.items() if running.facts is None and r not in present]

    def _is_last(self, request: int, step: int) -> bool:
        facts = self._known[request]
        return facts is not None and step + 1 == facts.decode_steps

    def _advance(self, request: int, step: int, seq_len: int) -> list[Ints]:
        """Note a decode step of a request; the full blocks of its prompt where it is its first one."""
        running = self._running.get(request)
        if running is None:
            facts = self._known[request]
            running = self._running[request] = _Running(facts, 0)
            self.tables.begin(request, facts, seq_len)
        facts = running.facts
        if facts is None:
            self.tables.extend(request, seq_len)
        elif step >= facts.decode_steps or seq_len != facts.prompt_tokens + step + 1:
            raise InputError(
                f"decode step {step} of request {self._id_of(request)} has {seq_len} tokens in the cache; by "
                f"requests.jsonl its prompt has {facts.prompt_tokens} and {facts.decode_steps} steps follow",
                "the files are not of one run, or damaged",
            )
        self.gaps += step != running.step
        running.step = step + 1
        return [self.tables.blocks(request, seq_len - 1)] if step == 0 else []

    def _end(self, requests: list[int], at: int, ended: list[tuple[int, Ints]]) -> None:
        """These end before layer-step ``at``."""
        if requests:
            for request in requests:
                del self._running[request]
            ids = self.tables.end(requests)
            if ended and ended[-1][0] == at:
                ended[-1] = at, np.sort(np.concatenate([ended[-1][1], ids]))
            elif len(ids):
                ended.append((at, ids))

    def _require_same(self, batch: TraceBatch, first: Ints, which: Ints) -> None:
        """All layers of a step are of the same token."""
        for name, column in (("step_idx", batch.step_idx), ("seq_len_current", batch.seq_len)):
            wrong = np.flatnonzero(column != column[first][which])
            if len(wrong):
                request = self._id_of(int(batch.request_id[wrong[0]]))
                raise InputError(
                    f"request {request} has records with different {name} in one step of the engine",
                    "the files are damaged, or of an engine whose steps are numbered otherwise",
                )
