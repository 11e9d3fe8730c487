"""Tiered runs as analyze sees them: their own counts beside those of the replay."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest
from rich.console import Console

from dsakv.analysis.replay import ReplayOptions
from dsakv.config import AnalyzeConfig
from dsakv.errors import DsakvError
from dsakv.policies import POLICIES
from dsakv.policies.placement import LOCAL, REMOTE, PlacementOptions
from dsakv.report import html, terminal
from dsakv.request import TIERS
from tests.analysis.kv_runs import Run, run_engine
from tests.analysis.tiers_oracle import SlowTiers
from tests.analysis.traces import run as analyze

OPTIONS = ReplayOptions(
    PlacementOptions(2, POLICIES["s3fifo"](), 3, "shared", home=REMOTE, local=4), write="back", warm=True
)
BLOCK_BYTES, ROW_BYTES = 400, 100


def tiered_run(folder: Path, options: ReplayOptions = OPTIONS, **meta: Any) -> tuple[Run, Path]:
    """A run on a made-up engine with tiers, which counts with the slow replay; its trace is at the second."""
    made = run_engine(11, requests=6, batch_size=3, block_size=4, layers=2)
    tiers = options.tiers
    described = {
        "policy": next(name for name, policy in POLICIES.items() if type(tiers.policy) is policy),
        "scope": tiers.scope,
        "hot_blocks": tiers.hot,
        "local_blocks": tiers.local if tiers.home == REMOTE else made.n_blocks,
        "home": TIERS[tiers.home],
        "write": options.write,
        "start": "warm" if options.warm else "cold",
        "n_blocks": made.n_blocks,
        "block_bytes": BLOCK_BYTES,
    }
    trace = made.write(folder, 2, **{"kv_tiers": described, **meta})
    (folder / "config.json").write_bytes(orjson.dumps({"serving": {"prefix_cache": False}}))
    (trace / "summary.json").write_bytes(
        orjson.dumps({"kv_tiers": {"transfers": {"decode": transfers(made, options)}}})
    )
    return made, trace


def transfers(made: Run, options: ReplayOptions) -> dict[str, dict[str, Any]]:
    counts: Counter[tuple[int, str]] = Counter()
    for (phase, _, tier, name), count in SlowTiers(options).replay(made).counts.items():
        if phase == "decode":
            counts[tier, name] += count
    found: dict[str, dict[str, Any]] = {}
    for tier, name in enumerate(TIERS):
        figures = {f: counts[tier, f] for f in ("hits", "cold", "reads", "read_ops", "writes", "write_ops")}
        figures["bytes_read"] = figures["read_ops"] * (BLOCK_BYTES if tier else ROW_BYTES)
        figures["bytes_written"] = figures["write_ops"] * BLOCK_BYTES
        if any(figures.values()):
            found[name] = {**figures, "read_ms": 1.5, "read_gb_s": None}
    found["hbm"]["reads"] = 77
    return found


def checked(trace: Path, **config: Any) -> dict[str, Any]:
    (result,) = analyze(trace, AnalyzeConfig(**config))
    return result


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"sink_recent"}))
@pytest.mark.parametrize("write", ["through", "back"])
def test_a_run_and_its_replay_agree(tmp_path: Path, policy: str, write: Any) -> None:
    for number, (home, local) in enumerate(((LOCAL, 0), (REMOTE, 0), (REMOTE, 4))):
        scope: Any = ("layer", "shared")[number % 2]
        tiers = PlacementOptions(2, POLICIES[policy](), 3, scope, home=home, local=local)
        options = ReplayOptions(tiers, write, warm=number == 0)
        made, trace = tiered_run(tmp_path / f"{number}", options)
        result = checked(trace)
        tiers_found = result["kv_tiers"]
        assert tiers_found["agree"] is True, tiers_found["reason"]
        assert tiers_found["reason"] is None
        assert tiers_found["measured"] == transfers(made, options)
        assert not [warning for warning in result["warnings"] if "tiers" in warning]


def test_a_difference_is_a_warning(tmp_path: Path) -> None:
    made, trace = tiered_run(tmp_path)
    wrong = transfers(made, OPTIONS)
    wrong["hbm"]["hits"] += 1
    (trace / "summary.json").write_bytes(orjson.dumps({"kv_tiers": {"transfers": {"decode": wrong}}}))
    result = checked(trace)
    assert result["kv_tiers"]["agree"] is False
    assert f"hbm hits: measured {wrong['hbm']['hits']}, replayed {wrong['hbm']['hits'] - 1}" in result["warnings"][-1]
    shown = printed(result)
    assert "They disagree: hbm hits" in shown


def unfinished(folder: Path, trace: Path) -> None:
    path = folder / "requests.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def cut_short(folder: Path, trace: Path) -> None:
    """Two requests had no record on disk when the run stopped."""
    change_meta(trace, inputs={"kept": 8})


def resumed(folder: Path, trace: Path) -> None:
    summary = orjson.loads((trace / "summary.json").read_bytes())
    summary["kv_tiers"]["transfers"]["since_resume"] = True
    (trace / "summary.json").write_bytes(orjson.dumps(summary))


def without_end(folder: Path, trace: Path) -> None:
    (trace / "summary.json").unlink()


def change_meta(folder: Path, **change: Any) -> None:
    path = folder / "run_meta.json"
    path.write_bytes(orjson.dumps(orjson.loads(path.read_bytes()) | change))


def sampled(folder: Path, trace: Path) -> None:
    change_meta(trace, trace={"sample_rate": 0.5})


def unknown_policy(folder: Path, trace: Path) -> None:
    change_meta(trace, kv_tiers={"policy": "magic"})


def without_tables(folder: Path, trace: Path) -> None:
    path = folder / "requests.jsonl"
    lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    path.write_bytes(b"".join(orjson.dumps({**line, "kv_blocks": None}) + b"\n" for line in lines))


def with_a_gap(folder: Path, trace: Path) -> None:
    path = trace / "trace_steps_0_1.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2] + lines[3:]))


@pytest.mark.parametrize(
    ("spoil", "reason", "replayed"),
    [
        (unfinished, "1 request did not finish", True),
        (cut_short, "2 requests did not finish", True),
        (resumed, "resumed", True),
        (without_end, "did not come to its end", True),
        (with_a_gap, "1 decode step lacks records", True),
        (sampled, "50% of the decode steps", False),
        (unknown_policy, "not known tiers", False),
        (without_tables, "no block tables", False),
    ],
)
def test_what_cannot_be_exact_says_why(tmp_path: Path, spoil: Any, reason: str, replayed: bool) -> None:
    _, trace = tiered_run(tmp_path)
    spoil(tmp_path, trace)
    result = checked(trace)
    assert result["kv_tiers"]["agree"] is None
    assert reason in result["kv_tiers"]["reason"]
    assert (result["kv_tiers"]["replayed"] is not None) == replayed
    damaged = spoil in (unknown_policy, without_tables)
    assert result["kv_tiers"]["damaged"] == any("cannot be replayed" in said for said in result["warnings"]) == damaged
    assert f"Not compared: {result['kv_tiers']['reason']}" in printed(result)


def test_other_block_sizes_and_runs_without_tiers_have_none(tmp_path: Path) -> None:
    _, trace = tiered_run(tmp_path / "tiered")
    assert checked(trace, block_size=8)["kv_tiers"] is None
    first, second = analyze(trace, AnalyzeConfig(block_sizes=(8, 4)))
    assert (first["kv_tiers"], second["kv_tiers"]["agree"]) == (None, True)
    plain = run_engine(2, requests=2, batch_size=2, block_size=4).write(tmp_path / "plain")
    assert checked(plain)["kv_tiers"] is None


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, trace = tiered_run(tmp_path)
    read_bytes = Path.read_bytes

    def broken(path: Path) -> bytes:
        if path.name == "summary.json":
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", broken)
    with pytest.raises(DsakvError, match="Permission denied"):
        checked(trace)


def printed(result: dict[str, Any]) -> str:
    """What the terminal shows, on one line."""
    out = io.StringIO()
    Console(file=out, width=100, force_terminal=False).print(terminal.render({"results": [result]}))
    return " ".join(out.getvalue().split())


def test_reports_show_what_was_found_where(tmp_path: Path) -> None:
    made, trace = tiered_run(tmp_path)
    result = checked(trace)
    found = transfers(made, OPTIONS)
    total, cold = (sum(tier[name] for tier in found.values()) for name in ("hits", "cold"))
    near = found["hbm"]["hits"]
    page = html.render({"results": [result]})
    for shown in (printed(result), page):
        assert "KV tiers in decode" in shown
        assert f"Hit rate {near / total:.1%}; {near / (total - cold):.1%} without the {cold:,} blocks" in shown
        assert "others can be tried on this trace" in shown
    for words, name in (("the device", "hbm"), ("host memory", "local_pool"), ("the remote pool", "remote_pool")):
        count = f"{found[name]['hits']:,}"
        assert f"{words} {count} {count}" in printed(result)
        assert f'<td class="words">{words}</td><td>{count}</td><td>{count}</td>' in page
