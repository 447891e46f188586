"""An engine that a TOML file describes: --engine command --engine-file FILE.

The seam for engines that this package does not know. The file says how to run a rank, in which environment, which ports
it wants, and which lines of a leader rank's log show its phase (docs/engines.md has the whole layout). What it must do
by itself: load through GMS, park behind the lock in {lock_path}, and register with Dynamo when it has it.
"""

from __future__ import annotations

import os
import re
import shutil
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from gms_launch.cohort.model import Phase
from gms_launch.cohort.steps import Step
from gms_launch.engines import installed
from gms_launch.engines.base import LOOPBACK, MEETING_SECRET, RankSpec
from gms_launch.errors import UsageError
from gms_launch.gms.devices import CUDA_ORDER
from gms_launch.process.lifecycle import Command
from gms_launch.settings.declared import Settings
from gms_launch.settings.groups import COMPONENTS
from gms_launch.settings.resolve import read_toml

#: What may stand in braces. `port_NAME` are those of [ports].
PLACEHOLDERS = (
    *("python", "model", "served_model_name", "tp", "pp", "dp", "local_ranks", "nnodes", "node_rank", "cohort_id"),
    *("incarnation", "leader_address", "address", "namespace", "master_port", "system_port", "nixl_port", "vllm_port"),
    *("role", "component", "rpc_port"),
    *("gms_dir", "lock_path", "gms_memory", "cache_dir", "scratch_dir"),
)
#: Names of variables and of ports: what a shell and a placeholder can hold.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_PHASES = {"parked": Phase.PARKED, "waking": Phase.WAKING, "active": Phase.ACTIVE}


class File(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The file. `headless` is the command of node ranks above 0; `command` serves there too when it is empty.

    `vital` is a pattern for the command lines of processes whose end is the engine's end.
    """

    command: list[str]
    headless: list[str] = []
    needs: list[str] = []
    environment: dict[str, str] = {}
    unset: list[str] = []
    ports: dict[str, int] = {}
    phase: dict[str, str] = {}
    vital: str = ""


@dataclass(frozen=True)
class CommandEngine:
    """The module behind --engine command."""

    file: File
    path: str
    patterns: Mapping[str, re.Pattern[str]] = field(default_factory=dict)
    name: str = "command"

    @property
    def ports(self) -> dict[str, int]:
        """First port of every name in [ports]; each cohort gets the first plus its number."""
        return self.file.ports

    def problems(self, settings: Settings) -> list[str]:
        found = []
        if missing := installed.look(settings.python, self.file.needs).missing:
            found.append(f"{self.path} needs {' and '.join(missing)}, which cannot be imported")
        program = self.file.command[0]
        if "{" not in program and shutil.which(program) is None:
            found.append(f"{self.path}: command: {program} is not an executable file")
        return found

    def describe(self, settings: Settings) -> str:
        return f"as {self.path} says: {' '.join(self.file.command)}"

    def command(self, spec: RankSpec) -> Command:
        known = _values(spec)
        argv = self.file.headless if spec.headless and self.file.headless else self.file.command
        env: dict[str, str | None] = dict.fromkeys(self.file.unset)
        if spec.gms_memory == "cuda":
            env |= CUDA_ORDER
        env |= spec.device_view
        if not spec.headless:
            env |= spec.plane.environment()
        env |= {"ENGINE_ID": str(spec.cohort_id), "GMS_SOCKET_DIR": str(spec.gms_dir)}
        env |= {"TMPDIR": str(spec.scratch_dir), MEETING_SECRET: spec.meeting_secret}
        env |= {"FAILOVER_LOCK_PATH": str(spec.lock_path)}
        env |= {name: value.format_map(known) for name, value in self.file.environment.items()}
        return Command((*(word.format_map(known) for word in argv), *spec.engine_args), env)

    def phase_of(self, line: str) -> Phase | None:
        return next((_PHASES[n] for n, p in self.patterns.items() if n in _PHASES and p.search(line)), None)

    @property
    def imports(self) -> tuple[str, ...]:
        return ()

    def step_of(self, line: str) -> Step | None:
        return None  # a start is one step, until its file says that it is parked

    def is_vital(self, command_line: str) -> bool:
        return bool(self.file.vital) and re.search(self.file.vital, command_line) is not None

    def is_awake(self, line: str) -> bool:
        return "awake" in self.patterns and self.patterns["awake"].search(line) is not None


def _values(spec: RankSpec) -> dict[str, Any]:
    values: dict[str, Any] = {n: getattr(spec, n) for n in PLACEHOLDERS if hasattr(spec, n)}
    values |= {"local_ranks": spec.tp * spec.pp * spec.dp // spec.nnodes, "address": spec.plane.address}
    values |= {"namespace": spec.plane.namespace, "served_model_name": spec.served_model_name or spec.model}
    values |= {"component": spec.component or COMPONENTS[spec.role]}
    return values | {f"port_{name}": port for name, port in spec.extra_ports.items()}


@cache
def read(file: str) -> CommandEngine:
    """The engine that a file describes, read once: a run goes on with what it began with.

    Raises `UsageError` that names what is wrong in it.
    """
    if not file:
        raise UsageError("--engine command needs --engine-file FILE, which says how to run it (docs/engines.md)")
    path = Path(os.path.expanduser(file))
    table = read_toml(path, "engine", "engine file")
    try:
        described = msgspec.convert(table, File)
    except msgspec.ValidationError as exc:
        raise UsageError(f"engine file {path}: {exc}") from None
    if not described.command:
        raise UsageError(f"engine file {path}: command is empty")
    texts = {"command": described.command, "headless": described.headless}
    texts |= {f"environment.{k}": [v] for k, v in described.environment.items()}
    for name in (*described.environment, *described.unset, *described.ports):
        if not _NAME.match(name):
            raise UsageError(f"engine file {path}: {name!r} is no name: use letters, digits and underscores")
    for module in described.needs:
        if not all(map(_NAME.match, module.split("."))):
            raise UsageError(f"engine file {path}: needs: {module!r} is no name of a module")
    for where, words in texts.items():
        for word in words:
            if "\0" in word:
                raise UsageError(f"engine file {path}: {where}: there is a NUL in {word!r}")
            _check_placeholders(path, where, word, described.ports)
    for name, port in described.ports.items():
        if not 0 < port < 65536:
            raise UsageError(f"engine file {path}: ports.{name}: {port} is no port (1 to 65535)")
    if (host := described.environment.get("DYN_SYSTEM_HOST", LOOPBACK)) != LOOPBACK:
        raise UsageError(
            f"engine file {path}: environment.DYN_SYSTEM_HOST is {host!r}; the agent asks on {LOOPBACK}, and elsewhere "
            "anybody could put the engine to sleep: leave it out"
        )
    patterns = {}
    _pattern(path, "vital", described.vital)
    for name, pattern in described.phase.items():
        if name not in (*_PHASES, "awake"):
            raise UsageError(f"engine file {path}: phase.{name}: the phases are parked, waking, awake and active")
        patterns[name] = _pattern(path, f"phase.{name}", pattern)
    if "parked" not in patterns and "{system_port}" not in " ".join(
        [*described.command, *described.environment.values()]
    ):
        raise UsageError(
            f"engine file {path}: nothing would show that the engine is parked: give phase.parked a pattern, or serve "
            "/health on {system_port}"
        )
    return CommandEngine(described, str(path), patterns)


def _pattern(path: Path, where: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as exc:
        raise UsageError(f"engine file {path}: {where}: {pattern!r} is no regular expression: {exc}") from None


def _check_placeholders(path: Path, where: str, word: str, ports: Mapping[str, int]) -> None:
    known = {*PLACEHOLDERS, *(f"port_{name}" for name in ports)}
    try:
        parts = [part[1:] for part in string.Formatter().parse(word) if part[1] is not None]
    except ValueError as exc:
        raise UsageError(f"engine file {path}: {where}: {word!r}: {exc}; a brace is written twice") from None
    for name, shape, conversion in parts:
        if name not in known:
            raise UsageError(
                f"engine file {path}: {where}: {{{name}}} is not known; known are {', '.join(sorted(known))}"
            )
        if shape or conversion:
            raise UsageError(f"engine file {path}: {where}: {word!r}: a placeholder is a name in braces and no more")
