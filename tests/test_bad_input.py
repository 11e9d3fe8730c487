"""What users get wrong: one line of error, one of hint, the right exit code, and nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsakv.cli import run

GENERATE = "generate --ckpt-path model --device cpu --prompt hello --max-new-tokens 4 --trace-enable --trace-out out"
FILE = "generate --ckpt-path model --device cpu --max-new-tokens 4 --json --trace-enable --trace-out out --input-file "
RULER = "trace ruler --ckpt-path model --device cpu --max-new-tokens 4 --trace-out out"
TRACE = f"{RULER} --ruler-data rows.jsonl"
ROW = '{"input": "some text", "outputs": ["text"], "answer_prefix": ""}\n'
GATE = "model.layers.1.mlp.gate.weight"
INDEX = "model/model.safetensors.index.json"


class Case(NamedTuple):
    """A command line in a folder with a good checkpoint ``model`` and good RULER rows ``rows.jsonl``."""

    command: str
    code: int
    message: str
    prepare: Callable[[], object] = lambda: None
    """What makes the folder bad."""
    environ: Mapping[str, str] = MappingProxyType({})
    more: tuple[str, ...] = ()
    """Arguments that hold spaces or nothing."""


def put(path: str, content: str | bytes) -> Callable[[], object]:
    def prepare() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)

    return prepare


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[], object]:
    """The checkpoint with other tensors."""

    def prepare() -> None:
        found = load_file("model/model.safetensors")
        change(found)
        save_file(found, "model/model.safetensors")

    return prepare


def config(**values: Any) -> Callable[[], object]:
    """The checkpoint with other values in its config.json; None takes the key out."""

    def prepare() -> None:
        path = Path("model/config.json")
        changed = json.loads(path.read_text()) | values
        path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))

    return prepare


def remove(path: str) -> Callable[[], object]:
    return lambda: Path(path).unlink()


def truncate(path: str, keep: float) -> Callable[[], object]:
    return lambda: os.truncate(path, int(Path(path).stat().st_size * keep))


def trace(*positions: list[int] | None, tail: str = "") -> Callable[[], object]:
    """A trace in ``out`` with a record for each selection; None stands for one that was not stored."""
    lines = b""
    for step, selected in enumerate(positions):
        record: dict[str, Any] = {"request_id": 0, "layer_id": 0, "step_idx": step, "seq_len_current": 90 + step}
        if selected is not None:
            record["selected_token_pos"] = selected
        lines += orjson.dumps(record) + b"\n"
    return put("out/block64/trace_steps_0_4.jsonl", lines + tail.encode())


CHECKPOINTS = {
    "no checkpoint": Case(GENERATE, 2, "no checkpoint at model", lambda: shutil.rmtree("model")),
    "no shards": Case(GENERATE, 2, "model holds no .safetensors file", remove("model/model.safetensors")),
    "missing shard": Case(
        GENERATE,
        2,
        "checkpoint shard model/gone.safetensors is missing",
        put(INDEX, json.dumps({"weight_map": {GATE: "gone.safetensors"}})),
    ),
    "truncated shard": Case(
        GENERATE,
        2,
        "checkpoint shard model/model.safetensors cannot be read",
        truncate("model/model.safetensors", 0.5),
    ),
    "empty shard": Case(GENERATE, 2, "cannot be read", truncate("model/model.safetensors", 0)),
    "wrong shape": Case(
        GENERATE,
        2,
        f"tensor {GATE} in model has shape [64, 8], the model needs [8, 64]",
        tensors(lambda t: t.update({GATE: torch.zeros(64, 8)})),
    ),
    "integers": Case(
        GENERATE,
        2,
        f"tensor {GATE} in model has dtype I64",
        tensors(lambda t: t.update({GATE: torch.zeros(8, 64, dtype=torch.int64)})),
    ),
    "fp8": Case(
        GENERATE,
        2,
        f"model lacks tensor {GATE}_scale_inv, the scales of {GATE}",
        tensors(lambda t: t.update({GATE: torch.zeros(8, 64).to(torch.float8_e4m3fn)})),
    ),
    "surplus tensor": Case(
        GENERATE,
        2,
        "model holds tensor more that the model has no place",
        tensors(lambda t: t.update(more=torch.zeros(1))),
    ),
    "missing tensor": Case(GENERATE, 2, f"model lacks tensor {GATE}", tensors(lambda t: t.pop(GATE))),
    "damaged index": Case(GENERATE, 2, f"{INDEX} is damaged", put(INDEX, '{"weight_map": {')),
    "no tokenizer": Case(GENERATE, 2, "no tokenizer.json in model", remove("model/tokenizer.json")),
    "damaged tokenizer": Case(GENERATE, 2, "cannot load the tokenizer in model", truncate("model/tokenizer.json", 0.5)),
    "damaged end of sequence": Case(
        GENERATE, 2, "generation_config.json is broken", put("model/generation_config.json", '{"eos_token_id": "x"}')
    ),
    "template that refuses": Case(
        GENERATE, 2, "chat template refuses", put("model/chat_template.jinja", "{{ raise_exception('no') }}")
    ),
    "numbers that overflow": Case(
        f"{TRACE} --temperature 0",
        1,
        "the model's logits are not finite",
        tensors(lambda t: t["model.layers.0.mlp.down_proj.weight"].fill_(torch.nan)),
    ),
}

CONFIGS = {
    "no config": Case(GENERATE, 2, "no model config at model/config.json", remove("model/config.json")),
    "no JSON": Case(GENERATE, 2, "cannot read model config model/config.json", put("model/config.json", "{hidden")),
    "no object": Case(GENERATE, 2, "model/config.json is no JSON object", put("model/config.json", "[1]")),
    "unknown family": Case(GENERATE, 2, "model_type 'qwen3' is not supported", config(model_type="qwen3")),
    "missing key": Case(GENERATE, 2, "model/config.json: 'index_topk' is missing", config(index_topk=None)),
    "wrong type": Case(GENERATE, 2, "Expected `int`, got `str`", config(hidden_size="64")),
    "YaRN without length": Case(
        GENERATE,
        2,
        "YaRN without original_max_position_embeddings",
        config(rope_scaling={"type": "yarn", "factor": 8}),
    ),
    "other rope": Case(GENERATE, 2, "rope type 'llama3'", config(rope_scaling={"rope_type": "llama3"})),
    "rope that is no object": Case(GENERATE, 2, "$.rope_scaling", config(rope_scaling="yarn")),
    "impossible groups": Case(GENERATE, 2, "8 routed experts do not divide into 3 groups", config(n_group=3)),
    "unknown key of DeepSeek's form": Case(
        f"{GENERATE} --config own.json",
        2,
        "own.json: unknown key 'n_layer'",
        put("own.json", '{"n_layer": 3, "index_topk": 16}'),
    ),
    "missing key of DeepSeek's form": Case(
        f"{GENERATE} --config own.json", 2, "missing required field `vocab_size`", put("own.json", '{"index_topk": 16}')
    ),
    "config of another model": Case(
        f"{GENERATE} --config own.json", 2, "model_type None is not supported", put("own.json", '{"dim": 16}')
    ),
    "no such config": Case(f"{GENERATE} --config nothing", 2, "no model config nothing"),
    "config without checkpoint": Case("generate --prompt hello --config own.json", 2, "--config without --ckpt-path"),
}

SETTINGS = {
    "unknown preset key": Case(
        f"{TRACE} --preset p.toml", 2, "p.toml: unknown key [engine] batchsize", put("p.toml", "[engine]\nbatchsize=2")
    ),
    "unknown preset section": Case(
        f"{TRACE} --preset p.toml", 2, "p.toml: unknown section [engines]", put("p.toml", "[engines]\n")
    ),
    "wrong preset type": Case(
        f"{TRACE} --preset p.toml", 2, "batch_size must be an integer >= 1", put("p.toml", '[engine]\nbatch_size="2"')
    ),
    "no TOML": Case(f"{TRACE} --preset p.toml", 2, "preset p.toml is no TOML", put("p.toml", "[engine")),
    "no preset": Case(f"{TRACE} --preset p.toml", 2, "cannot read preset p.toml"),
    "unknown variable": Case(
        TRACE, 2, "unknown variable DSAKV_ENGINE_BATCHSIZE", environ={"DSAKV_ENGINE_BATCHSIZE": "2"}
    ),
    "unknown old variable": Case(TRACE, 2, "unknown variable DS_TRACE_RATE", environ={"DS_TRACE_RATE": "1"}),
    "wrong variable": Case(TRACE, 2, "LIMIT must be an integer >= 1", environ={"LIMIT": "many"}),
    "variables at odds": Case(TRACE, 2, "set the same key", environ={"LIMIT": "3", "DSAKV_WORKLOAD_LIMIT": "4"}),
    "tracing off": Case(TRACE, 2, "tracing is switched off", environ={"DS_TRACE_ENABLE": "0"}),
    "unknown flag": Case(f"{TRACE} --batch-sizes 2", 2, "--batch-sizes"),
    "old flag": Case(f"{TRACE} --split validation", 2, "--split"),
    "flag without value": Case(f"{RULER} --batch-size", 2, "--batch-size"),
    "unknown workload": Case("trace squad", 2, "squad"),
    **{
        f"{flag} {value}": Case(f"{TRACE} {flag} {value}", 2, f"{flag} must be ")
        for flag, value in [
            ("--kv-block-size", "0"),
            ("--kv-block-size", "-64"),
            ("--kv-block-size", "6.4"),
            ("--batch-size", "0"),
            ("--batch-size", "-1"),
            ("--prefill-chunk", "0"),
            ("--max-new-tokens", "0"),
            ("--limit", "-5"),
            ("--seed", "-1"),
            ("--temperature", "-0.1"),
            ("--temperature", "nan"),
            ("--max-seq-len", "-1"),
            ("--trace-sample-rate", "0"),
            ("--trace-sample-rate", "2"),
            ("--trace-prefill-tail", "-1"),
            ("--requests-per-shard", "0"),
            ("--trace-prefix-key-tokens", "0"),
            ("--context-length", "100"),
            ("--truncate", "left"),
            ("--dtype", "fp4"),
            ("--device", "tpu"),
        ]
    },
    "too long for the model": Case(f"{TRACE} --max-seq-len 513", 2, "--max-seq-len 513 is more than the model's 512"),
    "no room for a prompt": Case(
        f"{TRACE} --max-seq-len 100 --max-new-tokens 100", 2, "--max-new-tokens 100 leaves no room for a prompt"
    ),
    "no room beside the template": Case(
        f"{TRACE} --max-new-tokens 510",
        2,
        "no prompt is left to run (1 dropped: no room beside template and answer prefix)",
    ),
    "no home": Case(
        "generate --prompt hello --device cpu --model tiny-random",
        1,
        "cannot make the embedded model in rows.jsonl",
        environ={"DSAKV_HOME": "rows.jsonl"},
    ),
}

PROMPTS = {
    "no prompt": Case("generate --ckpt-path model", 2, "nothing to generate from"),
    "two prompts": Case(f"{GENERATE} --input-file x.txt", 2, "more than one source of prompts"),
    "chat as JSON": Case("generate --ckpt-path model --interactive --json", 2, "--json does not go with"),
    "empty prompt": Case("generate --ckpt-path model", 2, "--prompt must be a non-empty text", more=("--prompt", "")),
    "half a character": Case(
        "generate --ckpt-path model --device cpu", 2, "bytes that are no UTF-8", more=("--prompt", "a\udcff")
    ),
    "prompt too long": Case(
        f"{GENERATE} --max-seq-len 10", 2, "prompt 0 has 8 tokens; with 4 new ones it exceeds the limit of 10"
    ),
    "no room for new tokens": Case(
        f"{GENERATE} --max-new-tokens 512", 2, "with 512 new ones it exceeds the limit of 512"
    ),
    "no file": Case(f"{FILE} p.txt", 2, "cannot read p.txt"),
    "folder": Case(f"{FILE} model", 2, "cannot read model"),
    "no UTF-8": Case(f"{FILE} p.txt", 2, "cannot read p.txt", put("p.txt", b"\xff\xfe\x00")),
    "other suffix": Case(f"{FILE} p.md", 2, "p.md is neither .txt nor .jsonl", put("p.md", "hello")),
    "empty file": Case(f"{FILE} p.jsonl", 2, "p.jsonl holds no prompt", put("p.jsonl", "")),
    "blank file": Case(f"{FILE} p.txt", 2, "p.txt holds no prompt", put("p.txt", "\ufeff \n\n\t\r\n")),
    **{
        f"line {line}": Case(f"{FILE} p.jsonl", 2, message, put("p.jsonl", '{"prompt": "good"}\n\n' + line))
        for line, message in [
            ('{"prompt": "cut', "p.jsonl:3: Input data was truncated"),
            ("hello", "p.jsonl:3: JSON is malformed"),
            ('{"prompt": "a"} {}', "p.jsonl:3: JSON is malformed"),
            ('["a"]', "p.jsonl:3: Expected `object`, got `array`"),
            ('{"prompt": 3}', "p.jsonl:3: Expected `str | null`, got `int` - at `$.prompt`"),
            ("{}", "p.jsonl:3 has none of prompt, messages and prompt_token_ids"),
            ('{"prompt": "a", "prompt_token_ids": [1]}', "p.jsonl:3 has prompt and prompt_token_ids of"),
            ('{"prompt": ""}', "p.jsonl:3: the prompt is empty"),
            ('{"messages": []}', "p.jsonl:3: the prompt is empty"),
            ('{"prompt_token_ids": []}', "p.jsonl:3: the prompt is empty"),
            ('{"prompt_token_ids": [true]}', "p.jsonl:3: Expected `int`, got `bool`"),
            ('{"prompt_token_ids": [1, 260]}', "prompt 1 holds token 260, the vocabulary has 260"),
            ('{"prompt_token_ids": [-1]}', "prompt 1 holds token -1"),
            ('{"messages": [{"role": "user"}]}', "p.jsonl:3: Object missing required field `content`"),
            ('{"messages": [{"role": "nurse", "content": "x"}]}', "p.jsonl:3: the checkpoint's chat template refuses"),
        ]
    },
}

RULERS = {
    "unknown task": Case(f"{RULER} --tasks niah_single_9", 2, "unknown RULER task 'niah_single_9'"),
    "task that is not generated": Case(f"{RULER} --tasks qa_1", 2, "RULER task qa_1 cannot be generated"),
    "task that has no file": Case(f"{TRACE} --tasks vt", 2, "unknown RULER task 'vt'"),
    "no task": Case(RULER, 2, "no RULER task is chosen", more=("--tasks", "")),
    "too short a context": Case(f"{RULER} --tasks vt --context-length 256", 2, "256 tokens is too short"),
    "no data": Case(f"{RULER} --ruler-data none", 2, "no such file or directory: none"),
    "data without rows": Case(f"{RULER} --ruler-data model", 2, "no .jsonl file under model"),
    "empty data": Case(TRACE, 2, "rows.jsonl is empty", put("rows.jsonl", "\n")),
    **{
        f"row {row}": Case(TRACE, 2, f"rows.jsonl:2: {message}", put("rows.jsonl", ROW + row + "\n" + ROW))
        for row, message in [
            ('{"input": "cut', "not a RULER row"),
            ("[]", "not a RULER row"),
            ('{"outputs": ["a"]}', "not a RULER row: Object missing required field `input`"),
            ('{"input": 3, "outputs": ["a"]}', "not a RULER row: Expected `str`, got `int`"),
            ('{"input": "", "outputs": ["a"]}', "`input` is empty"),
            ('{"input": "a"}', "no gold answer"),
            ('{"input": "a", "outputs": []}', "no gold answer"),
            ('{"input": "a", "outputs": [1]}', "not a RULER row"),
        ]
    },
}

TARGETS = {
    "trace below a file": Case(
        f"{TRACE} --trace-out rows.jsonl/out", 1, "cannot write rows.jsonl/out: Not a directory"
    ),
    "trace into a file": Case(f"{TRACE} --trace-out rows.jsonl", 1, "cannot write rows.jsonl"),
    "trace into a device": Case(f"{TRACE} --trace-out /dev/null", 1, "cannot write /dev/null"),
    "generate below a file": Case(f"{GENERATE} --trace-out rows.jsonl/out", 1, "cannot write rows.jsonl/out"),
    "trace into another run": Case(TRACE, 1, "out holds a run already", trace([1])),
    "trace into a run just begun": Case(TRACE, 1, "out holds a run already", put("out/config.json", "{}")),
    "generate into another run": Case(GENERATE, 1, "out holds a run already", trace([1])),
    "resume what is not there": Case(f"{TRACE} --resume", 2, "out holds no run to go on with"),
    "resume what is damaged": Case(f"{TRACE} --resume", 2, "out holds no run", put("out/config.json", "{")),
    "resume another run": Case(
        f"{TRACE} --resume", 2, "started with another configuration", put("out/config.json", '{"engine": {}}')
    ),
    "analysis below a file": Case("analyze --input out --out rows.jsonl/a", 1, "cannot write rows.jsonl/a", trace([1])),
    "analysis into the trace": Case(
        "analyze --input out --out out/block64/trace_steps_0_4.jsonl", 2, "is part of the trace", trace([1])
    ),
    "analysis into a folder": Case("analyze --input out --out model", 2, "model is a directory", trace([1])),
    "analysis into a device": Case(
        "analyze --input out --out /dev/full", 2, "/dev/full is no regular file", trace([1])
    ),
    "report into a device": Case(
        "analyze --input out --report /dev/null", 2, "/dev/null is no regular file", trace([1])
    ),
    "report below a file": Case(
        "analyze --input out --report rows.jsonl/a", 1, "cannot write rows.jsonl/a", trace([1])
    ),
    "selfcheck below a file": Case("trace selfcheck --trace-out rows.jsonl/a", 1, "cannot write rows.jsonl/a"),
}

TRACES = {
    "no outputs": Case("analyze", 2, "there is no outputs/ to take the newest run from"),
    "no input": Case("analyze --input none", 2, "none does not exist"),
    "file": Case("analyze --input rows.jsonl", 2, "rows.jsonl is a file"),
    "empty folder": Case("analyze --input empty", 2, "no trace in empty", lambda: Path("empty").mkdir()),
    "no records": Case("analyze --input out", 2, "out", trace()),
    "parquet that was cut off": Case(
        "analyze --input out", 2, "trace_steps_0_4.parquet", put("out/block64/trace_steps_0_4.parquet", "PAR1")
    ),
    "empty parquet": Case("analyze --input out", 2, "trace_steps_0.parquet", put("out/trace_steps_0.parquet", "")),
    "a shard in two formats": Case(
        "analyze --input out",
        2,
        "holds one shard twice",
        lambda: (trace([1])(), put("out/block64/trace_steps_0_4.parquet", "")()),
    ),
    "a copy without the bad records": Case(
        "analyze --input out --to-parquet copy --on-error skip", 2, "--to-parquet", trace([1])
    ),
    "a copy over a file": Case("analyze --input out --to-parquet rows.jsonl", 1, "rows.jsonl exists", trace([1])),
    "a copy below a file": Case("analyze --input out --to-parquet rows.jsonl/a", 1, "cannot write rows", trace([1])),
    "no positions": Case(
        "analyze --input out", 2, "none of the 2 records in out/block64 has selected_token_pos", trace(None, None)
    ),
    "block size twice": Case("analyze --input out --block-size 8 --block-sizes 8,16", 2, "--block-size", trace([1])),
    "damaged run_meta": Case(
        "analyze --input out",
        2,
        "out/block64/run_meta.json is not JSON",
        lambda: (trace([1])(), put("out/block64/run_meta.json", "{")()),
    ),
    "damaged compressed shard": Case(
        "analyze --input out --on-error skip",
        2,
        "out/block64/trace_steps_4_8.jsonl.zst is damaged or cut off",
        lambda: (trace([1])(), put("out/block64/trace_steps_4_8.jsonl.zst", "no zstd")()),
    ),
    "shard in two formats": Case(
        "analyze --input out",
        2,
        "out/block64 holds one shard twice: trace_steps_0_4.jsonl and trace_steps_0_4.jsonl.zst",
        lambda: (trace([1])(), put("out/block64/trace_steps_0_4.jsonl.zst", "")()),
    ),
    **{
        f"line {line}": Case("analyze --input out", 2, "trace_steps_0_4.jsonl:2", trace([1, 5], tail=line + "\n"))
        for line in [
            "{",
            "[]",
            '{"request_id": 0}',
            '{"request_id": 0, "layer_id": 0, "step_idx": 0, "seq_len_current": 90, "selected_token_pos": [1]}',
            '{"request_id": 0, "layer_id": 0, "step_idx": 1, "seq_len_current": 90, "selected_token_pos": [90]}',
            '{"request_id": 0, "layer_id": 0, "step_idx": 1, "seq_len_current": 90, "selected_token_pos": [1, 1]}',
            '{"request_id": 0, "layer_id": 0, "step_idx": 1, "seq_len_current": "90", "selected_token_pos": [1]}',
        ]
    },
}

GROUPS = {
    "checkpoint": CHECKPOINTS,
    "config": CONFIGS,
    "settings": SETTINGS,
    "prompt": PROMPTS,
    "ruler": RULERS,
    "target": TARGETS,
    "trace": TRACES,
}
ALL = {f"{group}: {name}": case for group, cases in GROUPS.items() for name, case in cases.items()}


@pytest.fixture(autouse=True)
def _folder(small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("DSAKV_", "DS_TRACE_")) or name in ("CKPT_PATH", "CONFIG", "LIMIT"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_checkpoint, tmp_path / "model")
    Path("rows.jsonl").write_text(ROW)


def tree() -> dict[Path, bytes | None]:
    """Everything in the folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path(".").rglob("*")}


def check_error(capsys: pytest.CaptureFixture[str], message: str) -> None:
    """Stdout is empty; stderr ends with one error and one hint, and has no traceback."""
    caught = capsys.readouterr()
    assert caught.out == ""
    assert "Traceback" not in caught.err
    *before, error, hint = caught.err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert hint.startswith("hint: ")
    assert len(hint) > len("hint: ")
    assert not any(line.startswith(("error:", "hint:")) for line in before)


@pytest.mark.parametrize("case", ALL.values(), ids=ALL.keys())
def test_bad_input(case: Case, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    case.prepare()
    for name, value in case.environ.items():
        monkeypatch.setenv(name, value)
    before = tree()
    assert run([*case.command.split(), *case.more]) == case.code
    check_error(capsys, case.message)
    after = tree()
    if case is CHECKPOINTS["numbers that overflow"]:  # found on the way: what was traced until then is kept
        after = {path: content for path, content in after.items() if path.parts[0] != "out"}
    assert after == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for the missing device")
def test_no_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (GENERATE, TRACE):
        assert run([*command.split(), "--device", "cuda"]) == 2
        check_error(capsys, "PyTorch sees no CUDA device")
        assert not Path("out").exists()


def test_the_same_commands_work_when_nothing_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    """So that no case above fails for another reason than its own."""
    assert run(GENERATE.split()) == 0
    shutil.rmtree("out")
    put("p.jsonl", '{"prompt": "good"}\n')()
    assert run(f"{FILE} p.jsonl".split()) == 0
    shutil.rmtree("out")
    assert run(TRACE.split()) == 0
    assert run(["analyze", "--input", "out"]) == 0
    assert "error:" not in capsys.readouterr().err


def test_a_trace_without_positions_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*TRACE.split(), "--trace-no-store-token-pos"]) == 0
    capsys.readouterr()
    assert run(["analyze", "--input", "out"]) == 2
    check_error(capsys, "has selected_token_pos")


def test_corrupt_lines_can_be_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    trace([1, 5], tail='{"cut\n')()
    assert run(["analyze", "--input", "out"]) == 2
    check_error(capsys, "trace_steps_0_4.jsonl:2")
    assert run(["analyze", "--input", "out", "--block-size", "64", "--on-error", "skip", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["complete"] is False
    assert result["input"]["records"] == 1
    assert "trace_steps_0_4.jsonl:2" in json.dumps(result["input"]["rejected"])


# A full disk


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes: writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (GENERATE, "cannot write out: File too large"),
        (TRACE, "cannot write out: File too large"),
        ("analyze --input done", "cannot write done/block64/analysis.json: File too large"),
        ("analyze --input done --out new/a.json", "cannot write new/a.json: File too large"),
        ("trace selfcheck --trace-out out", "cannot write out: File too large"),
    ],
)
def test_a_disk_that_is_full_from_the_start(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.move(_traced("done"), "done")
    capsys.readouterr()
    before = tree()
    with largest_file(10):
        assert run(command.split()) == 1
    check_error(capsys, message)
    left = tree()
    left.pop(Path("new"), None)  # an empty folder
    assert left == before


def _traced(out: str) -> str:
    assert run(TRACE.replace("--trace-out out", f"--trace-out {out}").split()) == 0
    return out


def test_a_disk_that_fills_up_on_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    """What is there stays readable, and with more space the run goes on as if nothing had been."""
    Path("rows.jsonl").write_text(ROW * 8)
    command = [*TRACE.split(), "--max-new-tokens", "20", "--temperature", "0"]
    assert run([*command, "--trace-out", "whole"]) == 0
    shards = sorted(path.relative_to("whole") for path in Path("whole").rglob("trace_steps*"))
    assert len(shards) == 2
    capsys.readouterr()
    with largest_file(Path("whole", shards[0]).stat().st_size * 2 // 3):
        assert run(command) == 1
    check_error(capsys, f"cannot write {Path('out', shards[0])}: File too large")
    assert not Path("out/block64/summary.json").exists()
    assert run(["analyze", "--input", "out", "--out", "a.json"]) == 0
    capsys.readouterr()
    assert run([*command, "--resume"]) == 0
    for shard in shards:
        lines = [Path(out, shard).read_text().splitlines() for out in ("out", "whole")]
        ours, theirs = ([json.loads(line)["selected_token_pos"] for line in found] for found in lines)
        assert ours == theirs
    own, whole = (json.loads(Path(out, "block64", "summary.json").read_bytes()) for out in ("out", "whole"))
    assert own.keys() == whole.keys()
    assert all(own[name] == whole[name] for name in own.keys() - {"serving"})


def test_no_space_for_the_embedded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DSAKV_HOME", str(tmp_path / "home"))
    with largest_file(1000):
        assert run(["generate", "--model", "tiny-random", "--prompt", "hello", "--device", "cpu"]) == 1
    check_error(capsys, f"cannot make the embedded model in {tmp_path / 'home'}")
    assert not list((tmp_path / "home" / "models").iterdir())
