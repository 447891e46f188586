"""How the sources of settings are merged: flags, `GMS_LAUNCH_*`, the recipe's own names, a TOML file, the scheduler.

`resolve` takes the first that says something, else the default, and checks that the result makes sense. It reads only
what it is given: no environment, no files (`read_toml` does that) and no clock, so that a test can say what the world
looks like. What it does not do: find out who this node is (`topology`) or hand out ports (`ports`).
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gms_launch.errors import UsageError
from gms_launch.numbers import real, whole
from gms_launch.settings import groups, rules
from gms_launch.settings.declared import BY_NAME, ENV_PREFIX, LONGEST_TEXT, SETTINGS, Setting, Settings
from gms_launch.urls import HIDDEN

#: The [[group]] tables for an agent that another process starts, as JSON: no flag holds them.
TABLES_ENV = "GMS_LAUNCH_GROUP_TABLES"
#: Names with our prefix that are not settings: the process tag, where runs are recorded, what an engine's ranks share.
RESERVED_ENV = frozenset(
    {"GMS_LAUNCH_TAG", "GMS_LAUNCH_HOME", "GMS_LAUNCH_CONFIG", "GMS_LAUNCH_MEETING_SECRET", TABLES_ENV}
)

#: The table of a settings file that others' are in too.
OWN_TABLE = "gms-launch"
#: A settings file or an engine file is smaller than this (bytes); a device that never ends is read no further.
LARGEST_FILE = 2**20
#: What a message repeats of a wrong value (characters).
LONGEST_SHOWN = 120


def parse(setting: Setting, value: Any, source: str) -> Any:
    """Turn `value` into the setting's type, or raise `UsageError` that names the source."""
    where = f"{setting.name} (from {source})"

    def shown(value: Any) -> str:
        return HIDDEN if setting.secret else _short(value)

    if isinstance(value, str) and (wrong := rules.unprintable(value)):
        raise UsageError(f"{where}: there is {wrong} in it")
    if setting.kind is bool:
        if isinstance(value, bool):
            return value
        word = str(value).strip().lower()
        if word in {"1", "true", "yes", "on"}:
            return True
        if word in {"0", "false", "no", "off"}:
            return False
        raise UsageError(f"{where}: {shown(value)} is neither true nor false")
    if isinstance(value, bool) or (setting.kind is str and not isinstance(value, str)):
        raise UsageError(f"{where}: expected {setting.kind.__name__}, found {shown(value)}")
    parsed: Any
    try:
        if isinstance(value, str) and setting.kind is not str:
            parsed = whole(value) if setting.kind is int else real(value)
        elif setting.kind is int and isinstance(value, float):
            raise ValueError("a fraction is no port and no count")
        else:
            parsed = setting.kind(value)
        if isinstance(parsed, float) and not math.isfinite(parsed):
            raise ValueError("TOML has nan and inf")
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{where}: {shown(value)} is not a valid {setting.kind.__name__}") from None
    if setting.choices and parsed not in setting.choices:
        raise UsageError(f"{where}: {shown(parsed)} is not one of {', '.join(setting.choices)}")
    if isinstance(parsed, str):
        if len(parsed) > (longest := int(setting.maximum or LONGEST_TEXT)):
            raise UsageError(f"{where}: {shown(parsed)} is longer than {longest} characters")
        return parsed
    if setting.minimum is not None and not parsed >= setting.minimum:
        raise UsageError(f"{where}: {shown(parsed)} is below {_plain(setting.minimum)}")
    if setting.maximum is not None and not parsed <= setting.maximum:
        raise UsageError(f"{where}: {shown(parsed)} is above {_plain(setting.maximum)}")
    return parsed


def _short(value: Any) -> str:
    """What was given, for a message. A number of thousands of digits cannot even be printed."""
    if isinstance(value, int) and abs(value) > 10**18:
        return "a number of more than 18 digits"
    return rules.shortened(value) if isinstance(value, str) else repr(value)[:LONGEST_SHOWN]


def _plain(number: float) -> str:
    """All digits of a whole number."""
    return str(int(number)) if number == int(number) else f"{number:g}"


def read_toml(path: Path, table_name: str = OWN_TABLE, what: str = "settings file") -> dict[str, Any]:
    """The table of that name of a TOML file if it is there, else the whole file. Raises `UsageError`, `what` it is.

    Also for a key that stands in both, since nobody could say which is meant, and for a setting beside the table, which
    would count for nothing.
    """
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    if wrong := rules.unprintable(str(path)):
        raise UsageError(f"{what} {str(path)!r}: there is {wrong} in its name")
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise UsageError(f"{what} {path} does not exist") from None
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else exc
        raise UsageError(f"{what} {path} cannot be read: {why}") from None
    if len(text) > LARGEST_FILE:
        raise UsageError(f"{what} {path} is larger than {LARGEST_FILE >> 20} MiB: it is none")
    try:
        data: dict[str, Any] = tomllib.loads(text.decode())
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"{what} {path} is not valid TOML: {exc}") from None
    table = data.get(table_name, data)
    if not isinstance(table, dict):
        raise UsageError(f"{what} {path}: [{table_name}] is not a table")
    if table is not data:
        if twice := [key for key in table if key in data]:
            raise UsageError(f"{what} {path}: {twice[0]} is at the top and in [{table_name}]; leave one out")
        own = ["group", *BY_NAME] if table_name == OWN_TABLE else []
        if beside := [key for key in data if key in own]:
            write = f"[[{OWN_TABLE}.group]] instead of [[group]]" if beside[0] == "group" else f"it in [{OWN_TABLE}]"
            raise UsageError(
                f"{what} {path}: {beside[0]} is at the top, and only [{OWN_TABLE}] is read where there is one; write "
                f"{write}"
            )
    return table


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name[:64], known, n=1, cutoff=0.8)  # a poor guess leads away
    return f"; did you mean {close[0]}?" if close else ""


def resolve(
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    toml: Mapping[str, Any] | None = None,
    toml_path: str = "settings file",
    scheduler: Mapping[str, Any] | None = None,
    engine_args: Sequence[str] = (),
) -> Settings:
    """Merge every source into one checked `Settings`.

    `flags` holds only what the user typed (None is "not given"); `scheduler` what Slurm says. Raises `UsageError`
    for unknown names, wrong types, values out of range and contradictions.
    """
    tables: Sequence[Mapping[str, Any]] = ()
    if toml and "group" in toml:
        tables = groups.tables(toml["group"], toml_path, parse)
    elif environ.get(TABLES_ENV):
        tables = groups.tables(_json(environ[TABLES_ENV]), TABLES_ENV, parse)
    if toml and isinstance(toml.get("groups"), (list, dict)):
        raise UsageError(f"{toml_path}: groups is a number, of equal groups; tables of groups begin with [[group]]")
    for key in toml or {}:
        if key != "group" and key not in BY_NAME:
            raise UsageError(f"{toml_path}: unknown setting {_short(key)}{_suggest(key, list(BY_NAME))}")
    known_env = [s.env for s in SETTINGS] + [env for s in SETTINGS for _, env in s.old]
    for key in environ:
        if key.startswith(ENV_PREFIX) and key not in RESERVED_ENV and key not in known_env:
            shown = key if key.isprintable() else repr(key)
            raise UsageError(f"environment: unknown setting {shown[:LONGEST_SHOWN]}{_suggest(key, known_env)}")

    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for s in SETTINGS:
        candidates: list[tuple[Any, str]] = [(flags.get(s.name), s.flag)]
        # An empty variable counts as unset, as in the recipe's own ${NAME:-default}.
        candidates += [(environ.get(name) or None, name) for name in (s.env, *(env for _, env in s.old))]
        if s.recipe:
            candidates.append((environ.get(s.recipe) or None, s.recipe))
        candidates.append(((toml or {}).get(s.name), toml_path))
        candidates.append(((scheduler or {}).get(s.name), "Slurm"))
        if (toml or {}).get(s.name) is not None:
            parse(s, (toml or {})[s.name], toml_path)  # what is wrong there is wrong, also where a flag overrides it
        for value, source in candidates:
            if value is not None:
                values[s.name] = parse(s, value, source)
                sources[s.name] = source
                break
        else:
            values[s.name] = s.default
    serving = max(1, values["nnodes"] - values["spares"])
    if sources.get("tp") == "Slurm":
        # It counts the GPUs of spares too, and of all replicas.
        values["tp"] = max(1, values["tp"] // values["nnodes"] * serving // values["dp"])
    if "tp" not in sources:
        values["tp"] = max(
            1, serving // (values["pp"] * values["dp"])
        )  # a GPU on every node; Slurm says when there are more
    # A default gives way to what was said of its neighbour.
    for name, most in (
        ("health_interval", values["health_timeout"] / 4),
        ("canary_interval", values["canary_timeout"] / 4),
        ("restart_backoff", values["restart_backoff_max"]),
        ("service_liveness", rules.longest_liveness(values["dynamo_lease_ttl"])),
    ):
        if name not in sources:
            values[name] = min(values[name], most)
    return checked(Settings(**values, engine_args=tuple(engine_args), tables=tuple(tables), sources=sources))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None  # which is no list of tables


def checked(settings: Settings) -> Settings:
    """The same settings. Raises `UsageError` for contradictions."""
    rules.check(settings)
    groups.check(settings)
    return settings
