"""Made-up batches of what decode asks a tiered cache for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dsakv.analysis.kv_steps import KvSteps


def batches(layers: int, seed: int, steps: int = 60) -> Iterator[KvSteps]:
    """Requests of ten to thirty blocks of 2 tokens come and go, two to four at a time; some layer-steps ask for
    nothing, blocks fill, and ids of ended requests are used again.
    """
    rng = np.random.default_rng(seed)
    free = list(range(150))
    running: list[tuple[list[int], int]] = []  # the blocks in use, steps to go
    step = 0
    while step < steps:
        parts: dict[str, list[int]] = {name: [] for name in ("layer", "engine_step", "count", "ids", "written")}
        ended: list[tuple[int, np.ndarray[tuple[int], np.dtype[np.int64]]]] = []
        for _ in range(int(rng.integers(1, 8))):
            while len(running) < 2 or (len(running) < 4 and rng.random() < 0.3):
                blocks, free = free[: (n := int(rng.integers(10, 30)))], free[n:]
                running.append((blocks, int(rng.integers(3, 20))))
            filled = [free.pop(0) if step % 2 else -1 for _ in running]
            for layer in range(layers):
                wanted: dict[int, bool] = {}
                for (blocks, _), new in zip(running, filled, strict=True):
                    size = int(rng.integers(0, len(blocks))) if rng.random() < 0.9 else 0
                    wanted.update(dict.fromkeys(rng.choice(blocks, size, replace=False).tolist(), False))
                    wanted.update({new: True} if new >= 0 else {})
                ids = sorted(wanted)
                parts["layer"].append(layer)
                parts["engine_step"].append(step)
                parts["count"].append(len(ids))
                parts["ids"] += ids
                parts["written"] += [wanted[block] for block in ids]
            running = [(b + ([n] if n >= 0 else []), left - 1) for (b, left), n in zip(running, filled, strict=True)]
            gone = sorted(block for blocks, left in running if not left for block in blocks)
            if gone:
                ended.append((len(parts["layer"]), np.array(gone)))
                running, free = [one for one in running if one[1]], free + gone
            step += 1
        columns = {name: np.array(values, dtype=np.int64) for name, values in parts.items()}
        counts = np.zeros(len(columns["layer"]), dtype=np.int64)
        yield KvSteps(
            layer=columns["layer"],
            engine_step=columns["engine_step"],
            offsets=np.concatenate([[0], np.cumsum(columns["count"])]),
            ids=columns["ids"],
            written=columns["written"].astype(np.bool_),
            touched=counts,
            open_touched=counts,
            queries=counts + 2,
            rows=counts,
            begins=[],
            ended=ended,
        )
