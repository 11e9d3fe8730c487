"""``dsakv bench links``: how fast blocks move between the pools and the device of this machine, and bytes from disk and
between memories."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol

import torch

from dsakv import __version__
from dsakv.analysis.links import LinkProfile, profile_json
from dsakv.analysis.links_fit import Batch
from dsakv.analysis.links_speeds import DiskSpeeds, MemorySpeeds
from dsakv.config import Config
from dsakv.console import Console
from dsakv.errors import InputError
from dsakv.kv.copy_bench import CopyBench
from dsakv.kv.link_bench import LinkBench, profile_of
from dsakv.trace.files import write_result
from dsakv.weights.disk_bench import DiskBench, Source, disk_source


@dataclass(frozen=True, slots=True)
class Measured:
    """A profile, and the medians that it was fitted to, by tier and direction."""

    profile: LinkProfile
    batches: dict[tuple[str, str], list[Batch]]
    disk: DiskSpeeds
    memory: MemorySpeeds
    out: Path


class Bench(Protocol):
    """Times what it has of ``kinds``, all of them in turn each round."""

    @property
    def kinds(self) -> Sequence[object]: ...

    def round(self, advance: Callable[[int], None] = ..., *, keep: bool = True) -> None: ...


def bench_links(config: Config, console: Console) -> Measured:
    """Measure the links of this machine and write their profile.

    Raises:
        InputError: no such device, sizes that are not possible, a URL that names no pool, no file to read.
        DsakvError: there is not enough memory or room on the disk, the remote pool or the disk cannot be used, or the
            profile cannot be written.
    """
    device, out = _device(config.links.device), Path(config.links.out)
    sizes = sorted(set(config.links.block_bytes))
    if not sizes or any(size % 4 for size in sizes):
        raise InputError("--block-bytes must be multiples of 4", "such as 1536,24576,98304")
    if out.suffix != ".json":
        raise InputError(f"--out {out} does not end in .json", "analyze --links knows files by that: --out links.json")
    with disk_source(config.links.disk, out.parent) as source:
        batches = _batches(sizes, device, config, console)  # one after another: each gives its memory back
        disk = _disk(source, config.links.rounds, console)
    memory = _memory(device, config.links.rounds, console)
    profile = profile_of(out.stem, batches)
    write_result(
        out,
        profile_json(profile, **_circumstances(device, config), disk=disk, memory=memory, batches=_plain(batches)),
        "name a file in a directory that can be written to with --out",
    )
    console.info(f"links: {out}")
    return Measured(profile, batches, disk, memory, out)


def _batches(
    sizes: Sequence[int], device: torch.device, config: Config, console: Console
) -> dict[tuple[str, str], list[Batch]]:
    with closing(LinkBench(sizes, config.kv.remote, device, config.kv.timeout)) as bench:
        _measure(bench, config.links.rounds, console, "measuring links", "batches")
        return bench.batches(median)


def _disk(source: Source, rounds: int, console: Console) -> DiskSpeeds:
    bench = DiskBench(source)
    _measure(bench, rounds, console, "reading from disk", "readings")
    return bench.speeds()


def _memory(device: torch.device, rounds: int, console: Console) -> MemorySpeeds:
    bench = CopyBench(device)
    _measure(bench, rounds, console, "copying memory", "copies")
    return bench.speeds()


def _measure(bench: Bench, rounds: int, console: Console, doing: str, unit: str) -> None:
    with console.progress(rounds * len(bench.kinds), doing, unit) as advance:
        bench.round(keep=False)  # pays for what is done once
        for _ in range(rounds):
            bench.round(advance)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this PyTorch sees no CUDA device", "use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _circumstances(device: torch.device, config: Config) -> dict[str, object]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "dsakv_version": __version__,
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "torch": str(torch.__version__),
        "rounds": config.links.rounds,
        "remote": (config.kv.remote or "").partition("://")[0] or None,
    }


def _plain(batches: Mapping[tuple[str, str], Sequence[Batch]]) -> dict[str, Sequence[Iterable[float]]]:
    """By tier and direction: bytes of a block, blocks, microseconds."""
    return {
        f"{tier} {direction}": [[one.block_bytes, one.blocks, round(one.us, 3)] for one in found]
        for (tier, direction), found in batches.items()
    }
