"""A measured profile of links as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from dsakv.analysis.links import Link, LinkProfile
from dsakv.analysis.links_fit import Batch, errors
from dsakv.analysis.links_speeds import DiskSpeeds, MemorySpeeds
from dsakv.report.grids import titled
from dsakv.report.text import TableData, figure, percent, plural, short, size

_NAMES = {"local_pool": "host memory", "remote_pool": "remote pool", "hbm": "rows gathered on the device"}
_DIRECTIONS = {"read": "to the device", "write": "from the device"}
_SOURCES = {"file": "the file", "checkpoint": "the checkpoint", "temporary": "a temporary file"}
_MIB = 1 << 20


def render(
    profile: LinkProfile,
    batches: Mapping[tuple[str, str], Sequence[Batch]],
    disk: DiskSpeeds,
    memory: MemorySpeeds,
) -> Group:
    """A table for each link: what was fitted for each size, and how far it lies from what was measured; then what disk
    and memory give."""
    parts: list[RenderableType] = []
    for (tier, direction), found in batches.items():
        pool = profile.pool(tier) if tier != "hbm" else None
        link = profile.hbm if pool is None else pool.read if direction == "read" else pool.write
        assert link is not None
        data = _table(_NAMES[tier] + (f", {_DIRECTIONS[direction]}" if tier != "hbm" else ""), link, found)
        parts += titled(data)
    parts += [Text("error: of the fit against the median of each batch size, mean and greatest.", style="dim"), Text()]
    return Group(*parts, *titled(_disk_table(disk)), *titled(_memory_table(memory))[:-1])


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


def _disk_table(disk: DiskSpeeds) -> TableData:
    """A row for each size of a request, a column for each number of threads."""
    speeds = {(request, threads): gb_s for request, threads, gb_s in disk.gb_s}
    counts = sorted({threads for _, threads in speeds})
    rows = [
        (_binary(request), *(short(speeds[request, threads]) for threads in counts))
        for request in sorted({request for request, _ in speeds})
    ]
    columns = ("request", *(f"GB/s, {plural(threads, 'thread')}" for threads in counts))
    how = "past the page cache" if disk.direct else "through the page cache, emptied before: direct reads are refused"
    best = f"Best: {_binary(disk.best.request_bytes)}, {plural(disk.best.threads, 'thread')}"
    note = (
        f"{best}, {short(disk.best.gb_s)} GB/s. Up to {size(disk.read_bytes)} of {_SOURCES[disk.path_kind]} at a time."
    )
    return TableData(f"disk to host memory, {how}", columns, rows, note)


def _memory_table(memory: MemorySpeeds) -> TableData:
    speeds = (
        ("within host memory", memory.host_to_host),
        ("pinned host memory to the device", memory.host_to_device),
        ("device to pinned host memory", memory.device_to_host),
    )
    rows = [(name, short(gb_s)) for name, gb_s in speeds if gb_s is not None]
    return TableData("copies", ("from and to", "GB/s"), rows, f"{size(memory.bytes)} at a time; each byte counts once.")


def _binary(count: int) -> str:
    """Bytes as flags take them where that is short."""
    return size(count) if count % _MIB else f"{count // _MIB} MiB"
