"""Typer options made from the config tree, so that a flag, its type, help and default are written once."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dsakv.config import SECTIONS, Config
from dsakv.errors import InputError
from dsakv.settings import Key, default_text, keys, resolve

Command = Callable[[Config], None]
GroupCommand = Callable[[Config, Collection[str]], None]
OFF = "__off"
"""Ends the name of the parameter that switches a bool off."""
WIDEST_CHOICES = 32
"""Characters of choices that stand beside a flag in the help; longer ones belong in its text."""


def configured(
    command: str, *, only: Collection[str] = (), without: Collection[str] = ()
) -> Callable[[Command], Callable[..., None]]:
    """Decorate a function of a Config into a Typer command with a flag for each key that ``command`` reads.

    ``only`` and ``without`` narrow the keys, as ``section.key``. A flag that was not given is None inside, so that
    the layers below it count; ``--help`` shows the true default.
    """
    shown = _shown(command, only, without)

    def decorate(function: Command) -> Callable[..., None]:
        def wrapper(preset: Path | None = None, **given: Any) -> None:
            function(resolve(command, _given_flags(shown, given), os.environ, preset))

        return _signed(wrapper, function, {}, shown, command)

    return decorate


def configured_group(command: str) -> Callable[[GroupCommand], Callable[..., None]]:
    """As ``configured``, for the callback of a group that is a command of its own where no subcommand follows.

    The function also gets the flags that were typed, since it may have to refuse some of them whatever they say. Flags
    before a subcommand would reach nobody: they raise InputError.
    """
    shown = _shown(command)

    def decorate(function: GroupCommand) -> Callable[..., None]:
        def wrapper(context: typer.Context, preset: Path | None = None, **given: Any) -> None:
            flags = _given_flags(shown, given)
            typed = [key.off if flags[key.path] is False else key.flag for key in shown if key.path in flags]
            typed += ["--preset"] if preset is not None else []
            if (sub := context.invoked_subcommand) is None:
                function(resolve(command, flags, os.environ, preset), typed)
            elif typed:
                raise InputError(
                    f"{typed[0]} stands before {sub}, where it does nothing",
                    f"put flags behind it; dsakv {command} {sub} --help lists what it takes",
                )

        return _signed(wrapper, function, {"context": typer.Context}, shown, command)

    return decorate


def _shown(command: str, only: Collection[str] = (), without: Collection[str] = ()) -> list[Key]:
    """The keys that ``command`` has flags for."""
    return [
        key
        for section in SECTIONS[command]
        for key in keys(section)
        if key.path not in without and (not only or key.path in only)
    ]


def _signed(
    wrapper: Callable[..., None], function: Callable[..., None], first: dict[str, Any], shown: list[Key], command: str
) -> Callable[..., None]:
    """``wrapper`` under the name of ``function``, with the parameters that Typer makes flags of behind ``first``."""
    help = "Settings to start from; environment and flags win over them. Samples are in configs/."
    options = {"preset": Annotated[Path | None, typer.Option("--preset", help=help, metavar="FILE.toml")]}
    for key in shown:
        options |= _options(key, command)
    wrapper.__name__ = function.__name__
    wrapper.__doc__ = function.__doc__
    wrapper.__annotations__ = first | options
    leading = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind) for name, kind in first.items()]
    wrapper.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        leading
        + [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in options.items()
        ]
    )
    return wrapper


def _parameter(key: Key) -> str:
    return f"{key.section}__{key.name}"


def _options(key: Key, command: str) -> dict[str, Any]:
    """Annotated parameters of a key. Values stay text here: ``settings`` decodes them as it does the environment.

    A bool has one visible flag, the one that departs from its default, and a hidden one that undoes a lower layer.
    """
    default = key.default_for(command)
    text = key.help if "Default:" in key.help else f"{key.help} Default: {default_text(default)}."
    panel = key.section.capitalize()
    if not key.flag.startswith("--"):
        return {
            _parameter(key): Annotated[str | None, typer.Argument(help=key.help, metavar=key.flag, show_default=False)]
        }
    if key.values == 2:
        pair = typer.Option(key.flag, help=text, metavar="A B", rich_help_panel=panel)
        return {_parameter(key): Annotated[tuple[str, str] | None, pair]}
    if not key.is_bool:
        option = typer.Option(key.flag, help=text, metavar=_metavar(key), rich_help_panel=panel)
        return {_parameter(key): Annotated[str | None, option]}
    on, off = key.flag, key.off
    undo = f"Switch off: {text[0].lower()}{text[1:]}"
    return {
        _parameter(key): Annotated[
            bool | None, typer.Option(on, help=text, hidden=default, metavar="", rich_help_panel=panel)
        ],
        _parameter(key) + OFF: Annotated[
            bool | None, typer.Option(off, help=undo, hidden=not default, metavar="", rich_help_panel=panel)
        ],
    }


def _given_flags(shown: Sequence[Key], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the flags on the command line, by ``section.key``."""
    flags = {}
    for key in shown:
        value = given[_parameter(key)]
        if given.get(_parameter(key) + OFF):
            if value:
                raise InputError(f"{key.declaration.replace('/', ' and ')} contradict each other", "give one of them")
            value = False
        if value is not None:
            flags[key.path] = value
    return flags


def _metavar(key: Key) -> str:
    if key.choices:
        listed = "|".join(key.choices)
        return listed if len(listed) <= WIDEST_CHOICES else "NAME"
    if isinstance(key.default, tuple):
        return "A,B,..."
    return {int: "N", float: "X"}.get(type(key.default), "TEXT")
