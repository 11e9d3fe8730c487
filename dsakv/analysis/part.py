"""The one pass over a part of a trace: read, sort into streams, map to blocks, look up the past, add up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dsakv.analysis.cache import LruCache
from dsakv.analysis.history import AccessHistory
from dsakv.analysis.locality import RecordStats
from dsakv.analysis.metrics import Metric
from dsakv.analysis.records import StreamRecords, StreamSplitter, touched_blocks
from dsakv.analysis.reuse import TemporalLocality
from dsakv.analysis.working_set import WorkingSet
from dsakv.config import AnalyzeConfig
from dsakv.trace.intake import Intake, ReadCounts
from dsakv.trace.units import Unit, read_unit


def make_metrics(config: AnalyzeConfig) -> dict[str, Metric]:
    """The figures of a result that add up, by their key in it."""
    return {
        "record_stats": RecordStats(config.recent_token_windows, config.recent_block_windows),
        "temporal_locality": TemporalLocality(config.reuse_cap_steps),
        "working_set": WorkingSet(config.ws_windows),
        "cache_sim": LruCache(config.lru_caps, config.lru_mode),
    }


@dataclass(slots=True)
class PartFigures:
    """What one part of a trace adds to the results."""

    counts: ReadCounts
    prefill_tail_records: int
    """Records accepted, but left out as the tail of the prefill."""
    requests: set[int | str]
    metrics: dict[int, dict[str, Metric]]
    """By block size."""

    def merge(self, later: PartFigures) -> None:
        """Add the next part of the trace."""
        self.counts.merge(later.counts)
        self.prefill_tail_records += later.prefill_tail_records
        self.requests |= later.requests
        for block_size, metrics in self.metrics.items():
            for name, metric in metrics.items():
                metric.merge(later.metrics[block_size][name])


def analyze_part(
    units: Sequence[Unit],
    config: AnalyzeConfig,
    block_sizes: Sequence[int],
    check_block_size: bool,
    advance: Callable[[int], None],
) -> PartFigures:
    """Figures of ``units``, which must hold every record of their requests.

    ``check_block_size`` collects the records' own block sizes; ``advance`` is called with the bytes just read.

    Raises:
        InputError: a bad record, where the configuration is strict.
        DsakvError: a file that cannot be read.
    """
    intake = Intake(
        config.on_error,
        request_order=config.step_union or config.key_mode == "request",
        block_sizes=check_block_size,
    )
    splitter = StreamSplitter(
        config.key_mode,
        step_union=config.step_union,
        max_steps=config.max_steps_per_stream,
        prefill_tail=config.prefill_tail,
    )
    metrics = {block_size: make_metrics(config) for block_size in block_sizes}
    histories = {block_size: AccessHistory(config.ws_windows) for block_size in block_sizes}
    for records in _records(intake, splitter, units, advance):
        for block_size in block_sizes:
            batch = touched_blocks(records, block_size)
            accesses = histories[block_size].follow(batch)
            for metric in metrics[block_size].values():
                metric.add(batch, accesses)
    return PartFigures(intake.counts, splitter.prefill_tail_records, intake.requests, metrics)


def _records(
    intake: Intake, splitter: StreamSplitter, units: Sequence[Unit], advance: Callable[[int], None]
) -> Iterator[StreamRecords]:
    told = 0
    for unit in units:
        for batch in read_unit(unit, intake):
            yield from splitter.split(batch)
            advance(intake.counts.bytes - told)
            told = intake.counts.bytes
    yield from splitter.flush()
    advance(intake.counts.bytes - told)
