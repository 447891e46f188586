"""Turn `config.SETTINGS` into command-line options, so that a setting is described once."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional, get_type_hints

import typer
from typer.core import TyperCommand

from gms_launch import numbers
from gms_launch.errors import UsageError
from gms_launch.run import topology
from gms_launch.settings.declared import LONGEST, SETTINGS, Setting, Settings
from gms_launch.settings.resolve import read_toml, resolve
from gms_launch.settings.rules import shortened

_PANELS = {
    "run": "Run",
    "engine": "Engine",
    "topology": "Topology",
    "gms": "GMS",
    "services": "Services",
    "ports": "Ports",
    "timing": "Timing",
}

#: Who gives a node rank or hosts runs things by hand, also inside a job.
_BY_HAND = ("NODE_RANK", "GMS_LAUNCH_NODE_RANK", "GMS_LAUNCH_HOSTS")


#: Of whole numbers that are no settings: lines, MiB, seeds.
MOST = 2**53


def _typed(read: Callable[[str], float], value: object, minimum: float, maximum: float = MOST) -> Any:
    """What a person typed for an option, as `numbers` reads it; a default is none of their typing."""
    if not isinstance(value, str):
        return value
    try:
        number = read(value)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from None
    if number < minimum:
        raise typer.BadParameter(f"{value} is below {minimum:g}")
    if number > maximum:
        raise typer.BadParameter(f"{shortened(value)} is above {maximum:.0f}")
    return number


def seconds(value: str) -> float:
    """A duration: above 0, and no longer than those of settings."""
    found = float(_typed(numbers.real, value, -math.inf, LONGEST))
    if found <= 0:
        raise typer.BadParameter(f"{value} is no time to wait: give seconds above 0")
    return found


def duration(name: str, meaning: str) -> Any:
    """The option that every duration of every verb is made of."""
    return typer.Option(name, parser=seconds, metavar="<float>", help=meaning)


def number(value: str) -> int:
    return int(_typed(numbers.whole, value, 0))


def tcp_port(value: str) -> int:
    """A TCP port to listen on; 0: one that is free."""
    found = number(value)
    if found > 65535:
        raise typer.BadParameter(f"{found} is no port (0 to 65535)")
    return found


def descriptor(value: str) -> int:
    """A file descriptor that this process was given; a default is none of anybody's typing."""
    fd = int(_typed(numbers.whole, value, 0))
    if isinstance(value, str) and not os.path.exists(f"/proc/self/fd/{fd}") and fd > 2:
        raise typer.BadParameter(f"there is no file descriptor {fd}")
    return fd


def positive(value: str) -> int:
    return int(_typed(numbers.whole, value, 1))


class WithEngineArgs(TyperCommand):
    """A verb that takes engine arguments, all of them after `--`: a word before it is a slip, and passed to no engine.

    As for bad values of settings, a `UsageError` of ours says so.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        after = args[args.index("--") + 1 :] if "--" in args else []
        rest: list[str] = super().parse_args(ctx, list(args))
        given: Sequence[str] = ctx.params.get("engine_args") or ()
        if len(given) > len(after):
            raise UsageError(f"{given[0]!r} stands alone: engine arguments come after --")
        return rest


def _option(setting: Setting) -> Any:
    names = (
        [setting.flag, *(flag for flag, _ in setting.old)]
        if setting.kind is not bool
        else [f"{setting.flag}/--no-{setting.flag[2:]}"]
    )
    default = "none" if setting.default == "" else setting.default
    if setting.name == "tp":
        default = "a GPU on every node, or what Slurm gave"
    choices = f" [{'|'.join(setting.choices)}]" if setting.choices else ""
    recipe = f" or {setting.recipe}" if setting.recipe else ""
    return typer.Option(
        *names,
        help=f"{setting.help}{choices}  (default: {default}; {setting.env}{recipe})",
        metavar=None if setting.kind is bool else f"<{setting.kind.__name__}>",
        rich_help_panel=_PANELS[setting.group],
        show_default=False,
        autocompletion=(lambda incomplete: [c for c in setting.choices if c.startswith(incomplete)])
        if setting.choices
        else None,
    )


def with_settings(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command every setting as an option, `--config` and the engine's arguments after `--`.

    The command is called with `settings` in place of them.
    """
    own = inspect.signature(function).parameters

    def command(**values: Any) -> Any:
        flags = {s.name: values.pop(s.name) for s in SETTINGS}
        config: Path | None = values.pop("config") or _config_from_environ()
        engine_args: Sequence[str] = values.pop("engine_args") or ()
        toml = read_toml(config) if config else None
        by_hand = flags["node_rank"] or flags["hosts"] or any(os.environ.get(n) for n in _BY_HAND)
        slurm = topology.from_slurm(os.environ, hands_off=bool(by_hand))
        if values.get("nodes"):  # the job that is asked for has as many
            slurm = slurm | {"nnodes": values["nodes"]}
        settings: Settings = resolve(flags, os.environ, toml, str(config), slurm, engine_args)
        return function(settings=settings, **values)

    # Annotations are text until evaluated where they were written; typer would look here.
    hints = get_type_hints(function, include_extras=True)
    parameters = [p.replace(annotation=hints[name]) for name, p in own.items() if name != "settings"]
    for setting in SETTINGS:
        # Text all the way: `resolve.parse` checks types, ranges and choices, with one kind of message.
        kind: Any = bool if setting.kind is bool else str
        parameters.append(
            inspect.Parameter(
                setting.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[Optional[kind], _option(setting)],  # noqa: UP045 - built at run time
            )
        )
    parameters.append(
        inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                Optional[Path],  # noqa: UP045
                typer.Option("--config", help="TOML file with settings (GMS_LAUNCH_CONFIG)"),
            ],
        )
    )
    parameters.append(
        inspect.Parameter(
            "engine_args",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                Optional[list[str]],  # noqa: UP045
                typer.Argument(metavar="[-- ENGINE ARGS]", help="passed to every engine as they are"),
            ],
        )
    )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = function.__doc__
    command.__name__ = function.__name__
    return command


def _config_from_environ() -> Path | None:
    value = os.environ.get("GMS_LAUNCH_CONFIG")
    return Path(value) if value else None
