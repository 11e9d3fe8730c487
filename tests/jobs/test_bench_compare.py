"""`dsakv bench --compare`: two configurations in turn."""

from __future__ import annotations

import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dsakv.config import BenchConfig, Config, EngineConfig, KvConfig, LaunchConfig, ModelConfig, WeightsConfig
from dsakv.console import Console
from dsakv.errors import DsakvError, InputError
from dsakv.jobs.bench import bench
from dsakv.jobs.bench_compare import check_flags, compare, compared, differences, read_config
from dsakv.jobs.prompts import read_text
from dsakv.report.bench_report import render_comparison


def config(**options: Any) -> Config:
    return Config(
        model=ModelConfig(name="tiny-random", device="cpu"),
        engine=EngineConfig(max_new_tokens=2, temperature=0.0),
        bench=BenchConfig(**{"input_len": 8, "warmup_rounds": 0, "rounds": 7} | options),
    )


def written(path: Path, config: Config, *, results: bool = False) -> str:
    tree = msgspec.to_builtins(config)
    path.write_text(json.dumps({"config": tree, "rounds": []} if results else tree))
    return str(path)


def quiet() -> Console:
    return Console(io.StringIO(), io.StringIO())


def test_two_configurations_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real processes: A, then B, with the rounds of the comparison and not with their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    files = written(tmp_path / "a.json", config()), written(tmp_path / "b.json", config(input_len=16), results=True)
    document = compare(BenchConfig(compare=files, rounds=1, json=True), Console(stderr=io.StringIO()))
    (out,) = tmp_path.glob("outputs/bench-compare_*/bench_compare.json")
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_bytes())
    assert (document["pairs"], document["same_tokens"]) == (1, False)
    sides = [document[side]["rounds"] for side in ("a", "b")]
    assert [[one["prompt_tokens"] for one in rounds] for rounds in sides] == [[8], [16]]
    assert document["figures"]["prompt_tokens"]["ratio"]["median"] == 2
    assert [document[side]["path"] for side in ("a", "b")] == list(files)
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {out.parent.name}, "rounds leave nothing"


class Children:
    """Stands in for the processes; notes who was run, with which configuration."""

    def __init__(self, code: int = 0, said: str = "") -> None:
        self.code, self.said = code, said
        self.ran: list[Config] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "dsakv.worker", "bench"]
        given = msgspec.json.decode(Path(command[4]).read_bytes(), type=Config)
        self.ran.append(given)
        if not self.code:
            assert given.bench.out_json
            figures = figures_of(len(self.ran), given.bench.input_len)
            Path(given.bench.out_json).write_text(json.dumps({"rounds": [figures]}))
        return subprocess.CompletedProcess(command, self.code, "", self.said)


def figures_of(e2e_ms: float, tokens: int) -> dict[str, Any]:
    return {
        "e2e_ms": e2e_ms,
        "ttft_ms": {"mean": 1.0},
        "tpot_ms": {"mean": None},
        "throughput_tok_s": 2.0,
        "output_digest": str(tokens),
    }


def test_rounds_come_as_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children()
    monkeypatch.setattr(subprocess, "run", children)
    secret = KvConfig(hot_capacity="4", remote="redis://me:word@127.0.0.1:1/0")
    files = (
        written(tmp_path / "a.json", config(verbose=True, json=True, out_json="mine.json")),
        written(tmp_path / "b.json", msgspec.structs.replace(config(input_len=9), kv=secret)),
    )
    log, out = io.StringIO(), tmp_path / "out.json"
    asked = BenchConfig(compare=files, rounds=3, out_json=str(out), verbose=True)
    document = compare(asked, Console(io.StringIO(), log))
    assert [one.bench.input_len for one in children.ran] == [8, 9] * 3
    assert all(one.bench.rounds == 1 and not one.bench.json and not one.bench.verbose for one in children.ran)
    assert children.ran[1].kv.remote == secret.remote
    ratio = document["figures"]["e2e_ms"]["ratio"]  # 2/1, 4/3, 6/5
    assert ratio == {"median": 4 / 3, "min": 1.2, "max": 2.0, "spread": pytest.approx(0.6)}
    assert document["figures"]["e2e_ms"]["a"]["median"] == 3
    assert document["figures"]["tpot_ms.mean"]["ratio"]["median"] is None
    assert "pair 2, B: 6 ms" in log.getvalue()
    assert "word" not in out.read_text()


def test_the_table_shows_what_either_has() -> None:
    a, b = [figures_of(10.0, 1)], [figures_of(5.0, 1)]
    config = Config()
    other = msgspec.structs.replace(config, weights=WeightsConfig(host_budget="1GB"))
    document = compared(a, b) | {"a": {"path": "x.json"}, "b": {"path": "y.json"}}
    document["differences"] = differences(config, other)
    assert document["differences"] == {"weights.host_budget": [None, "1GB"]}
    assert document["same_tokens"]
    out = io.StringIO()
    Console(out, io.StringIO()).print_table(render_comparison(document))
    rows = {line.split()[0]: line.split()[1:] for line in out.getvalue().splitlines() if line.strip()}
    assert rows["e2e_ms"] == ["10", "5", "0.50", "0.50", "0.50", "-"]
    assert "tpot_ms.mean" not in rows
    assert "the same tokens" in out.getvalue()
    assert "differ in weights.host_budget: none / 1GB" in out.getvalue()


def test_ratios_on_both_sides_of_1_decide_nothing() -> None:
    a, b = [figures_of(10.0, 1), figures_of(10.0, 1)], [figures_of(5.0, 1), figures_of(12.0, 1)]
    document = compared(a, b) | {"a": {"path": "x.json"}, "b": {"path": "y.json"}, "differences": {}}
    out = io.StringIO()
    Console(out, io.StringIO()).print_table(render_comparison(document))
    assert "0.85 ?" in out.getvalue()
    assert "differ in nothing" in out.getvalue()


def test_nothing_is_overwritten(small_checkpoint: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.json"
    there.write_text("{}")
    with pytest.raises(DsakvError, match="is there already"):
        bench(Config(bench=BenchConfig(out_json=str(there))), Console(io.StringIO(), io.StringIO()))
    assert there.read_text() == "{}"


@pytest.mark.parametrize(
    ("code", "said", "kind", "message"),
    [
        (2, "loading ...\nerror: no such thing\nhint: make one\n", InputError, "code 2: no such thing"),
        (1, "error: the results are rejected\nhint: do not\n", DsakvError, "code 1: the results are rejected"),
        (1, "Traceback\n  File\nValueError: bug\n", DsakvError, "ValueError: bug"),
        (-9, "", DsakvError, "code -9: nothing"),
    ],
)
def test_a_round_that_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: str, kind: type[DsakvError], message: str
) -> None:
    monkeypatch.setattr(subprocess, "run", Children(code, said))
    files = (written(tmp_path / "a.json", config()), written(tmp_path / "b.json", config()))
    with pytest.raises(kind, match="configuration A failed") as caught:
        compare(BenchConfig(compare=files, out_json=str(tmp_path / "out.json")), quiet())
    assert type(caught.value) is kind
    assert message in caught.value.message
    assert not (tmp_path / "out.json").exists()


def test_files_without_a_configuration(tmp_path: Path) -> None:
    for content in (b"", b"[1]", b'{"model": 1}', b'{"nope": {}}', b'{"config": []}', b"\xff"):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(InputError, match=r"x\.json"):
            read_config(tmp_path / "x.json")
    with pytest.raises(InputError, match="cannot read"):
        read_config(tmp_path / "none.json")
    masked = Config(kv=KvConfig(hot_capacity="4", remote="redis://***@host:1/0"))
    with pytest.raises(InputError, match="password"):
        read_config(Path(written(tmp_path / "m.json", masked)))
    with pytest.raises(InputError, match="for 2 machines"):
        read_config(Path(written(tmp_path / "n.json", Config(launch=LaunchConfig(nnodes=2)))))


def test_what_means_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_flags(["--compare", "--rounds", "--out-json", "--json", "--verbose"])
    with pytest.raises(InputError, match="--num-prompts does nothing with --compare"):
        check_flags(["--compare", "--num-prompts"])
    with pytest.raises(InputError, match="takes two files, not 1"):
        compare(BenchConfig(compare=("a.json",)), quiet())
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(InputError, match="starts its rounds itself"):
        compare(BenchConfig(compare=("a.json", "b.json")), quiet())


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(InputError, match="is no file"):
        read_config(tmp_path / "pipe.json")


def test_a_path_that_no_file_can_have_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        read_text(tmp_path / "a\0b", "name a file")
