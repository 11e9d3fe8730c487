import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import inspect

from dsakv.config import COMMAND_DEFAULTS, SECTIONS, Config
from dsakv.errors import InputError
from dsakv.settings import Key, default_text, keys, resolve, resolved_json

KEYS = keys()
PRESETS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))
WORDS = st.text("abcdefghijklmnopqrstuvwxyz0123456789_./", min_size=1, max_size=8)


def values_of(key: Key) -> st.SearchStrategy[Any]:
    """Valid values of a key."""

    def scalar(kind: inspect.Type) -> st.SearchStrategy[Any]:
        kind = kind.type if isinstance(kind, inspect.Metadata) else kind
        if isinstance(kind, inspect.IntType):
            return st.integers(kind.ge, kind.le or 10**6)
        if isinstance(kind, inspect.FloatType):
            return st.floats(0.001, kind.le or 100.0)
        return st.booleans() if isinstance(kind, inspect.BoolType) else WORDS

    if key.choices:
        return st.sampled_from(key.choices)
    if isinstance(key.kind, inspect.VarTupleType):
        return st.lists(scalar(key.kind.item_type), max_size=4).map(tuple)
    return scalar(key.kind)


def as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def look_up(config: Config, key: Key) -> Any:
    return getattr(getattr(config, key.section), key.name)


def write_preset(path: Path, values: dict[str, Any]) -> Path:
    sections = sorted({name.split(".")[0] for name in values})
    lines = []
    for section in sections:
        lines.append(f"[{section}]")
        lines += [f"{n.split('.')[1]} = {json.dumps(v)}" for n, v in values.items() if n.split(".")[0] == section]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@given(data=st.data())
def test_the_highest_layer_that_speaks_wins(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    command = data.draw(st.sampled_from(sorted(SECTIONS)))
    chosen = data.draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=5, unique_by=lambda key: key.path))
    preset: dict[str, Any] = {}
    environ: dict[str, str] = {}
    flags: dict[str, Any] = {}
    wanted = {}
    for key in chosen:
        wanted[key.path] = key.default_for(command)
        if data.draw(st.booleans()):
            preset[key.path] = wanted[key.path] = data.draw(values_of(key))
        if data.draw(st.booleans()):
            wanted[key.path] = data.draw(values_of(key))
            environ[key.variable] = as_text(wanted[key.path])
        if data.draw(st.booleans()):
            wanted[key.path] = data.draw(values_of(key))
            flags[key.path] = data.draw(st.sampled_from([wanted[key.path], as_text(wanted[key.path])]))
    path = write_preset(tmp_path_factory.mktemp("preset") / "p.toml", preset)
    config = resolve(command, flags, environ, path)
    for key in KEYS:
        assert look_up(config, key) == wanted.get(key.path, key.default_for(command))
    assert msgspec.json.decode(resolved_json(config), type=Config) == config


@pytest.mark.parametrize("command", sorted(SECTIONS))
def test_defaults(command: str) -> None:
    config = resolve(command, {}, {"PATH": "/bin", "DSAKV_HOME": "x", "DSAKV_DEBUG": "1"}, None)
    differs = {key.path: look_up(config, key) for key in KEYS if look_up(config, key) != key.default}
    assert differs == COMMAND_DEFAULTS.get(command, {})


def test_new_tokens_by_command() -> None:
    assert resolve("generate", {}, {}, None).engine.max_new_tokens == 200
    assert resolve("trace ruler", {}, {}, None).engine.max_new_tokens == 64


def test_defaults_are_valid_and_flags_unique() -> None:
    assert msgspec.convert(msgspec.to_builtins(Config()), Config) == Config()
    assert len({key.variable for key in KEYS}) == len(KEYS)
    for sections in SECTIONS.values():
        flags = [flag for key in KEYS if key.section in sections for flag in key.declaration.split("/")]
        assert len(set(flags)) == len(flags)


OLD = {
    "CKPT_PATH": ("a", "b"),
    "CONFIG": ("a", "b"),
    "LIMIT": ("1", "2"),
    "HF_CKPT_PATH": ("a", "b"),
    "SAVE_PATH": ("a", "b"),
    "EXPERTS": ("8", "16"),
    "BURSTGPT_CSV": ("a", "b"),
    "DS_TRACE_KV_BLOCK_SIZE": ("16", "32"),
    "DS_TRACE_ENABLE": ("1", "0"),
    "DS_TRACE_OUT": ("a", "b"),
    "MP": ("2", "4"),
    "DS_TRACE_STORE_TOKEN_POS": ("0", "1"),
    "DS_TRACE_STORE_SCORES": ("1", "0"),
    "DS_TRACE_RECORD_BLOCK_IDS": ("1", "0"),
    "DS_TRACE_SAMPLE_RATE": ("0.5", "0.25"),
    "DS_TRACE_PREFIX_KEY_TOKENS": ("64", "128"),
    "DS_TRACE_SYNC_CUDA": ("0", "1"),
    "DS_TRACE_MAX_REQUESTS_PER_FILE": ("1", "2"),
}
"""Variables of older scripts with two values each."""


def test_every_old_variable_has_its_key() -> None:
    assert {key.old_env for key in KEYS if key.old_env} == set(OLD)


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("command", sorted(SECTIONS))
def test_old_variables_count_where_their_key_is_read(command: str, name: str) -> None:
    key = next((key for key in KEYS if key.old_env == name and key.section in SECTIONS[command]), None)
    text, other = OLD[name]
    config = resolve(command, {}, {name: text}, None)
    if key is None:
        assert config == resolve(command, {}, {}, None)
        return
    assert config == resolve(command, {}, {key.variable: text}, None)
    assert config == resolve(command, {}, {key.variable: text, name: text}, None)
    assert config != resolve(command, {}, {name: other}, None)
    with pytest.raises(InputError, match="different values") as caught:
        resolve(command, {}, {key.variable: text, name: other}, None)
    assert name in caught.value.message
    assert key.variable in caught.value.message


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("0", False), ("true", True), ("false", False), ("True", True), ("FALSE", False)]
)
def test_bools_as_text(text: str, value: bool) -> None:
    assert resolve("analyze", {}, {"DSAKV_ANALYZE_STEP_UNION": text}, None).analyze.step_union is value


def test_lists_as_text() -> None:
    environ = {"DSAKV_ANALYZE_BLOCK_SIZES": " 16, 32,64 ", "DSAKV_RULER_TASKS": "niah_single_1,vt"}
    config = resolve("analyze", {"analyze.lru_caps": ""}, environ, None)
    assert config.analyze.block_sizes == (16, 32, 64)
    assert config.analyze.lru_caps == ()
    assert config.ruler.tasks == ("niah_single_1", "vt")


VALUE_ERRORS = [
    ("engine.batch_size", "x", 'must be an integer >= 1 and <= 2147483647, not "x"', "default"),
    ("engine.batch_size", "0", 'must be an integer >= 1 and <= 2147483647, not "0"', "default"),
    ("engine.batch_size", "", "must be an integer >= 1", "default"),
    ("engine.batch_size", True, "must be an integer >= 1 and <= 2147483647, not True", "default"),
    ("engine.batch_size", "1.5", "must be an integer >= 1", "default"),
    ("engine.temperature", "nan", "must be a number >= 0", "default"),
    ("engine.temperature", "inf", "must be a number >= 0", "default"),
    ("trace.sample_rate", "1.01", "must be a number > 0.0 and <= 1.0", "default"),
    ("trace.sample_rate", "0", "must be a number > 0.0 and <= 1.0", "default"),
    ("trace.sync_cuda", "yes", 'must be true or false, not "yes"', "default"),
    ("model.dtype", "float23", "must be one of auto, float32, bfloat16, fp8", "did you mean float32?"),
    ("model.ckpt_path", "", "must be a non-empty text", "default"),
    ("analyze.lru_caps", "1,,2", "must be a list of numbers > 0", "128,256,512,1024"),
    ("analyze.lru_caps", "0", "must be a list of numbers > 0", "128,256,512,1024"),
    ("analyze.block_sizes", "16;32", "must be a list of integers >= 1", "16,32"),
    ("ruler.tasks", "vt,", "must be a list of words", "all"),
]


@pytest.mark.parametrize(("path", "given_value", "message", "hint"), VALUE_ERRORS)
def test_value_errors_name_flag_variable_and_preset_key(
    path: str, given_value: Any, message: str, hint: str, tmp_path: Path
) -> None:
    key = next(key for key in KEYS if key.path == path)
    file = write_preset(tmp_path / "p.toml", {path: given_value})
    places: list[tuple[str, dict[str, Any], dict[str, str], Path | None]] = [
        (key.flag, {path: given_value}, {}, None),
        (f"{file}: [{key.section}] {key.name}", {}, {}, file),
    ]
    if isinstance(given_value, str):
        places.append((key.variable, {}, {key.variable: given_value}, None))
    for place, flags, environ, preset in places:
        with pytest.raises(InputError) as caught:
            resolve("trace ruler", flags, environ, preset)
        assert caught.value.message.startswith(f"{place} {message}")
        assert hint in caught.value.hint
        assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("toml", "message", "hint"),
    [
        ("[engin]\nseed = 1", "unknown section [engin]", "[engine]"),
        ("[engine]\nseeds = 1", "unknown key [engine] seeds", "did you mean seed?"),
        ("[engine]\nbatch-size = 1", "unknown key [engine] batch-size", "did you mean batch_size?"),
        ("engine = 1", "engine must be a section", "[engine]"),
        ("[engine]\nbatch_size = '4'", 'must be an integer >= 1 and <= 2147483647, not "4"', "default"),
        ("[engine]\nbatch_size = 4.0", "must be an integer >= 1 and <= 2147483647, not 4.0", "default"),
        ("[engine]\ntemperature = inf", "must be a number >= 0.0 and <= 2147483647, not inf", "default"),
        ("[trace]\nresume = 1", "must be true or false, not 1", "default"),
        ("[analyze]\nlru_caps = '1,2'", "must be a list of numbers > 0", "128"),
        ("[engine\nseed = 1", "is no TOML", "line 1"),
        ("[engine]\nseed = 1\nseed = 2\n", "is no TOML", "line 3"),
        ("[model]\nconfig = '\udcff'", "is no TOML", "utf-8"),
    ],
)
def test_preset_errors(toml: str, message: str, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_bytes(toml.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError) as caught:
        resolve("trace ruler", {}, {}, path)
    assert str(path) in caught.value.message
    assert message in caught.value.message
    assert hint in caught.value.message + caught.value.hint


def test_preset_numbers_need_no_point(tmp_path: Path) -> None:
    path = write_preset(tmp_path / "p.toml", {"engine.temperature": 1})
    assert resolve("trace ruler", {}, {}, path).engine.temperature == 1.0


@pytest.mark.parametrize("name", ["none.toml", "."])
def test_preset_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read preset"):
        resolve("trace ruler", {}, {}, tmp_path / name)


@pytest.mark.parametrize(
    ("command", "name", "near"),
    [
        ("analyze", "DSAKV_ENGINE_BATCHSIZE", "DSAKV_ENGINE_BATCH_SIZE"),
        ("analyze", "DSAKV_HOM", "DSAKV_HOME"),
        ("trace ruler", "DSAKV_", "DSAKV_"),
        ("trace ruler", "DS_TRACE_SAMPLE", "DS_TRACE_SAMPLE_RATE"),
        ("generate", "DS_TRACE_MAX_REQUEST_PER_FILE", "DS_TRACE_MAX_REQUESTS_PER_FILE"),
    ],
)
def test_unknown_variables(command: str, name: str, near: str) -> None:
    with pytest.raises(InputError, match=f"unknown variable {name}") as caught:
        resolve(command, {}, {name: "1"}, None)
    assert near in caught.value.hint


def test_variables_of_other_commands_are_let_be() -> None:
    environ = {"DS_TRACE_WHATEVER": "1", "LIMIT": "many", "CONFIG": "release"}
    assert resolve("analyze", {}, environ, None) == resolve("analyze", {}, {}, None)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.name)
@pytest.mark.parametrize("command", sorted(SECTIONS))
def test_sample_presets_resolve(command: str, preset: Path) -> None:
    assert resolve(command, {}, {}, preset) != resolve(command, {}, {}, None)


def test_there_are_sample_presets() -> None:
    assert PRESETS


@pytest.mark.parametrize(
    ("value", "text"), [(None, "none"), ((), "none"), (True, "on"), (False, "off"), ((1, 2), "1,2"), (0.6, "0.6")]
)
def test_default_text(value: Any, text: str) -> None:
    assert default_text(value) == text


def test_a_stored_configuration_holds_no_password() -> None:
    url = "redis://me:se@cret@host:6379/1"
    config = resolve("trace ruler", {"kv.hot_capacity": "1", "kv.remote": url}, {}, None)
    stored = resolved_json(config)
    assert b"cret" not in stored
    assert b'"redis://***@host:6379/1"' in stored
    assert config.kv.remote == url


@pytest.mark.parametrize(
    ("name", "successor"),
    [
        ("WSM_GPU_MAX_GROUPS", "weights.device_budget"),
        ("WSM_CPU_RING_OFFSET", "weights.residency"),
        ("WSM_KV_THROTTLE_MS", "keys of kv"),
        ("WSM_PAIR_AHEAD", "weights.prefetch_depth"),
    ],
)
def test_variables_of_the_old_benchmark_name_what_decides_today(name: str, successor: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve("bench", {}, {name: "1"}, None)
    assert name in caught.value.message
    assert successor in caught.value.hint
    assert resolve("analyze", {}, {name: "1"}, None)
