"""``dsakv bench links``: how fast blocks move between the pools and the device of this machine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from dsakv import __version__
from dsakv.analysis.links import LinkProfile, profile_json
from dsakv.analysis.links_fit import Batch
from dsakv.config import Config
from dsakv.console import Console
from dsakv.errors import InputError
from dsakv.kv.link_bench import LinkBench, profile_of
from dsakv.trace.files import write_result


@dataclass(frozen=True, slots=True)
class Measured:
    """A profile, and the medians that it was fitted to, by tier and direction."""

    profile: LinkProfile
    batches: dict[tuple[str, str], list[Batch]]
    out: Path


def bench_links(config: Config, console: Console) -> Measured:
    """Measure the links of this machine and write their profile.

    Raises:
        InputError: no such device, sizes that are not possible, a URL that names no pool.
        DsakvError: there is not enough memory, the remote pool cannot be used, or the file cannot be written.
    """
    device, out = _device(config.links.device), Path(config.links.out)
    sizes = sorted(set(config.links.block_bytes))
    if not sizes or any(size % 4 for size in sizes):
        raise InputError("--block-bytes must be multiples of 4", "such as 1536,24576,98304")
    if out.suffix != ".json":
        raise InputError(f"--out {out} does not end in .json", "analyze --links knows files by that: --out links.json")
    with closing(LinkBench(sizes, config.kv.remote, device, config.kv.timeout)) as bench:
        total = config.links.rounds * len(bench.kinds)
        with console.progress(total, "measuring links", "batches") as advance:
            bench.round(keep=False)
            for _ in range(config.links.rounds):
                bench.round(advance)
        batches = bench.batches(median)
    profile = profile_of(out.stem, batches)
    write_result(
        out,
        profile_json(profile, **_circumstances(device, config), batches=_plain(batches)),
        "name a file in a directory that can be written to with --out",
    )
    console.info(f"links: {out}")
    return Measured(profile, batches, out)


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
