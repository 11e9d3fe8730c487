from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from dsakv.report.run_summary import Speed, render_run, render_tiers
from dsakv.request import TierTraffic
from dsakv.trace.selfcheck import selfcheck
from dsakv.trace.tiers import Traffic


def printed(shown: Any, width: int = 120) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(shown)
    assert max(cell_len(line) for line in out.getvalue().splitlines()) <= width
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_a_row_for_every_phase_and_tier(width: int) -> None:
    traffic = Traffic()
    tib = 1 << 40
    traffic.add(
        {
            ("prefill", "remote_pool"): TierTraffic(writes=1, write_ops=9, bytes_written=9000, write_us=3.0),
            ("warm_up", "local_pool"): TierTraffic(10, 10, 5, 10**9, 123 * tib, 1e12),
            ("decode", "hbm"): TierTraffic(hits=30, reads=2, read_ops=700, bytes_read=70, read_us=1.0),
            ("decode", "local_pool"): TierTraffic(hits=10, cold=6),
        }
    )
    shown = printed(render_tiers(traffic.transfers() | {"since_resume": True}), width)
    assert "since the run was resumed" in shown
    assert "…" not in shown
    rows = [line.replace("│", " ").split() for line in shown.splitlines() if "│" in line]
    assert [row[:2] for row in rows if row[0] in ("prefill", "warm-up", "decode")] == [
        ["prefill", "remote_pool"],
        ["warm-up", "local_pool"],
        ["decode", "hbm"],
        ["decode", "local_pool"],
    ]
    assert [row[2:4] for row in rows if row[0] == "decode"] == [["30", "75.0%"], ["10", "25.0%"]]
    words = " ".join(shown.split())
    assert "decode found 75.0% of its blocks on the device, 88.2% without the cold ones" in words
    if width == 120:
        assert "9 blocks in 1 batch " in shown
        assert "700 rows in 2 batches" in shown
        assert "135.2 TB, 0.135 GB/s" in shown


def test_without_decode_there_is_no_hit_rate() -> None:
    traffic = Traffic()
    traffic.add({("prefill", "local_pool"): TierTraffic(writes=1, write_ops=9)})
    assert "decode" not in printed(render_tiers(traffic.transfers()))
    traffic.add({("decode", "local_pool"): TierTraffic(hits=3, cold=3)})
    assert "0.0% of its blocks on the device, and all of them were cold" in printed(render_tiers(traffic.transfers()))


def test_the_run_shows_its_tiers(tmp_path: Path) -> None:
    trace_dir = selfcheck(tmp_path / "run").trace_dir
    summary = json.loads((trace_dir / "summary.json").read_bytes())
    model = {"name": "none", "random_weights": True, "n_layers": 3, "index_topk": 48}

    def shown() -> str:
        return printed(render_run(trace_dir, summary, {}, Speed(), model, "virtual"))

    assert "where KV was found and what moved" in shown()
    del summary["kv_tiers"]
    assert "where KV was found" not in shown()
