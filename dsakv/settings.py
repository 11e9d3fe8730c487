"""Fill one Config from its layers: defaults < preset TOML < environment < flags, each decoded strictly by msgspec."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec
from msgspec import inspect

from dsakv.config import COMMAND_DEFAULTS, SECTIONS, Config
from dsakv.errors import InputError

PREFIX = "DSAKV_"
OLD_PREFIX = "DS_TRACE_"
RETIRED = {
    "WSM_GPU_MAX_GROUPS": "weights.device_budget",
    "WSM_CPU_": "weights.host_budget and weights.residency",
    "WSM_EVICT_FINISHED": "weights.residency",
    "WSM_KV_": "kv.hot_capacity and the other keys of kv",
    "WSM_": "weights.host_budget, weights.device_budget and weights.prefetch_depth",
}
"""Variables of an older benchmark by their beginnings, the longest first, and the keys that decide today."""
NOT_KEYS = frozenset({"DSAKV_HOME", "DSAKV_DEBUG"})
"""Variables that belong to no key: the cache folder, and tracebacks for user errors."""


def cache_home(environ: dict[str, str] | os._Environ[str] = os.environ) -> Path:
    """The folder for what dsakv makes or downloads once: ``DSAKV_HOME``, else ``dsakv`` in the user's cache."""
    if home := environ.get("DSAKV_HOME"):
        return Path(os.path.expanduser(home))
    return Path(os.path.expanduser(environ.get("XDG_CACHE_HOME") or "~/.cache")) / "dsakv"


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the config tree with everything that ``dsakv.config`` says about it."""

    section: str
    name: str
    annotation: Any
    default: Any
    help: str
    declaration: str
    """Flag as Typer takes it: ``--x``, or ``--x/--no-x`` for a bool."""
    old_env: str | None
    values: int
    """How many values its flag takes."""

    @property
    def path(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def flag(self) -> str:
        return self.declaration.split("/")[0]

    @property
    def off(self) -> str:
        """The flag that switches a bool off."""
        return self.declaration.split("/")[-1]

    @property
    def variable(self) -> str:
        return f"{PREFIX}{self.section}_{self.name}".upper()

    @property
    def kind(self) -> inspect.Type:
        """The type without its description."""
        return _bare(inspect.type_info(self.annotation))

    @property
    def is_bool(self) -> bool:
        return isinstance(self.kind, inspect.BoolType)

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a Literal in the order of the config; empty for other types."""
        kind = get_args(self.annotation)[0]
        return get_args(kind) if get_origin(kind) is Literal else ()

    def default_for(self, command: str) -> Any:
        return COMMAND_DEFAULTS.get(command, {}).get(self.path, self.default)


def keys(section: str | None = None) -> list[Key]:
    """Every key, or those of one section, in the order of the config."""
    found = []
    for part in msgspec.structs.fields(Config):
        if section not in (None, part.name):
            continue
        for field in msgspec.structs.fields(part.type):
            info = inspect.type_info(field.type)
            assert isinstance(info, inspect.Metadata)
            schema, extra = info.extra_json_schema or {}, info.extra or {}
            dashed = field.name.replace("_", "-")
            usual = f"--{dashed}/--no-{dashed}" if isinstance(info.type, inspect.BoolType) else f"--{dashed}"
            found.append(
                Key(
                    section=part.name,
                    name=field.name,
                    annotation=field.type,
                    default=field.default,
                    help=schema["description"],
                    declaration=extra["flag"] or usual,
                    old_env=extra["old_env"],
                    values=extra["values"],
                )
            )
    return found


def resolve(command: str, flags: Mapping[str, Any], environ: Mapping[str, str], preset: Path | None) -> Config:
    """The configuration of one run.

    ``command`` is a name in ``SECTIONS``. ``flags`` holds what was given, by ``section.key``: text as typed, or values
    of the key's own type. Raises InputError, naming the flag, variable or preset key, where a name is unknown, a value
    does not fit, or an old and a new variable disagree.
    """
    table = {key.path: key for key in keys()}
    values = dict(COMMAND_DEFAULTS.get(command, {}))
    if preset is not None:
        values.update(_from_preset(preset, table))
    values.update(_from_environment(command, environ, table))
    values.update({path: _decode(table[path], given, table[path].flag) for path, given in flags.items()})
    tree: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        section, name = path.split(".")
        tree.setdefault(section, {})[name] = value
    return msgspec.convert(tree, Config)


def resolved_json(config: Config) -> bytes:
    """The whole tree as indented JSON, as it stands in a run's ``config.json``: without user and password of a URL."""
    if config.kv.remote and "@" in config.kv.remote:
        scheme, _, rest = config.kv.remote.partition("://")
        kv = msgspec.structs.replace(config.kv, remote=f"{scheme}://***@{rest.rpartition('@')[2]}")
        config = msgspec.structs.replace(config, kv=kv)
    return msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n"


def nearest(name: str, valid: Iterable[str]) -> str:
    """The valid name that looks most like ``name``, whatever its case."""
    by_case = {known.casefold(): known for known in valid}
    return by_case[difflib.get_close_matches(name.casefold(), list(by_case), n=1, cutoff=0.0)[0]]


def expected(key: Key) -> str:
    """What a value of this key looks like, in the user's words."""
    if key.choices:
        return "one of " + ", ".join(key.choices)
    if key.is_bool:
        return "true or false"
    if isinstance(key.kind, inspect.VarTupleType):
        item = _bare(key.kind.item_type)
        kinds = {inspect.IntType: "integers", inspect.FloatType: "numbers"}
        return f"a list of {kinds.get(type(item), 'words')}{_bounds(item)}"
    if isinstance(key.kind, inspect.IntType):
        return f"an integer{_bounds(key.kind)}"
    if isinstance(key.kind, inspect.FloatType):
        return f"a number{_bounds(key.kind)}"
    return "a non-empty text"


def _bounds(kind: inspect.Type) -> str:
    if not isinstance(kind, inspect.IntType | inspect.FloatType):
        return ""
    limits = (">", kind.gt), (">=", kind.ge), ("<", kind.lt), ("<=", kind.le)
    found = " and ".join(f"{sign} {limit}" for sign, limit in limits if limit is not None)
    return f" {found}" if found else ""


def _bare(kind: inspect.Type) -> inspect.Type:
    return kind.type if isinstance(kind, inspect.Metadata) else kind


def _decode(key: Key, given: Any, place: str, *, text: bool = True) -> Any:
    """``given`` as a value of the key's type; strings are parsed where the layer holds text."""
    for word in given if isinstance(given, tuple) else (given,):
        if isinstance(word, str) and not is_unicode(word):
            raise InputError(f"{place} holds bytes that are no UTF-8", "name it with valid characters")
        if isinstance(word, str) and "\0" in word:
            raise InputError(f"{place} holds a NUL character", "no path or name can have one")
    value: Any = given
    parse = text and isinstance(given, str)
    if parse and isinstance(key.kind, inspect.VarTupleType):
        value = [part.strip() for part in given.split(",")] if given.strip() else []
    try:
        value = msgspec.convert(value, key.annotation, strict=not parse)
        fits = not isinstance(value, float) or math.isfinite(value)
    except msgspec.ValidationError:
        fits = False
    if not fits:
        shown = f'"{given}"' if isinstance(given, str) else given
        raise InputError(f"{place} must be {expected(key)}, not {shown}", _advice(key, given))
    return value


def is_unicode(text: str) -> bool:
    """False for what the system passed on although it could not decode it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _advice(key: Key, given: Any) -> str:
    if key.choices:
        return f"did you mean {nearest(str(given), key.choices)}?"
    if isinstance(key.kind, inspect.VarTupleType):
        return f"separate values by commas, as in {default_text(key.default)}" if key.default else "such as 16,32,64"
    return "mend the value, or leave it out for the default"


def default_text(value: Any) -> str:
    """A default as the user would type it."""
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value)
    return str(value)


def _from_preset(path: Path, table: Mapping[str, Key]) -> dict[str, Any]:
    try:
        document = msgspec.toml.decode(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"cannot read preset {path}: {error.strerror}", "give --preset a TOML file, such as one in configs/"
        ) from error
    except (ValueError, RecursionError) as error:  # the parser's own, and what it does not catch
        raise InputError(f"preset {path} is no TOML: {error}", "mend the file at this place") from error
    sections = {key.section for key in table.values()}
    values = {}
    for section, content in document.items():
        if section not in sections:
            raise InputError(f"{path}: unknown section [{section}]", f"did you mean [{nearest(section, sections)}]?")
        if not isinstance(content, dict):
            raise InputError(f"{path}: {section} must be a section, not a value", f"write [{section}] on its own line")
        for name, given in content.items():
            key = table.get(f"{section}.{name}")
            if key is None:
                near = nearest(name, (key.name for key in table.values() if key.section == section))
                raise InputError(f"{path}: unknown key [{section}] {name}", f"did you mean {near}?")
            values[key.path] = _decode(key, given, f"{path}: [{section}] {name}", text=False)
    return values


def _from_environment(command: str, environ: Mapping[str, str], table: Mapping[str, Key]) -> dict[str, Any]:
    """Values by ``section.key``. Variables of older scripts count only for the commands that read their key."""
    new = {key.variable: key for key in table.values()}
    old = {key.old_env: key for key in table.values() if key.old_env and key.section in SECTIONS[command]}
    traces = "trace" in SECTIONS[command]
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name in sorted(environ):
        if command == "bench" and (found := next((old for old in RETIRED if name.startswith(old)), None)):
            raise InputError(f"{name} is of an older benchmark and does nothing", f"unset it; see {RETIRED[found]}")
        key = new.get(name) or old.get(name)
        if key is None:
            if name.startswith(PREFIX) and name not in NOT_KEYS:
                raise InputError(f"unknown variable {name}", f"did you mean {nearest(name, {*new, *NOT_KEYS})}?")
            if name.startswith(OLD_PREFIX) and traces:
                near = nearest(name, (known for known in old if known.startswith(OLD_PREFIX)))
                raise InputError(f"unknown variable {name}", f"did you mean {near}?")
            continue
        value = _decode(key, environ[name], name)
        if key.path in values and values[key.path] != value:
            raise InputError(
                f"{origin[key.path]} and {name} set the same key to different values",
                f"keep {key.variable} and unset the other",
            )
        values[key.path], origin[key.path] = value, name
    return values
