"""All figures of one block size: columns of records into distributions, streams into histories and cache curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dsakv.analysis.amplification import AMPLIFICATION, amplification
from dsakv.analysis.blocks import BlockRecords
from dsakv.analysis.caches import LruCurves
from dsakv.analysis.locality import Columns, Locality
from dsakv.analysis.moments import Moments
from dsakv.analysis.needles import NEEDLES
from dsakv.analysis.scopes import Owners, SharedSteps, stream_steps
from dsakv.analysis.simulation import PolicyHits
from dsakv.analysis.temporal import LAYER, STEP, History, LayerOverlap
from dsakv.config import AnalyzeConfig


class LocalityFigures:
    """What is counted record by record and stream by stream."""

    def __init__(self, config: AnalyzeConfig) -> None:
        self._locality = Locality(config.recent_token_windows, config.recent_block_windows)
        self._windows = config.ws_windows
        self._history = History(config.ws_windows, config.reuse_cap_steps)
        self._layers = LayerOverlap()
        self._moments = Moments(
            (*self._locality.names, *AMPLIFICATION, *self._history.names, *LAYER, *NEEDLES),
        )

    def add(self, batch: BlockRecords, needles: Columns) -> None:
        """Take in the next records; ``needles`` [2, R] as :func:`~dsakv.analysis.needles.needle_recall` has them."""
        columns = (
            self._locality.columns(batch),
            amplification(batch),
            self._history.columns(batch),
            self._layers.columns(batch),
            needles,
        )
        self._moments.add(batch.records.layer, np.concatenate(columns))

    def end(self) -> None:
        """No record follows."""
        self._history.drop_state()
        self._layers.drop_state()

    def merge(self, other: LocalityFigures) -> None:
        """Add the figures of another part; both have ended."""
        self._moments.merge(other._moments)
        self._history.merge(other._history)

    @property
    def layers(self) -> list[int]:
        """Ids of the layers, ascending."""
        return [layer for layer, _ in self._moments.layers]

    def result(self, layer: int | None = None) -> dict[str, Any]:
        """The figures of one layer, or of all."""
        found = self._moments.result(layer)
        recall, needles = (found[name] for name in NEEDLES)
        return {
            "records": found["unique_blocks"]["count"],
            "record_stats": self._locality.result(found),
            "read_amplification": dict(zip(("measured", "uniform"), (found[n] for n in AMPLIFICATION), strict=True)),
            "temporal_locality": self._history.result(found, layer),
            "overlap": {
                "steps": dict(zip(("jaccard", "kept"), (found[name] for name in STEP), strict=True)),
                "layers": dict(zip(("jaccard", "kept"), (found[name] for name in LAYER), strict=True)),
            },
            "working_set": {str(window): found[f"working_set[{window}]"] for window in self._windows},
            "needle_recall": {"tokens": recall, "needles": needles} if recall["count"] else None,
        }


class CacheFigures:
    """What caches of one scope would hit: LRU at every capacity, other policies at given ones.

    ``curves`` False leaves the former to another pass.
    """

    def __init__(
        self,
        config: AnalyzeConfig,
        owners: Owners,
        policies: Sequence[str],
        capacities: tuple[int, ...],
        *,
        curves: bool = True,
    ) -> None:
        self._layered = config.by_layer
        self._shared = None if config.cache_scope == "stream" else SharedSteps(config.cache_scope, owners)
        self._curves = curves
        self.lru = LruCurves(config.lru_mode, each=config.cache_curves)
        self.policies = PolicyHits(policies, capacities)

    def add(self, batch: BlockRecords) -> None:
        """Take in the next records."""
        steps = stream_steps(batch, self._layered) if self._shared is None else self._shared.steps(batch)
        if self._curves:
            self.lru.add(steps)
        self.policies.add(steps)

    def end(self) -> None:
        """No record follows."""
        self._shared = None
        self.lru.end()
        self.policies.end()

    def merge(self, other: CacheFigures) -> None:
        """Add the figures of another part; both have ended."""
        self.lru.merge(other.lru)
        self.policies.merge(other.policies)
