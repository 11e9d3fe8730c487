"""The one pass over a part of a trace: read, sort into streams, map to blocks, count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dsakv.analysis.blocks import touched_blocks
from dsakv.analysis.figures import CacheFigures, LocalityFigures
from dsakv.analysis.needles import Spans, needle_recall
from dsakv.analysis.records import LeftOut, StreamRecords, StreamSplitter
from dsakv.analysis.rows import ReappearedError
from dsakv.analysis.scopes import Owners
from dsakv.config import AnalyzeConfig
from dsakv.errors import InputError
from dsakv.trace.batch import TraceBatch
from dsakv.trace.intake import Intake, ReadCounts
from dsakv.trace.ordered import in_engine_order
from dsakv.trace.units import Unit, read_unit

_WITHOUT_ORDER = "use --cache-scope request or stream, which do not need the order of the engine's steps"


@dataclass(frozen=True, slots=True)
class Task:
    """What to count, the same for every part."""

    config: AnalyzeConfig
    block_sizes: tuple[int, ...]
    """Ascending."""
    check_block_size: bool
    """Collect the records' own block sizes."""
    needles: Spans
    owners: Owners
    policies: tuple[str, ...]
    capacities: Mapping[int, tuple[int, ...]]
    """By block size: what to simulate policies at."""
    policies_only: bool = False
    """Everything else has been counted in a pass before, from which the capacities come."""

    @property
    def run_wide(self) -> bool:
        """Whether caches go beyond a part: they take all parts at once, in the order of the engine's steps."""
        return self.config.cache_scope in ("layer", "run")

    def caches(self) -> dict[int, CacheFigures]:
        """Empty caches by block size."""
        return {
            size: CacheFigures(
                self.config, self.owners, self.policies, self.capacities[size], curves=not self.policies_only
            )
            for size in self.block_sizes
        }


@dataclass(slots=True)
class PartFigures:
    """What one part of a trace adds to the results."""

    counts: ReadCounts
    left_out: LeftOut
    requests: set[int | str]
    locality: dict[int, LocalityFigures]
    """By block size."""
    caches: dict[int, CacheFigures]
    """Likewise."""

    @classmethod
    def none(cls, task: Task) -> PartFigures:
        """The figures of no records."""
        return cls(
            ReadCounts(),
            LeftOut(),
            set(),
            {size: LocalityFigures(task.config) for size in task.block_sizes},
            task.caches(),
        )

    def merge(self, later: PartFigures) -> None:
        """Add another part of the trace."""
        self.counts.merge(later.counts)
        self.left_out.merge(later.left_out)
        self.requests |= later.requests
        for size, figures in self.locality.items():
            figures.merge(later.locality[size])
        for size, caches in self.caches.items():
            caches.merge(later.caches[size])

    def end(self) -> None:
        """No record follows."""
        for figures in self.locality.values():
            figures.end()
        for caches in self.caches.values():
            caches.end()


def analyze_part(units: Sequence[Unit], task: Task, advance: Callable[[int], None]) -> PartFigures:
    """Figures of ``units``, which must hold every record of their requests; caches of the whole run are left out.

    ``advance`` is called with the bytes just read.

    Raises:
        InputError: a bad record, where the configuration is strict.
        DsakvError: a file that cannot be read.
    """
    told = 0

    def tell(part: PartFigures) -> None:
        nonlocal told
        advance(part.counts.bytes - told)
        told = part.counts.bytes

    try:
        return _analyze(units, task, tell, release=True)
    except ReappearedError:
        return _analyze(units, task, tell, release=False)


def _analyze(units: Sequence[Unit], task: Task, tell: Callable[[PartFigures], None], *, release: bool) -> PartFigures:
    config = task.config
    intake = Intake(
        config.on_error,
        request_order=config.step_union or config.key_mode == "request" or config.cache_scope == "request",
        block_sizes=task.check_block_size,
    )
    splitter = StreamSplitter(config, release=release)
    part = PartFigures.none(task)
    part.counts, part.left_out = intake.counts, splitter.left_out
    batches = (batch for unit in units for batch in read_unit(unit, intake))
    for records in _split(splitter, batches):
        needles = needle_recall(records, task.needles, intake.id_of)
        for batch in touched_blocks(records, task.block_sizes):
            if not task.policies_only:
                part.locality[batch.block_size].add(batch, needles)
            if not task.run_wide:
                part.caches[batch.block_size].add(batch)
        tell(part)
    part.end()
    part.requests = intake.requests
    for caches in part.caches.values():
        caches.lru.name_requests(intake.id_of)
    tell(part)
    return part


def run_wide_caches(
    units: Sequence[Unit], task: Task, records: int, advance: Callable[[int], None]
) -> dict[int, CacheFigures]:
    """Figures of caches that all requests share, by block size; ``records`` were accepted in the pass before.

    Raises:
        InputError: a bad record, where the configuration is strict; records without ``engine_step``.
        DsakvError: a file that cannot be read.
    """
    config = task.config
    intake = Intake(config.on_error, engine_steps=True)
    splitter = StreamSplitter(config, release=False)
    caches = task.caches()
    told = 0
    try:
        for selected in _split(splitter, in_engine_order(units, intake)):
            for batch in touched_blocks(selected, task.block_sizes):
                caches[batch.block_size].add(batch)
            advance(intake.counts.bytes - told)
            told = intake.counts.bytes
    except InputError as error:  # the pass before had nothing to say against these records
        raise InputError(error.message, _WITHOUT_ORDER) from error
    advance(intake.counts.bytes - told)
    if intake.counts.accepted != records:
        raise InputError(
            "not all records can be put in the order of the engine's steps, which a cache that requests share needs: "
            "engine_step is missing, or at odds with step_idx",
            _WITHOUT_ORDER,
        )
    for figures in caches.values():
        figures.end()
    return caches


def _split(splitter: StreamSplitter, batches: Iterable[TraceBatch]) -> Iterator[StreamRecords]:
    for batch in batches:
        yield from splitter.split(batch)
    yield from splitter.flush()
