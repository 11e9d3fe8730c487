"""What `bench_streaming.py` measures in processes of their own, so that each one's greatest resident memory is its own.

    echo '{"folder": "...", ...}' | python -m scripts.streaming_runs stream

prints its figures as one line of JSON. Page caches of the checkpoint are dropped before each run, so that what is read
comes from the disk: that is how a model is read which is larger than memory, for a cache of what was read last holds
nothing of a cyclic walk through more than it holds.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsakv.threads import wait_briefly

if TYPE_CHECKING:
    from dsakv.config import WeightsConfig
    from dsakv.jobs.bench_log import RoundLog
    from dsakv.jobs.loaded import LoadedModel

WINDOW = 64 << 20
"""Bytes of memory that a plain reading fills again and again."""
AIM = (0.85, 1.2)
"""Computing over reading, in time, as it is looked for where they are to be of like size."""
MOST = 256
"""Sequences of a batch."""
BLOCK = 16
"""Tokens of a KV block."""


def shards(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("*.safetensors"))


def drop(folder: str) -> None:
    """Take the files of a folder out of the page cache."""
    for path in Path(folder).iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes() -> int:
    """Bytes that this process has made the system read from disks so far."""
    found = re.search(r"^read_bytes: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def peak_bytes() -> int:
    """Greatest resident memory of this process."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def prompts(vocabulary: int, count: int, tokens: int) -> list[list[int]]:
    """Random token ids; the first prompt is the same for every ``count``."""
    import numpy as np

    rng = np.random.default_rng(1)
    return [rng.integers(0, vocabulary, tokens).tolist() for _ in range(count)]


def plain(folder: str, request: int, threads: int) -> dict[str, Any]:
    """All files from begin to end, direct, in requests of so many bytes, as many under way at a time as ``threads``."""
    from dsakv.weights.direct import ALIGN, DirectFiles, Extent, read_memory

    drop(folder)
    memory = memoryview(read_memory(WINDOW))
    memory[::ALIGN] = bytes(WINDOW // ALIGN)  # its pages are made now, not while time is taken
    with closing(DirectFiles(shards(folder), request=request, threads=threads)) as files:
        under_way: deque[Future[int]] = deque()
        before, begin, at = read_bytes(), time.perf_counter(), 0
        for number, size in enumerate(files.sizes):
            for first in range(0, size, request):
                if len(under_way) == WINDOW // request:
                    under_way.popleft().result()
                under_way += files.read(Extent(number, first, min(first + request, size)), memory[at:])
                at = (at + request) % (WINDOW // request * request)
        files.wait(under_way)
        seconds = time.perf_counter() - begin
        return {
            "bytes": sum(files.sizes),
            "bytes_per_s": sum(files.sizes) / seconds,
            "os_bytes": read_bytes() - before,
            "direct": files.direct,
        }


def weights_config(budget: int, depth: int) -> WeightsConfig:
    from dsakv.config import WeightsConfig

    return WeightsConfig(host_budget=f"{budget}B", prefetch_depth=depth)


def half(folder: str) -> dict[str, Any]:
    """The least budget with which a pass reads at most half of what it reads without a budget to keep anything."""
    from dsakv.config import ModelConfig, WeightsConfig
    from dsakv.console import Console
    from dsakv.distributed import ALONE
    from dsakv.jobs.model import prepared_model

    def reads(weights: WeightsConfig) -> int:
        config = ModelConfig(ckpt_path=folder, device="cpu", dtype="bfloat16")
        with prepared_model(config, ALONE, Console(), weights) as prepared:
            assert prepared.planned is not None
            return prepared.planned.plan.pass_disk_bytes

    size = sum(path.stat().st_size for path in shards(folder))
    whole = reads(WeightsConfig(host_budget=f"{2 * size}B", residency="none"))
    low, high = size // 3, 2 * size
    while high - low > size // 200:
        middle = (low + high) // 2
        low, high = (low, middle) if reads(weights_config(middle, 1)) <= whole / 2 else (middle, high)
    return {"budget": high, "pass_disk_bytes": reads(weights_config(high, 1)), "whole_disk_bytes": whole}


def run(loaded: LoadedModel, batch: int, tokens: int, new_tokens: int) -> RoundLog:
    """Run so many prompts at the same time, greedily."""
    from dsakv.engine.engine import Engine
    from dsakv.engine.options import EngineOptions
    from dsakv.jobs.bench import run_round
    from dsakv.request import Request

    ids = prompts(loaded.model.vocab_size, batch, tokens)
    engine = Engine(loaded.model, EngineOptions(batch_size=batch, block_size=BLOCK, temperature=0.0),
                    weights=loaded.weights)  # fmt: skip
    return run_round(engine, [Request(i, one, new_tokens) for i, one in enumerate(ids)], lambda done: None)


def balance(found: dict[str, Any]) -> float:
    """Time that passes computed over time that they read, from what ``links`` says of them."""
    return float((found["wall_ms"] - found["wait_ms"]) / found["disk"]["busy_ms"])


def balanced(loaded: LoadedModel, tokens: int) -> int:
    """The batch of which a decode step computes for about as long as it reads."""
    from dsakv.jobs.bench_metrics import links

    tried: dict[int, float] = {}
    batch = 1
    while 1 <= batch <= MOST and batch not in tried:
        tried[batch] = balance(links(run(loaded, batch, tokens, 4).of("decode")))
        if AIM[0] <= tried[batch] <= AIM[1]:
            break
        below = max((one for one, found in tried.items() if found < 1), default=0)
        above = min((one for one, found in tried.items() if found > 1), default=0)
        batch = round(math.sqrt(below * above)) if below and above else below * 4
    return min(tried, key=lambda one: abs(math.log(tried[one])))


def stream(folder: str, budget: int | None, depth: int, batch: int, tokens: int, new_tokens: int) -> dict[str, Any]:
    """dsakv; all weights in memory without ``budget``, and with ``batch`` 0 one that computing and reading share."""
    from dsakv.config import ModelConfig, WeightsConfig
    from dsakv.jobs.bench_metrics import links
    from dsakv.jobs.model import load_model

    drop(folder)
    base = peak_bytes()
    weights = WeightsConfig() if budget is None else weights_config(budget, depth)
    loaded = load_model(ModelConfig(ckpt_path=folder, device="cpu", dtype="bfloat16"), weights=weights)
    with closing(loaded):
        batch = batch or balanced(loaded, tokens)
        if budget is None:
            run(loaded, batch, tokens, 2)  # mapped weights are there from now on
        before = read_bytes()
        log = run(loaded, batch, tokens, new_tokens)
    moved = read_bytes() - before  # those under way at the end are done now
    streamer, facts = loaded.streamer, loaded.describe()
    rows = batch * -(-(tokens + new_tokens) // BLOCK) * BLOCK * facts["n_layers"]
    return {
        "batch": batch,
        "plan": None if streamer is None else streamer.plan.describe(),
        "direct": streamer is not None and streamer.direct,
        "prefill": links(log.of("prefill")),
        "decode": links(log.of("decode")),
        "counted_bytes": sum(one.weights.disk_bytes for one in log.passes if one.weights),
        "planned_bytes": sum(one.weights.planned_bytes for one in log.passes if one.weights),
        "os_bytes": moved,
        "decode_tokens": log.decode_tokens,
        "tokens": log.tokens,
        "kv_bytes": rows * facts["kv_bytes_per_token_layer"],
        "base_bytes": base,
        "peak_bytes": peak_bytes(),
    }


def offloaded(folder: str, budget: int, tokens: int, new_tokens: int, cold: bool) -> dict[str, Any]:
    """accelerate's disk offload of the same model, which reads the safetensors files in place.

    So many layers, embedding and head stay in memory as ``budget`` bytes hold beside the largest of them, which is
    loaded while it computes; 0 leaves all on disk. ``cold`` drops the page cache before each step, while no time is
    taken.
    """
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    drop(folder)
    base = peak_bytes()
    config = LlamaConfig.from_pretrained(folder)
    kept = resident(config, budget)
    every = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(config.num_hidden_layers)), "lm_head"]
    places: dict[str, Any] = {name: "cpu" if name in kept else "disk" for name in every}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu"}
    seconds = []
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        model = LlamaForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, device_map=places, offload_folder=scratch
        )
        model.eval()  # type: ignore[no-untyped-call]
        cache = DynamicCache(config=model.config)
        ids, found = torch.tensor(prompts(config.vocab_size, 1, tokens)), list[int]()
        drop(folder)
        before = read_bytes()
        for _ in range(new_tokens):
            if cold:
                drop(folder)
            begin = time.perf_counter()
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            found.append(int(logits[0, -1].argmax()))
            seconds.append(time.perf_counter() - begin)
            ids = torch.tensor([found[-1:]])
        left = any(Path(scratch).iterdir())
    return {
        "kept": len(kept),
        "of": len(every),
        "prefill_s": seconds[0],
        "decode_s": seconds[1:],
        "os_bytes": read_bytes() - before,
        "tokens": found,
        "copied": left,
        "base_bytes": base,
        "peak_bytes": peak_bytes(),
    }


def resident(config: Any, budget: int) -> set[str]:
    """Parts of a Llama in bfloat16 that stay in memory, the largest first; those of a size evenly spread."""
    d, heads = config.hidden_size, config.num_attention_heads
    kv = d // heads * config.num_key_value_heads
    layer = 2 * (2 * d * d + 2 * d * kv + 3 * d * config.intermediate_size + 2 * d)
    vocabulary = 2 * d * config.vocab_size
    sizes = {"model.embed_tokens": vocabulary, "lm_head": vocabulary}
    sizes |= {f"model.layers.{i}": layer for i in range(config.num_hidden_layers)}
    left, kept = budget - max(sizes.values()), set[str]()
    for name, size in sizes.items():
        if size <= left:
            kept.add(name)
            left -= size
    return kept


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "plain": plain,
    "half": half,
    "stream": stream,
    "offloaded": offloaded,
}


def main() -> None:
    wait_briefly(os.environ)
    print(json.dumps(KINDS[sys.argv[1]](**json.load(sys.stdin))))


if __name__ == "__main__":
    main()
