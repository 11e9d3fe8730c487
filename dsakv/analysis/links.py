"""How long blocks take to come from a pool, or to go there: profiles of links, nominal or measured.

A batch of ``n`` blocks of ``b`` bytes takes ``batch_us + n * op_us(b) + n * b / bandwidth(b)``. It is the linear cost
of message passing (Hockney, "The communication challenge for MPP", 1994: latency plus size over bandwidth) with the
latency parted in two: what a batch pays once (a launch, a round trip, waking up threads) and what each block pays (a
copy's descriptor, a key, a row to look up). The cost of a block and the bandwidth depend on its size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from dsakv.errors import InputError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Time = Annotated[float, Meta(ge=0, le=1e12)]
Rate = Annotated[float, Meta(gt=0, le=1e9)]
Size = Annotated[int, Meta(ge=1, le=1 << 40)]
Value = TypeVar("Value", bound=float)
Table = tuple[tuple[Size, Value], ...]
"""Values at transfer sizes in bytes, ascending."""
TIERS = ("local_pool", "remote_pool")


@dataclass(frozen=True, slots=True)
class Link:
    """One direction of a link. Raises ValueError where a table is empty or its sizes do not ascend."""

    batch_us: Time
    """Of each batch that is not empty."""
    op_us: Table[Time]
    """Of each block, by its bytes."""
    gb_s: Table[Rate]
    """10^9 bytes a second, by the bytes of a block."""

    def __post_init__(self) -> None:
        for table in (self.op_us, self.gb_s):
            if not table or any(a >= b for (a, _), (b, _) in pairwise(table)):
                raise ValueError("a table needs sizes, and they must ascend")

    def block_us(self, block_bytes: int) -> float:
        """What one more block adds to a batch, in microseconds."""
        return at_size(self.op_us, block_bytes) + block_bytes / at_size(self.gb_s, block_bytes) / 1e3

    def batches_us(self, blocks: Ints | Floats, block_bytes: int) -> Floats:
        """Microseconds of batches of ``blocks`` [R]; empty ones take none."""
        return np.where(blocks > 0, self.batch_us + blocks * self.block_us(block_bytes), 0.0)


@dataclass(frozen=True, slots=True)
class Pool:
    """The link between a pool and the device, whatever it passes on its way."""

    read: Link
    write: Link


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """The links of a machine, by tier."""

    name: str
    local_pool: Pool | None = None
    """Host memory."""
    remote_pool: Pool | None = None
    hbm: Link | None = None
    """Rows gathered on the device itself; a block is a row."""
    measured: bool = False
    """False for nominal figures."""

    def pool(self, tier: str) -> Pool | None:
        return self.local_pool if tier == "local_pool" else self.remote_pool

    @property
    def tiers(self) -> tuple[str, ...]:
        """Those that there is a link to."""
        return tuple(tier for tier in TIERS if self.pool(tier) is not None)


def at_size(table: Table[Value], size: int) -> float:
    """The value of ``table`` at ``size`` bytes: linear in the logarithm of the size, constant beyond its ends."""
    sizes, values = zip(*table, strict=True)
    return float(np.interp(np.log(size), np.log(sizes), values))


def load_links(text: str) -> LinkProfile:
    """The profile that ``text`` names: ``pcie5``, ``pcie5+rdma-400g`` (host memory, then the remote pool), or a JSON
    file that ``dsakv bench links`` wrote, which may take either place too.

    Raises:
        InputError: there is no such profile, or the file cannot be read or is none.
    """
    parts = [part.strip() for part in text.split("+")]
    if len(parts) > 2 or not all(parts):
        raise InputError(f"--links {text} names no link", "give one of host memory, or two: pcie5+rdma-400g")
    found = [_named(part) for part in parts]
    if len(found) == 1:
        return found[0]
    local, remote = found
    pool = remote.remote_pool or remote.local_pool
    return replace(
        local, name=f"{local.name}+{remote.name}", remote_pool=pool, measured=local.measured and remote.measured
    )


def _named(name: str) -> LinkProfile:
    from dsakv.analysis.nominal_links import NOMINAL

    if name in NOMINAL:
        return LinkProfile(name, local_pool=NOMINAL[name])
    if not name.endswith(".json"):
        raise InputError(f"there is no link profile {name}", f"choose from {', '.join(NOMINAL)}, or name a .json file")
    return read_profile(Path(name))


class _File(msgspec.Struct, forbid_unknown_fields=False):
    """What of a file is a profile; the rest is how it was measured."""

    name: Annotated[str, Meta(min_length=1, max_length=200)]
    local_pool: Pool | None = None
    remote_pool: Pool | None = None
    hbm: Link | None = None


def read_profile(path: Path) -> LinkProfile:
    """A measured profile.

    Raises:
        InputError: it cannot be read, or is no profile.
    """
    hint = "dsakv bench links --out FILE.json measures one"
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_File)
    except OSError as error:
        raise InputError(f"cannot read link profile {path}: {error.strerror}", hint) from error
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise InputError(f"{path} is no link profile: {error}", hint) from error
    if found.local_pool is None and found.remote_pool is None:
        raise InputError(f"{path} is no link profile: it has neither local_pool nor remote_pool", hint)
    return LinkProfile(found.name, found.local_pool, found.remote_pool, found.hbm, measured=True)


def profile_json(profile: LinkProfile, **how: object) -> bytes:
    """``profile`` as a file that :func:`read_profile` takes; ``how`` says how it was measured."""
    fields = {"name": profile.name, **{tier: profile.pool(tier) for tier in TIERS}, "hbm": profile.hbm, **how}
    return msgspec.json.format(msgspec.json.encode(fields), indent=1) + b"\n"
