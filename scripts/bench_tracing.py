"""What tracing costs: decode with and without it, in turn, on the tiny random model.

Two engines run the same requests on the same weights. Bursts of decode steps alternate between them; a traced burst
includes opening its trace, the writer thread's work, and waiting until everything is on disk. The cost is the median
over the pairs of neighbouring bursts.

    python scripts/bench_tracing.py --length 8192 --batch-size 4
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsakv.threads import wait_briefly

wait_briefly(os.environ)

import torch  # noqa: E402

from dsakv.config import Config, ModelConfig, TraceConfig  # noqa: E402
from dsakv.engine.engine import Engine  # noqa: E402
from dsakv.engine.options import EngineOptions  # noqa: E402
from dsakv.jobs.model import load_model  # noqa: E402
from dsakv.jobs.run import inputs, prefix_facts  # noqa: E402
from dsakv.request import Request, Step  # noqa: E402
from dsakv.settings import resolved_json  # noqa: E402
from dsakv.trace.run_dir import RunDir  # noqa: E402
from dsakv.trace.writer import TraceWriter  # noqa: E402


def decoding(engine: Engine, requests: list[Request]) -> Iterator[Step]:
    """The run's steps from the first decode step on."""
    return itertools.dropwhile(lambda step: step.kind == "prefill", engine.run(requests))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192, help="prompt tokens")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=32, help="decode steps in a burst")
    parser.add_argument("--bursts", type=int, default=12, help="bursts of each kind")
    options: Any = parser.parse_args()

    model = load_model(ModelConfig(name="tiny-random", device="cpu", dtype="float32")).model
    generator = torch.Generator().manual_seed(1)
    budget = options.steps * options.bursts + 8
    requests = [
        Request(i, torch.randint(0, 256, (options.length,), generator=generator).tolist(), budget)
        for i in range(options.batch_size)
    ]
    runs = {
        record: decoding(Engine(model, EngineOptions(batch_size=options.batch_size, record=record)), requests)
        for record in (False, True)
    }
    prefix = prefix_facts(requests, Config())
    next(runs[False])
    next(runs[True])  # prefill both, and one step to warm up

    def plain() -> float:
        begin = time.perf_counter()
        for _ in itertools.islice(runs[False], options.steps):
            pass
        return time.perf_counter() - begin

    def traced(folder: Path) -> float:
        begin = time.perf_counter()
        run = RunDir.create(folder, "bench", 64, resolved_json(Config()))
        with TraceWriter(run, TraceConfig(), seed=0, requests=requests, prefix=prefix, inputs=inputs(0)) as writer:
            for step in itertools.islice(runs[True], options.steps):
                writer.write(step)
        return time.perf_counter() - begin

    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for burst in range(options.bursts):
            where = Path(folder) / str(burst)
            if burst % 2:  # the order changes, so that the growing context hits both alike
                with_trace = traced(where)
                without = plain()
            else:
                without = plain()
                with_trace = traced(where)
            pairs.append((without, with_trace))
    records = options.steps * options.batch_size * len(model.layers)
    ratios = [with_trace / without for without, with_trace in pairs]
    cost = [(with_trace - without) / records * 1e6 for without, with_trace in pairs]
    plain_ms = statistics.median(without for without, _ in pairs) / options.steps * 1e3
    print(
        f"{options.length} prompt tokens, batch {options.batch_size}, {options.bursts} pairs of {options.steps} steps"
    )
    print(f"decode step without tracing   {plain_ms:.2f} ms")
    print(f"with / without tracing        {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"microseconds a record         {statistics.median(cost):.1f} ({min(cost):.1f} to {max(cost):.1f})")


if __name__ == "__main__":
    main()
