"""Links by published figures, for planning before there is a machine to measure.

They are nominal: what vendors and papers give, rounded, not what a given machine reaches; ``dsakv bench links``
measures that. Blocks are gathered, as the tiered cache does it, so that the launch counts once a batch.

* ``pcie4``, ``pcie5``: x16, 32 and 64 GB/s raw a direction, of which about 25 and 50 arrive. Rows of a few hundred
  bytes fill packets badly and reach about half; 10 us are a copy's launch and its completion.
* ``nvlink-c2c``: Grace Hopper, 450 GB/s a direction nominal, about 350 of them for large reads.
* ``rdma-400g``: 400 Gb/s are 50 GB/s, 45 of them payload; some 5 us of round trip, one work request a block at
  about ten million a second.
* ``nvme``, ``nvme5``: one drive of PCIe 4.0 and 5.0, 7 and 14 GB/s reading, 5 and 10 writing; about 80 us until the
  first block, a million and two million requests a second; whole sectors of 4 KB, however small the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dsakv.analysis.links import Link, Pool, Table

_SECTOR = 4096


def _gathered(batch_us: float, op_us: float, gb_s: float) -> Pool:
    table = ((512, gb_s * 0.5), (4096, gb_s * 0.8), (65536, gb_s))
    link = Link(batch_us, ((1, op_us),), table)
    return Pool(link, link)


def _drive(read_gb_s: float, write_gb_s: float, op_us: float) -> Pool:
    def link(batch_us: float, gb_s: float) -> Link:
        return Link(batch_us, ((1, op_us),), _sectors(gb_s))

    return Pool(link(80.0, read_gb_s), link(20.0, write_gb_s))


def _sectors(gb_s: float) -> Table[float]:
    """A block below a sector takes as long as a sector."""
    return tuple((size, gb_s * min(size / _SECTOR, 1.0)) for size in (256, 512, 1024, 2048, _SECTOR))


NOMINAL: Mapping[str, Pool] = MappingProxyType(
    {
        "pcie4": _gathered(10.0, 0.02, 25.0),
        "pcie5": _gathered(10.0, 0.02, 50.0),
        "nvlink-c2c": _gathered(5.0, 0.01, 350.0),
        "rdma-400g": _gathered(5.0, 0.1, 45.0),
        "nvme": _drive(7.0, 5.0, 1.0),
        "nvme5": _drive(14.0, 10.0, 0.5),
    }
)
