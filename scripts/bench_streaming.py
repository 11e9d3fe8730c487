"""What streaming a model's weights from disk costs: bytes, memory, speed, beside plain reads and `accelerate`.

A synthetic Llama of 4 GB in bfloat16 is made first, then run with a budget of 1 GB for its weights, each time in a
process of its own:

- a pass over the model takes at least the bytes that it reads over the speed of the disk. That speed is what plain
  sequential direct reads of the same files have in the same run, in requests as streaming makes them, before and after
  each run: disks of shared machines change their pace. Streaming's own is the bytes of decode steps over their time.
- reading and computing go on side by side, so that a step need not take longer than the longer of both. Overlap
  efficiency is that over what it took: of interest where both are of like size, so a batch is looked for that computes
  as long as it reads. Without reading ahead it is about a half to two thirds there.
- of weights that stay in memory nothing is read: half of them, half of the bytes.
- bytes as they are counted are those that were planned, and those that the system says it read for the process, up to
  what is read ahead for a next step that never comes. Greatest resident memory is the budget and 300 MB at most, for
  one sequence: KV is none of the budget.
- tokens are those of the same model with all weights in memory.
- `accelerate` offloads the same model to disk, with the same budget: so many parts of it stay as that holds beside the
  largest one. It reads through the page cache, which is dropped before each of its steps, as it would be by a model
  that is larger than memory; without that its later steps read nothing, and hold all weights in memory.

What does not depend on time must be as said, or the exit code is 1; times are printed as met or not.

    python -m scripts.bench_streaming --size-gb 4 --budget 1GB
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for `python scripts/bench_streaming.py`

from dsakv.config import WeightsConfig  # noqa: E402
from dsakv.sizes import parse_bytes  # noqa: E402
from dsakv.threads import wait_briefly  # noqa: E402
from scripts.streaming_runs import balance  # noqa: E402
from scripts.synthetic_llama import make  # noqa: E402

BESIDE = 300_000_000
"""Bytes of memory that a run may take beside its budget."""
OTHERS = 16 << 20
"""Bytes that a process may read from disk beside the weights, such as pages of libraries."""
SPEED, OVERLAP = 0.8, 0.9
ALIKE = (0.7, 1.4)
"""Computing over reading, in time, where they are of like size."""
SHORT = 4
"""Prompt tokens where many sequences run at the same time."""

Found = dict[str, Any]


class Verdicts:
    """Figures beside their targets, as they are printed."""

    def __init__(self) -> None:
        self.missed: list[str] = []
        """What had to be met whatever the machine does."""
        print(f"\n{'':54} {'measured':>12}  {'target':>12}")

    def fact(self, name: str, value: str) -> None:
        print(f"{name:54} {value:>12}")

    def time(self, name: str, value: float, target: float) -> None:
        print(f"{name:54} {value:12.2f}  {f'>= {target:.2f}':>12}  {'met' if value >= target else 'not met'}")

    def must(self, name: str, value: str, target: str, met: bool) -> None:
        print(f"{name:54} {value:>12}  {target:>12}  {'met' if met else 'MISSED'}")
        if not met:
            self.missed.append(name)


def child(kind: str, **arguments: Any) -> Found:
    """Figures of a run in a process of its own."""
    command = [sys.executable, "-m", "scripts.streaming_runs", kind]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, input=json.dumps(arguments), capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": paths})  # fmt: skip
    if done.returncode:
        sys.exit(f"{kind} {arguments} failed:\n{done.stderr}")
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


def has_accelerate() -> bool:
    return find_spec("accelerate") is not None


def measure(folder: str, budget: int, options: Any) -> Found:
    """All runs, those that are compared in turn."""
    weights = WeightsConfig()
    request = parse_bytes(weights.io_request)
    assert request is not None
    common = {"folder": folder, "tokens": options.prompt, "new_tokens": options.steps + 1}
    rounds: list[Found] = []
    theirs = has_accelerate()

    def plain() -> Found:
        return say("plain", child("plain", folder=folder, request=int(request), threads=weights.io_threads))

    for _ in range(options.rounds):
        one = {"before": plain()}
        one["stream"] = say("stream", child("stream", budget=budget, depth=1, batch=1, **common))
        one["after"] = plain()
        if theirs:
            one["accelerate"] = say("accelerate", child("offloaded", budget=budget, cold=True, **common))
        rounds.append(one)
    extra: dict[str, Found] = {}
    if theirs:
        extra["all on disk"] = say("accelerate", child("offloaded", budget=0, cold=True, **common))
        extra["page cache left to it"] = say("accelerate", child("offloaded", budget=budget, cold=False, **common))
    overlap: dict[int, list[Found]] = {1: [], 2: [], 0: []}
    batch = 0
    for _ in range(options.rounds):
        for depth, found in overlap.items():
            asked = {"folder": folder, "tokens": SHORT, "new_tokens": options.steps + 1, "batch": batch}
            found.append(say(f"overlap, depth {depth}", child("stream", budget=budget, depth=depth, **asked)))
            batch = found[-1]["batch"]
    half = child("half", folder=folder)
    half |= say("half", child("stream", budget=half["budget"], depth=1, batch=1, **common))
    resident = say("resident", child("stream", budget=None, depth=1, batch=1, **common))
    return {
        "rounds": rounds, "extra": extra, "overlap": overlap, "half": half, "resident": resident, "last": plain(),
    }  # fmt: skip


def say(name: str, found: Found) -> Found:
    """One line of a run, as soon as it is there; the figures again."""
    if "decode" in found:
        decode = found["decode"]
        line = f"batch {found['batch']}, {decode['wall_ms'] / decode['passes']:,.0f} ms a decode step"
        if decode["disk"]["busy_ms"]:
            line += (
                f", {decode['disk']['bytes'] / decode['wall_ms'] / 1e6:.2f} GB/s, computing {balance(decode):.2f} of "
                f"reading, overlap {decode['overlap_efficiency']:.3f}"
            )
    elif "decode_s" in found:
        line = f"{found['kept']} of {found['of']} parts kept, {fmean(found['decode_s']) * 1e3:,.0f} ms a decode step"
    else:
        line = f"{found['bytes_per_s'] / 1e9:.2f} GB/s"
    print(f"  {name}: {line}", flush=True)
    return found


def report(found: Found, budget: int, size: int, steps: int) -> list[str]:
    """Print all figures; names of those that had to be met and were not."""
    verdicts = Verdicts()
    rounds: list[Found] = found["rounds"]
    streams = [one["stream"] for one in rounds]
    plain = [one[name]["bytes_per_s"] for one in rounds for name in ("before", "after")]
    plain.append(found["last"]["bytes_per_s"])
    verdicts.fact("plain direct reads, GB/s", f"{median(plain) / 1e9:.2f}")
    verdicts.fact("  slowest and fastest", f"{min(plain) / 1e9:.2f} - {max(plain) / 1e9:.2f}")
    speeds = [one["decode"]["disk"]["bytes"] / one["decode"]["wall_ms"] * 1e3 for one in streams]
    verdicts.fact("streaming, decode, GB/s", f"{median(speeds) / 1e9:.2f}")
    ratios = [
        speed / fmean([one["before"]["bytes_per_s"], one["after"]["bytes_per_s"]])
        for speed, one in zip(speeds, rounds, strict=True)
    ]
    verdicts.time("  over plain reads, median of pairs", median(ratios), SPEED)
    for name in ("prefill", "decode"):
        verdicts.fact(f"overlap efficiency, {name}, batch 1", f"{_overlap(streams, name):.3f}")
    _bytes(verdicts, "budget", streams, counts_disks(found))
    peak = max(one["peak_bytes"] for one in streams)
    bound = budget + BESIDE
    verdicts.must("peak memory, MB", f"{peak / 1e6:,.0f}", f"<= {bound / 1e6:,.0f}", peak <= bound)
    verdicts.fact("  of it before any weight", f"{max(one['base_bytes'] for one in streams) / 1e6:,.0f}")
    _alike(verdicts, found["overlap"])
    half = found["half"]
    share = half["decode"]["disk"]["bytes_per_pass"] / half["whole_disk_bytes"]
    verdicts.must(f"half resident ({half['budget'] / 1e9:.2f} GB): share of bytes a step", f"{share:.3f}", "0.4 - 0.5",
                  0.4 <= share <= 0.5)  # fmt: skip
    _bytes(verdicts, "half", [half], counts_disks(found))
    peak, bound = half["peak_bytes"], half["budget"] + BESIDE
    verdicts.must("  peak memory, MB", f"{peak / 1e6:,.0f}", f"<= {bound / 1e6:,.0f}", peak <= bound)
    tokens = found["resident"]["tokens"]
    same = all(one["tokens"] == tokens for one in [*streams, half])
    verdicts.must("tokens are those of all weights in memory", "yes" if same else "no", "yes", same)
    _theirs(verdicts, found, steps)
    print(f"({size / 1e9:.2f} GB of weights, budget {budget / 1e9:.2f} GB, {os.cpu_count()} CPUs)")
    return verdicts.missed


def counts_disks(found: Found) -> bool:
    """Whether the system counts what is read from these files: memory file systems have nothing to count."""
    last = found["last"]
    return bool(last["direct"] and last["os_bytes"] >= last["bytes"])


def _overlap(runs: Sequence[Found], phase: str) -> float:
    efficiencies: list[float] = [one[phase]["overlap_efficiency"] for one in runs]
    return median(efficiencies)


def _bytes(verdicts: Verdicts, name: str, runs: Sequence[Found], counted: bool) -> None:
    """Bytes read, as planned, counted and told by the system."""
    one = runs[0]
    plan, passes = one["plan"], one["prefill"]["passes"] + one["decode"]["passes"]
    verdicts.fact(f"bytes a step, {name}, GB", f"{one['decode']['disk']['bytes_per_pass'] / 1e9:.3f}")
    planned = all(
        one["counted_bytes"] == one["planned_bytes"] == plan["pass_disk_bytes"] * passes
        and one["plan"]["pass_disk_bytes"] == plan["pass_disk_bytes"]
        for one in runs
    )
    verdicts.must("  as planned", "yes" if planned else "no", "yes", planned)
    if not counted:
        verdicts.fact("  what the system read", "not told")
        return
    ahead = plan["ahead_bytes"]
    more = [one["os_bytes"] - one["counted_bytes"] for one in runs]
    met = min(more) >= 0 and max(more) <= ahead + OTHERS
    verdicts.must("  the system read more by, MB", f"{max(more) / 1e6:,.1f}",
                  f"0 - {(ahead + OTHERS) / 1e6:,.0f}", met)  # fmt: skip


def _alike(verdicts: Verdicts, overlap: dict[int, list[Found]]) -> None:
    """Reading beside computing that takes as long."""
    for depth, runs in overlap.items():
        ratio = median(balance(one["decode"]) for one in runs)
        name = f"batch {runs[0]['batch']}, {depth} read ahead: "
        verdicts.fact(f"{name}computing over reading", f"{ratio:.2f}")
        efficiency = _overlap(runs, "decode")
        if depth == 1 and ALIKE[0] <= ratio <= ALIKE[1]:
            verdicts.time(f"{name}overlap efficiency", efficiency, OVERLAP)
        else:
            verdicts.fact(f"{name}overlap efficiency", f"{efficiency:.2f}")
        each = median(one["decode"]["wall_ms"] / one["decode"]["passes"] for one in runs)
        verdicts.fact(f"{name}ms a step", f"{each:,.0f}")
        peaks = [one["peak_bytes"] / 1e6 for one in runs]
        verdicts.fact(f"{name}peak memory, MB", f"{max(peaks):,.0f}")
        verdicts.fact("  of it KV", f"{runs[0]['kv_bytes'] / 1e6:,.0f}")


def _theirs(verdicts: Verdicts, found: Found, steps: int) -> None:
    """Beside accelerate, where that is installed."""
    rounds = found["rounds"]
    own_decode = [one["stream"]["decode_tokens"] / one["stream"]["decode"]["wall_ms"] * 1e3 for one in rounds]
    own_prefill = [1e3 / one["stream"]["prefill"]["wall_ms"] for one in rounds]
    verdicts.fact("dsakv, decode tokens/s", f"{median(own_decode):.3f}")
    verdicts.fact("dsakv, prefills/s", f"{median(own_prefill):.3f}")
    if "accelerate" not in rounds[0]:
        print("accelerate is not installed, so nothing is compared with it: `pip install accelerate` in an environment")
        print("of its own beside dsakv, or `pip install --target FOLDER accelerate` and PYTHONPATH=FOLDER")
        return
    runs = [one["accelerate"] for one in rounds]
    kept = f"{runs[0]['kept']} of {runs[0]['of']} parts in memory"
    decode, prefill = [_decode(one) for one in runs], [1 / one["prefill_s"] for one in runs]
    verdicts.fact(f"accelerate, {kept}, decode tokens/s", f"{median(decode):.3f}")
    verdicts.fact("  peak memory, MB", f"{max(one['peak_bytes'] for one in runs) / 1e6:,.0f}")
    verdicts.time("  dsakv over it, decode, median of pairs", _pairs(own_decode, decode), 1.0)
    verdicts.time("  dsakv over it, prefill, median of pairs", _pairs(own_prefill, prefill), 1.0)
    for name, one in found["extra"].items():
        verdicts.fact(f"accelerate, {name}, decode tokens/s", f"{_decode(one):.3f}")
        verdicts.fact("  dsakv over it, decode", f"{median(own_decode) / _decode(one):.2f}")
    own = rounds[0]["stream"]["tokens"]["0"]
    same = next((i for i, pair in enumerate(zip(own, runs[0]["tokens"], strict=True)) if pair[0] != pair[1]), len(own))
    verdicts.fact("  tokens that agree before the first that does not", f"{same} of {steps + 1}")


def _decode(one: Found) -> float:
    return 1 / fmean(one["decode_s"])


def _pairs(own: Sequence[float], other: Sequence[float]) -> float:
    return median(a / b for a, b in zip(own, other, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=4.0, help="of the checkpoint, in units of 10^9 bytes")
    parser.add_argument("--budget", default="1GB", help="host memory for weights")
    parser.add_argument("--dir", help="for the checkpoint, on the disk to measure; by default a temporary folder")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=8, help="decode steps")
    parser.add_argument("--rounds", type=int, default=3, help="of runs that are compared")
    parser.add_argument("--save", type=Path, help="also write every figure to this JSON file")
    options: Any = parser.parse_args()
    budget = parse_bytes(options.budget)
    if budget is None:
        parser.error(f"--budget {options.budget} is no size such as 1GB")
    wait_briefly(os.environ)  # the processes inherit it
    if options.dir is not None:
        Path(options.dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() if options.dir is None else nullcontext(options.dir) as folder:
        path = Path(folder)
        made = path / "made.json"
        wanted = {"size_gb": options.size_gb}
        if made.is_file() and json.loads(made.read_text())["wanted"] == wanted:  # of an earlier run in --dir
            size = json.loads(made.read_text())["size"]
        elif any(path.iterdir()):
            parser.error(f"--dir {folder} holds something else")
        else:
            size = make(path, int(options.size_gb * 1e9))
            made.write_text(json.dumps({"wanted": wanted, "size": size}))
        print(f"Llama of {size / 1e9:.2f} GB in bfloat16", flush=True)
        found = measure(folder, int(budget), options)
    missed = report(found, int(budget), size, options.steps)
    if options.save is not None:
        options.save.write_text(json.dumps(found))
    for name in missed:
        print(f"missed: {name.strip()}", file=sys.stderr)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
