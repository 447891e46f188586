"""Every setting of gms-launch, once: flag, environment name, recipe name, TOML key, default and help.

`resolve` merges the sources in the order flags, `GMS_LAUNCH_*`, the recipe's own names, a TOML file, defaults
from the scheduler, built-in defaults, and checks that the result makes sense. It reads only what it is given: no
environment, no files (`read_toml` does that) and no clock, so that a test can say what the world looks like.
What it does not do: find out who this node is (`topology`) or hand out ports (`ports`).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gms_launch.errors import UsageError
from gms_launch.numbers import real, whole
from gms_launch.settings import rules

ENV_PREFIX = "GMS_LAUNCH_"
#: Names with our prefix that are not settings: the process tag, and where runs are recorded.
RESERVED_ENV = frozenset({"GMS_LAUNCH_TAG", "GMS_LAUNCH_HOME", "GMS_LAUNCH_CONFIG"})


@dataclass(frozen=True)
class Setting:
    """One setting. `name` is the TOML key, the dataclass field and, with dashes, the flag, unless `word` is that."""

    name: str
    kind: type
    default: Any
    help: str
    group: str
    recipe: str | None = None
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    word: str = ""

    @property
    def flag(self) -> str:
        return "--" + (self.word or self.name).replace("_", "-")

    @property
    def env(self) -> str:
        return ENV_PREFIX + (self.word or self.name).upper()

    @property
    def old(self) -> tuple[tuple[str, str], ...]:
        """Flag and environment name as they were before the setting got its `word`; still taken."""
        return (("--" + self.name.replace("_", "-"), ENV_PREFIX + self.name.upper()),) if self.word else ()


def _port(name: str, default: int, help_: str, recipe: str | None = None, maximum: int = 65535) -> Setting:
    return Setting(name, int, default, help_, "ports", recipe, minimum=1, maximum=maximum)


def _seconds(name: str, default: float, help_: str, minimum: float = 0.05) -> Setting:
    return Setting(name, float, default, help_ + " (seconds)", "timing", minimum=minimum)


SETTINGS: tuple[Setting, ...] = (
    Setting("run_id", str, "", "name of the run; made up when empty", "run", word="run"),
    Setting("model", str, "", "model directory", "engine", recipe="MODEL"),
    Setting("served_model_name", str, "", "name clients ask for; the model path when empty", "engine"),
    Setting("engine", str, "vllm", "which engine to run", "engine", choices=("vllm", "reference", "command")),
    Setting("engine_file", str, "", "TOML file that describes the engine `command`", "engine"),
    Setting("tp", int, 1, "tensor-parallel size over all nodes", "engine", recipe="TP", minimum=1),
    Setting("pp", int, 1, "pipeline-parallel size over all nodes", "engine", minimum=1),
    Setting("shadows", int, 1, "shadow cohorts parked behind the primary", "engine", minimum=0, maximum=9),
    Setting(
        "activation",
        str,
        "lock",
        "who decides which shadow takes over: the lock they all wait for, or the leader's agent",
        "engine",
        choices=("lock", "agent"),
    ),
    Setting("python", str, "", "interpreter for engines and frontend; this one when empty", "engine"),
    Setting("namespace", str, "dynamo", "Dynamo namespace the engines register in", "engine"),
    Setting("cache_dir", str, "", "engines' compile caches; ~/.cache/gms-launch when empty", "engine"),
    Setting("nnodes", int, 1, "nodes of the run", "topology", recipe="NNODES", minimum=1),
    Setting("node_rank", int, 0, "rank of this node, 0 is the leader", "topology", recipe="NODE_RANK", minimum=0),
    Setting("leader_addr", str, "127.0.0.1", "name or address of the leader node", "topology", recipe="LEADER_ADDR"),
    Setting("interface", str, "", "network interface that the nodes share, where a node has several", "topology"),
    Setting("hosts", str, "", "start an agent on each of these hosts by SSH; the first leads", "topology"),
    Setting(
        "gms_server",
        str,
        "auto",
        "which GMS server: upstream where gpu_memory_service can be imported (auto), or one of the two",
        "gms",
        choices=("auto", "builtin", "upstream"),
    ),
    Setting(
        "gms_socket_dir",
        str,
        "",
        "directory of the GMS sockets and the failover lock; in the node-local directory when empty",
        "gms",
        recipe="GMS_SOCKET_DIR",
    ),
    Setting(
        "gms_memory",
        str,
        "auto",
        "what the builtin GMS server owns: cuda where there is a GPU and none is made up (auto), or one of the two",
        "gms",
        choices=("auto", "host", "cuda"),
    ),
    Setting("virtual_gpus", int, 1, "devices to make up on a machine without GPUs", "gms", minimum=1, maximum=16),
    Setting("virtual_gpu_mib", int, 4096, "memory of a made-up device (MiB)", "gms", minimum=1),
    Setting("etcd_bin", str, "", "etcd binary; found on PATH when empty", "services"),
    Setting("nats_bin", str, "", "nats-server binary; found on PATH when empty", "services"),
    Setting("nats", bool, True, "run NATS; --no-nats keeps events on ZMQ and needs no NATS", "services"),
    Setting(
        "event_plane",
        str,
        "auto",
        "Dynamo's event plane; auto is zmq, which every supported release understands",
        "services",
        choices=("auto", "zmq", "nats"),
    ),
    Setting(
        "etcd_endpoints",
        str,
        "",
        "use this etcd (comma-separated URLs) instead of starting one",
        "services",
        recipe="ETCD_ENDPOINTS",
    ),
    Setting("nats_server", str, "", "use this NATS (URL) instead of starting one", "services", recipe="NATS_SERVER"),
    Setting("frontend_host", str, "", "address the frontend listens on; the leader's when empty", "services"),
    Setting(
        "migration_limit", int, 10, "how often a request may move; 0: it ends with its engine", "services", minimum=0
    ),
    _port("frontend_port", 8000, "HTTP port of the frontend", "FRONTEND_PORT"),
    _port("etcd_port", 2379, "etcd client port"),
    _port("etcd_peer_port", 2380, "etcd peer port"),
    _port("nats_port", 4222, "NATS client port"),
    _port("word_port", 2390, "UDP port on which a node hears from the others that a life has ended"),
    _port("master_port", 29500, "first port where the ranks of cohort 0 meet; + 100 a cohort"),
    # Dynamo reads DYN_SYSTEM_PORT as a signed 16-bit number.
    _port("system_port", 8080, "first system port of the engines; + 1 a cohort", maximum=32000),
    _port("nixl_port", 8280, "first NIXL side-channel port; + 1 a cohort"),
    _port("vllm_port", 21000, "first port of vLLM's own range; + 100 a cohort"),
    _seconds("service_timeout", 30.0, "deadline for etcd, NATS and the frontend to be ready"),
    _seconds(
        "service_liveness",
        3.0,
        "how long etcd may be silent before it is restarted; NATS and the frontend: four times that; "
        "if not given, what dynamo_lease_ttl leaves at most",
    ),
    _seconds("gms_timeout", 60.0, "deadline for every GMS socket to answer"),
    _seconds("start_timeout", 1800.0, "deadline for an engine to be parked"),
    _seconds("promotion_timeout", 60.0, "deadline from the lock to a served token"),
    _seconds(
        "hold_cold_start", 0.0, "how long requests wait for an engine that starts, where no shadow is parked", 0.0
    ),
    _seconds(
        "health_interval",
        5.0,
        "pause between two looks at a rank: system port, stopped processes; if not given, health_timeout / 4 at most",
    ),
    _seconds("health_timeout", 20.0, "how long a rank may be silent or stopped before it is taken for dead"),
    Setting("canary", bool, True, "ask the primary for a token when nobody else does", "timing"),
    _seconds(
        "canary_interval",
        10.0,
        "how long nobody may have got a token before one is asked for; if not given, canary_timeout / 4 at most",
    ),
    _seconds("canary_timeout", 60.0, "how long no token may come, although asked for, before the primary is killed"),
    _seconds("stop_timeout", 10.0, "time an engine gets between SIGTERM and SIGKILL"),
    _seconds("kill_wait", 30.0, "time from SIGTERM to the end of the whole stop; Slurm's KillWait"),
    _seconds("lease_ttl", 5.0, "how long a node may be cut off before it is taken for lost"),
    _seconds("node_wait", 300.0, "how long to wait for a node that has not come yet, or was lost"),
    _seconds("dynamo_lease_ttl", 20.0, "lease of Dynamo's processes in etcd"),
    _seconds("restart_backoff", 1.0, "first delay before a cohort that failed early is started again; doubles"),
    _seconds("restart_backoff_max", 60.0, "longest delay between two starts of a cohort"),
    _seconds("restart_window", 600.0, "window in which starts are counted"),
    Setting(
        "restart_limit", int, 5, "failed starts in the window after which a cohort is given up", "timing", minimum=1
    ),
    Setting("group_kill", bool, True, "test switch: with --no-group-kill nothing is killed when a rank dies", "run"),
    Setting("log_max_mib", int, 64, "size at which a log is rotated (MiB); one old part is kept", "run", minimum=1),
)
BY_NAME: Mapping[str, Setting] = {s.name: s for s in SETTINGS}


@dataclass(frozen=True)
class Settings:
    """The resolved settings of one `up`. Field names and meanings are those of `SETTINGS`.

    `sources` says where each value that is not a default came from; `engine_args` is what followed `--`.
    """

    run_id: str
    model: str
    served_model_name: str
    engine: str
    engine_file: str
    tp: int
    pp: int
    shadows: int
    activation: str
    python: str
    namespace: str
    cache_dir: str
    nnodes: int
    node_rank: int
    leader_addr: str
    interface: str
    hosts: str
    gms_server: str
    gms_socket_dir: str
    gms_memory: str
    virtual_gpus: int
    virtual_gpu_mib: int
    etcd_bin: str
    nats_bin: str
    nats: bool
    event_plane: str
    etcd_endpoints: str
    nats_server: str
    frontend_host: str
    migration_limit: int
    frontend_port: int
    etcd_port: int
    etcd_peer_port: int
    nats_port: int
    word_port: int
    master_port: int
    system_port: int
    nixl_port: int
    vllm_port: int
    service_timeout: float
    service_liveness: float
    gms_timeout: float
    start_timeout: float
    promotion_timeout: float
    hold_cold_start: float
    health_interval: float
    health_timeout: float
    canary: bool
    canary_interval: float
    canary_timeout: float
    stop_timeout: float
    kill_wait: float
    lease_ttl: float
    node_wait: float
    dynamo_lease_ttl: float
    restart_backoff: float
    restart_backoff_max: float
    restart_window: float
    restart_limit: int
    group_kill: bool
    log_max_mib: int
    engine_args: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def cohorts(self) -> int:
        return self.shadows + 1

    @property
    def world(self) -> int:
        """GPUs of one cohort, over all nodes."""
        return self.tp * self.pp

    @property
    def engine_grace(self) -> float:
        """Seconds from SIGTERM to SIGKILL for a serving engine: the whole stop must fit into kill_wait."""
        return min(self.stop_timeout, 0.5 * self.kill_wait)

    def was_set(self, name: str) -> bool:
        """True when the user gave `name` a value, so that it must not be moved silently."""
        return name in self.sources

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data.pop("sources")
        data["engine_args"] = list(self.engine_args)
        return data


def parse(setting: Setting, value: Any, source: str) -> Any:
    """Turn `value` into the setting's type, or raise `UsageError` that names the source."""
    where = f"{setting.name} (from {source})"
    if setting.kind is bool:
        if isinstance(value, bool):
            return value
        word = str(value).strip().lower()
        if word in {"1", "true", "yes", "on"}:
            return True
        if word in {"0", "false", "no", "off"}:
            return False
        raise UsageError(f"{where}: {value!r} is neither true nor false")
    if isinstance(value, bool) or (setting.kind is str and not isinstance(value, str)):
        raise UsageError(f"{where}: expected {setting.kind.__name__}, found {value!r}")
    parsed: Any
    try:
        if isinstance(value, str) and setting.kind is not str:
            parsed = whole(value) if setting.kind is int else real(value)
        elif setting.kind is int and isinstance(value, float):
            raise ValueError("a fraction is no port and no count")
        else:
            parsed = setting.kind(value)
    except (TypeError, ValueError):
        raise UsageError(f"{where}: {value!r} is not a valid {setting.kind.__name__}") from None
    if setting.choices and parsed not in setting.choices:
        raise UsageError(f"{where}: {parsed!r} is not one of {', '.join(setting.choices)}")
    if setting.minimum is not None and not parsed >= setting.minimum:
        raise UsageError(f"{where}: {parsed} is below {setting.minimum:g}")
    if setting.maximum is not None and not parsed <= setting.maximum:
        raise UsageError(f"{where}: {parsed} is above {setting.maximum:g}")
    return parsed


def read_toml(path: Path, table_name: str = "gms-launch", what: str = "settings file") -> dict[str, Any]:
    """The table of that name of a TOML file if it is there, else the whole file. Raises `UsageError`, `what` it is."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{what} {path} does not exist") from None
    except OSError as exc:
        raise UsageError(f"{what} {path} cannot be read: {exc.strerror}") from None
    except ValueError as exc:
        raise UsageError(f"{what} {path} is not valid TOML: {exc}") from None
    table = data.get(table_name, data)
    if not isinstance(table, dict):
        raise UsageError(f"{what} {path}: [{table_name}] is not a table")
    return table


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
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
    for key in toml or {}:
        if key not in BY_NAME:
            raise UsageError(f"{toml_path}: unknown setting {key!r}{_suggest(key, list(BY_NAME))}")
    known_env = [s.env for s in SETTINGS] + [env for s in SETTINGS for _, env in s.old]
    for key in environ:
        if key.startswith(ENV_PREFIX) and key not in RESERVED_ENV and key not in known_env:
            raise UsageError(f"environment: unknown setting {key}{_suggest(key, known_env)}")

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
        for value, source in candidates:
            if value is not None:
                values[s.name] = parse(s, value, source)
                sources[s.name] = source
                break
        else:
            values[s.name] = s.default
    if "tp" not in sources:
        values["tp"] = max(1, values["nnodes"] // values["pp"])  # a GPU on every node; Slurm says when there are more
    # A default gives way to what was said of its neighbour.
    for name, most in (
        ("health_interval", values["health_timeout"] / 4),
        ("canary_interval", values["canary_timeout"] / 4),
        ("restart_backoff", values["restart_backoff_max"]),
        ("service_liveness", rules.longest_liveness(values["dynamo_lease_ttl"])),
    ):
        if name not in sources:
            values[name] = min(values[name], most)
    return checked(Settings(**values, engine_args=tuple(engine_args), sources=sources))


def checked(settings: Settings) -> Settings:
    """The same settings. Raises `UsageError` for contradictions."""
    rules.check(settings)
    return settings
