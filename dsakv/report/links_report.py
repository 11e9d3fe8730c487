"""A measured profile of links as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from dsakv.analysis.links import Link, LinkProfile
from dsakv.analysis.links_fit import Batch, errors
from dsakv.report.grids import data_table
from dsakv.report.text import TableData, figure, percent, short, size

_NAMES = {"local_pool": "host memory", "remote_pool": "remote pool", "hbm": "rows gathered on the device"}
_DIRECTIONS = {"read": "to the device", "write": "from the device"}


def render(profile: LinkProfile, batches: Mapping[tuple[str, str], Sequence[Batch]]) -> Group:
    """A table for each link: what was fitted for each size, and how far it lies from what was measured."""
    parts: list[RenderableType] = []
    for (tier, direction), found in batches.items():
        pool = profile.pool(tier) if tier != "hbm" else None
        link = profile.hbm if pool is None else pool.read if direction == "read" else pool.write
        assert link is not None
        data = _table(_NAMES[tier] + (f", {_DIRECTIONS[direction]}" if tier != "hbm" else ""), link, found)
        parts += [Text(data.title, style="bold"), data_table(data), Text(data.note, style="dim"), Text()]
    parts.append(Text("error: of the fit against the median of each batch size, mean and greatest.", style="dim"))
    return Group(*parts)


def _table(title: str, link: Link, found: Sequence[Batch]) -> TableData:
    rows = []
    for block_bytes in sorted({one.block_bytes for one in found}):
        mine = [one for one in found if one.block_bytes == block_bytes]
        off = abs(errors(link, mine))
        us, largest = link.block_us(block_bytes), mine[-1]
        rows.append(
            (
                size(block_bytes),
                short(us),
                short(block_bytes / us / 1e3),
                short(largest.blocks * block_bytes / largest.us / 1e3),
                figure(largest.blocks),
                percent(float(off.mean())),
                percent(float(off.max())),
            )
        )
    columns = ("block", "us a block", "GB/s", "GB/s measured", "in a batch of", "error", "greatest")
    return TableData(title, columns, rows, f"A batch takes {link.batch_us:.3g} us, and so much for each block.")
