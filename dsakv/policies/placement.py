"""Which tier holds a block, step by step: the rules that a running cache and its simulation both follow.

Blocks live in a home: host memory, or a remote pool. Copies of those that decode reads are kept in the hot tier, and
where the home is remote perhaps in host memory too. A layer's step reads its set at once; what it does not find hot
comes from the host's copies or else from home, and is then in both caches, as their policies see fit. The block that
a sequence is still filling is no part of this: it stays on the device until it is full, and then it is written home and
enters the hot tier with that step's set. When no running sequence holds a block any more its copies go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from dsakv.policies import POLICIES
from dsakv.policies.base import Ints, Policy, doubled, enlarged

HBM, LOCAL, REMOTE = 0, 1, 2
"""The tiers by number, from the nearest on."""
Scope = Literal["layer", "shared"]
_Size = Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]


@dataclass(frozen=True, slots=True)
class Tiers:
    """The tiers of a run, in blocks: ``kv_tiers`` in its ``run_meta.json``."""

    policy: str
    scope: Scope
    hot_blocks: Annotated[int, msgspec.Meta(ge=1, lt=1 << 48)]
    """Of each layer on the device."""
    local_blocks: _Size
    """Of each layer in host memory: all of them, or with a remote home copies of some, or 0."""
    home: Literal["local_pool", "remote_pool"]
    write: Literal["through", "back"]
    start: Literal["cold", "warm"]
    n_blocks: _Size
    """Of each layer that the cache has."""
    block_bytes: _Size

    def placement(self, layers: int) -> PlacementOptions:
        """What decides where a block is. Raises KeyError for a policy that there is not."""
        remote = self.home == "remote_pool"
        return PlacementOptions(
            layers=layers,
            policy=POLICIES[self.policy](),
            hot=self.hot_blocks,
            scope=self.scope,
            home=REMOTE if remote else LOCAL,
            local=self.local_blocks if remote else 0,
        )


@dataclass(frozen=True, slots=True)
class PlacementOptions:
    """What tiers there are, and who decides what leaves them."""

    layers: int
    policy: Policy
    hot: int
    """Blocks of the hot tier for each layer."""
    scope: Scope = "layer"
    """Whether each layer has its part of a tier to itself, or all layers share it."""
    home: int = LOCAL
    local: int = 0
    """Blocks for each layer that host memory keeps of what is read from a remote home; 0 for none."""


@dataclass(frozen=True, slots=True)
class Placed:
    """What a layer's step found and leaves behind; ``k`` blocks are in its set."""

    tier: NDArray[np.uint8]  # [k] where each was found; those just written were on the device
    cold: NDArray[np.bool_]  # [k] read for the first time since it came home
    kept: NDArray[np.bool_]  # [k] hot afterwards
    evicted: Ints  # numbers of blocks outside the set that leave the hot tier
    local_kept: NDArray[np.bool_]  # [k] enters the host's copies
    local_evicted: Ints  # numbers of blocks whose copies the host lets go


class _Copies:
    """Copies of blocks near the reader: a cache for each layer, or one for all. Blocks go by their numbers."""

    def __init__(self, options: PlacementOptions, capacity: int) -> None:
        shared = options.scope == "shared"
        self._layers = options.layers
        self._caches = [
            options.policy.cache(capacity * options.layers if shared else capacity)
            for _ in range(1 if shared else options.layers)
        ]

    def step(self, layer: int, numbers: Ints) -> tuple[NDArray[np.bool_], Ints]:
        """Which of ``numbers`` [k], of one layer and ascending, are there; and which leave."""
        if len(self._caches) == 1:
            return self._caches[0].step(numbers)
        hit, victims = self._caches[layer].step(numbers // self._layers)
        return hit, victims * self._layers + layer

    def drop(self, blocks: Ints) -> None:
        """Forget ``blocks``, ascending, of all layers."""
        if len(self._caches) == 1:
            self._caches[0].drop((blocks[:, None] * self._layers + np.arange(self._layers)).reshape(-1))
        else:
            for cache in self._caches:
                cache.drop(blocks)


class Placement:
    """Where the blocks ``0 .. n_blocks - 1`` of every layer are. A block of a layer has the number
    ``block * layers + layer``.
    """

    def __init__(self, options: PlacementOptions, n_blocks: int) -> None:
        self.options = options
        self._hot = _Copies(options, options.hot)
        self._local = _Copies(options, options.local) if options.local else None
        self._read = np.zeros((n_blocks, options.layers), dtype=np.bool_)
        self._mark = np.zeros(n_blocks * options.layers, dtype=np.bool_)

    def reserve(self, n_blocks: int) -> None:
        """Take blocks up to ``n_blocks - 1``, for who does not know at the start how many there will be."""
        rows, layers = doubled(len(self._read), n_blocks), self.options.layers
        self._read = enlarged(self._read, (rows, layers))
        self._mark = enlarged(self._mark, (rows * layers,))

    def prepare(self) -> None:
        """Compile what the policy runs now, and not in a step that is timed."""
        scratch = self.options.policy.cache(1)
        scratch.step(np.zeros(1, dtype=np.int64))
        scratch.drop(np.zeros(1, dtype=np.int64))

    def step(self, layer: int, blocks: Ints, written: NDArray[np.bool_] | None = None) -> Placed:
        """A layer needs the set ``blocks`` [k] at once, ascending; those that are ``written`` [k] were just filled on
        the device.
        """
        layers = self.options.layers
        numbers = blocks * layers + layer
        hit, victims = self._hot.step(layer, numbers)
        gone = self._among(victims, numbers)
        on_device = hit if written is None else hit | written
        tier = np.where(on_device, HBM, self.options.home).astype(np.uint8)
        cold = ~(on_device | self._read[blocks, layer])
        self._read[blocks, layer] = True
        local_kept, local_evicted = np.zeros(len(blocks), dtype=np.bool_), victims[:0]
        missed = np.flatnonzero(~on_device)
        if self._local is not None and len(missed):
            held, dropped = self._local.step(layer, numbers[missed])
            tier[missed[held]] = LOCAL
            leaves = self._among(dropped, numbers[missed])
            local_kept[missed] = ~held & ~leaves
            local_evicted = dropped[~self._among(numbers[missed[~held]], dropped)]
        return Placed(tier, cold, ~gone, victims[~self._among(numbers, victims)], local_kept, local_evicted)

    def offer(self, layer: int, blocks: Ints) -> Placed:
        """As :meth:`step`, but nothing reads the set: what does not stay is not moved, and remains unread."""
        before = self._read[blocks, layer]
        placed = self.step(layer, blocks)
        self._read[blocks, layer] = before | placed.kept | placed.local_kept
        return placed

    def drop(self, blocks: Ints) -> None:
        """No running sequence holds ``blocks``, ascending, any more: their copies go, and what was known of them."""
        self._hot.drop(blocks)
        if self._local is not None:
            self._local.drop(blocks)
        self._read[blocks] = False

    def _among(self, some: Ints, numbers: Ints) -> NDArray[np.bool_]:
        """Which of ``numbers`` are among ``some``."""
        self._mark[some] = True
        found: NDArray[np.bool_] = self._mark[numbers]
        self._mark[some] = False
        return found
