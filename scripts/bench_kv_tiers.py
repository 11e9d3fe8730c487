"""What a plan says that reading from KV tiers takes, beside what it took, for block sizes and hot capacities.

One resident run is traced, and a plan made of it: its selections say which batches any tiers would read. Every set-up
is then run with tiers, in host memory and in a Redis server that is started here on the loopback interface, and the
time that decode read is taken from the engine's own count. Between its decode steps batches of that link are timed, of
all sizes in turn, and what is fitted to those is the profile that the prediction uses: on a machine that other jobs use
nothing else sees the same conditions. The last column is what one profile of all runs together says.

    python scripts/bench_kv_tiers.py --block-sizes 1 16 64 --hot 0.1 0.3 0.6
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import orjson

from dsakv.analysis.links_fit import Batch
from dsakv.threads import wait_briefly

if TYPE_CHECKING:
    from dsakv.analysis.links import Link
    from dsakv.kv.link_bench import Kind, LinkBench, Statistic
    from dsakv.models.contracts import Model

WITHIN = 0.25
TRACED_BLOCK = 16
BETWEEN_STEPS = 6
"""Batches that are timed between two decode steps."""


@contextmanager
def redis_server(wanted: bool) -> Iterator[str | None]:
    """A server of its own on a free port; its URL, or None where there is none to start."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None or not wanted:
        print("host memory alone" if not wanted else "no redis-server: host memory alone", file=sys.stderr)
        yield None
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.terminate()
        server.wait()


def prompts(count: int, tokens: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (tokens,), generator=generator).tolist() for _ in range(count)]


def trace(folder: Path, ids: list[list[int]], steps: int) -> Path:
    """The resident run."""
    from dsakv.cli import run

    file = folder / "prompts.jsonl"
    file.write_bytes(b"".join(orjson.dumps({"prompt_token_ids": one}) + b"\n" for one in ids))
    flags = [
        *("--model", "tiny-random", "--dtype", "float32", "--device", "cpu", "--temperature", "0"),
        *("--batch-size", str(len(ids)), "--max-new-tokens", str(steps + 1), "--kv-block-size", str(TRACED_BLOCK)),
        *("--trace-out", str(folder / "run")),
    ]
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = run(["trace", "file", str(file), *flags])
    if code:
        sys.exit(said.getvalue())
    return folder / "run"


def layer_bytes(model: Model, tokens: int) -> int:
    """What a layer computes on in a decode step: its weights, on average, and the index keys of all sequences."""
    from torch import nn

    layers = [layer for layer in model.layers if isinstance(layer, nn.Module)]
    weights = sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in layer.parameters())
    return weights // len(model.layers) + tokens * model.index_key_dim * model.dtype.itemsize


def planned(run: Path, sizes: list[int], hot: list[float]) -> list[dict[str, Any]]:
    """Batches and blocks that each set-up would read; the times are not used."""
    from dsakv.analysis.links import load_links
    from dsakv.analysis.plan import plan_trace
    from dsakv.config import AnalyzeConfig
    from dsakv.trace.open import find_traces

    config = AnalyzeConfig(block_sizes=tuple(sizes), plan_hot=tuple(hot))
    made: list[dict[str, Any]] = plan_trace(find_traces(run)[0], config, load_links("pcie5"), lambda done: None)[
        "sizes"
    ]
    return made


@dataclass
class Taken:
    """One set-up as it ran."""

    tier: str
    size: int
    row: dict[str, Any]
    """Of the plan."""
    read_us: list[float] = field(default_factory=list)
    """What each decode step read from afar."""
    blocks: int = 0
    links: list[tuple[Kind, list[float]]] = field(default_factory=list)
    """Batches timed between its steps."""

    def batches(self, statistic: Statistic) -> list[Batch]:
        return [Batch(kind.block_bytes, kind.blocks, statistic(us)) for kind, us in self.links if us]

    def told_ms(self, link: Link) -> float:
        """What ``link`` says of a decode step, mean."""
        batches, blocks = int(self.row["read_batches"]), int(self.row["misses"])
        us = batches * link.batch_us + blocks * link.block_us(self.links[0][0].block_bytes)
        return us / len(self.read_us) / 1e3


def taken(
    model: Model, ids: list[list[int]], steps: int, size: int, row: dict[str, Any], remote: str | None, bench: LinkBench
) -> Taken:
    """Run one set-up."""
    from dsakv.engine.engine import Engine
    from dsakv.engine.options import EngineOptions
    from dsakv.kv.formats import row_format
    from dsakv.kv.options import Amount, TierOptions
    from dsakv.request import Request

    tier = "remote_pool" if remote else "local_pool"
    block_bytes = size * row_format(model.kv_row_dim, model.dtype, model.kv_fp8).row_bytes
    links: list[tuple[Kind, list[float]]] = [
        (kind, [])
        for kind in bench.kinds
        if (kind.tier, kind.direction, kind.block_bytes) == (tier, "read", block_bytes)
    ]
    found = Taken(tier, size, row, links=links)
    tiers = TierOptions(Amount.parse(str(row["hot_blocks"]), "hot"), remote=remote)
    options = EngineOptions(batch_size=len(ids), block_size=size, temperature=0.0, tiers=tiers)
    turns = cycle(links)
    for step in Engine(model, options).run([Request(i, one, steps + 1) for i, one in enumerate(ids)]):
        if step.kind == "decode":
            traffic = step.traffic.get(("decode", tier))
            found.read_us.append(traffic.read_us if traffic else 0.0)
            found.blocks += traffic.read_ops if traffic else 0
            for kind, us in islice(turns, BETWEEN_STEPS):
                us.append(bench.time(kind))
    assert found.blocks == row["misses"], "the run read other blocks than the plan says"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--hot", type=float, nargs="+", default=[0.1, 0.3, 0.6], help="shares of the KV")
    parser.add_argument("--tokens", type=int, default=4096, help="of each prompt")
    parser.add_argument("--requests", type=int, default=2)
    parser.add_argument("--steps", type=int, default=32, help="decode steps")
    parser.add_argument("--no-remote", action="store_true", help="host memory alone")
    parser.add_argument("--save", type=Path, help="also write every figure to this JSON file")
    options: Any = parser.parse_args()
    wait_briefly(os.environ)
    import torch

    from dsakv.config import ModelConfig
    from dsakv.jobs.model import load_model
    from dsakv.kv.link_bench import LinkBench

    ids = prompts(options.requests, options.tokens)
    model = load_model(ModelConfig(name="tiny-random", device="cpu", dtype="float32")).model
    done: list[Taken] = []
    with tempfile.TemporaryDirectory() as folder, redis_server(not options.no_remote) as url:
        run = trace(Path(folder), ids, options.steps)
        plan = planned(run, options.block_sizes, options.hot)
        row_bytes = plan[0]["block_bytes"] // plan[0]["block_size_tokens"]
        tokens = len(ids) * (options.tokens + options.steps)
        sizes = [size * row_bytes for size in options.block_sizes]
        arena, between = tokens * row_bytes * len(model.layers), layer_bytes(model, tokens)
        with closing(LinkBench(sizes, url, torch.device("cpu"), 30.0, arena=arena, between=between)) as bench:
            bench.round(keep=False)
            for one in plan:
                for row in one["rows"]:
                    for remote in (None, url) if url else (None,):
                        size = one["block_size_tokens"]
                        done.append(taken(model, ids, options.steps, size, row, remote, bench))
                        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    report(done)
    if options.save is not None:
        options.save.write_bytes(orjson.dumps([_plain(one) for one in done]))


def report(done: list[Taken]) -> None:
    import torch

    from dsakv.analysis.links_fit import fit_link

    print(f"{torch.get_num_threads()} threads, {os.cpu_count()} CPUs; milliseconds that a decode step reads, mean")
    print("pool         block    hot  blocks a step  predicted  measured  predicted : measured  with one profile")
    ratios, others = [], []
    for one in done:
        predicted, mean = one.told_ms(fit_link(one.batches(fmean))), fmean(one.read_us) / 1e3
        common = fit_link([batch for other in done if other.tier == one.tier for batch in other.batches(fmean)])
        ratios.append(predicted / mean)
        others.append(one.told_ms(common) / mean)
        print(
            f"{one.tier:11}  {one.size:5}  {one.row['hot_share']:5.0%}  {one.row['misses_per_step']:13.1f}  "
            f"{predicted:9.3f}  {mean:8.3f}  {ratios[-1]:17.2f}{' ' if _good(ratios[-1]) else '*'}   "
            f"{others[-1]:16.2f}{' ' if _good(others[-1]) else '*'}"
        )
    for name, found in (("profile of each run", ratios), ("one profile", others)):
        good = sum(map(_good, found))
        print(f"{name}: {good} of {len(found)} within {WITHIN:.0%}; from {min(found):.2f} to {max(found):.2f}")


def _good(ratio: float) -> bool:
    return abs(ratio - 1) <= WITHIN


def _plain(one: Taken) -> dict[str, Any]:
    links = [[kind.block_bytes, kind.blocks, us] for kind, us in one.links]
    return {"tier": one.tier, "size": one.size, "row": one.row, "read_us": one.read_us, "links": links}


if __name__ == "__main__":
    main()
