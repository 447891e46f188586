"""Every setting of gms-launch, declared once: a field of `Settings`.

From a field come the flag, the name in the environment, the TOML key, the help, the limits and the line in
docs/reference.md; type checkers know its type. To add a setting, add a field. How sources are merged is in `resolve`,
what settings must not say together in `rules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_type_hints

from gms_launch.urls import hidden

ENV_PREFIX = "GMS_LAUNCH_"
#: Of every duration (seconds): two weeks. poll() takes 24 days, and nobody means more.
LONGEST = 14 * 24 * 3600.0
#: Of a text, unless its setting says more (characters): as long as the kernel's longest path.
LONGEST_TEXT = 4095
#: Nodes of a run, and ranks of an engine: far beyond what there is, and little enough to be laid out in a moment.
MOST_NODES, MOST_RANKS = 4096, 65536


@dataclass(frozen=True)
class Setting:
    """One setting. `name` is the TOML key, the dataclass field and, with dashes, the flag, unless `word` is that.

    `maximum` of a text is its length. `secret`: a URL that may hold a login.
    """

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
    secret: bool = False

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


def setting(default: Any, help_: str, group: str, **limits: Any) -> Any:
    """A field that is a setting. `limits`: recipe (its name in the recipe), choices, minimum, maximum, secret."""
    return field(default=default, metadata={"help": help_, "group": group, **limits})


def port(default: int, help_: str, recipe: str | None = None, maximum: int = 65535) -> Any:
    """A port number."""
    return setting(default, help_, "ports", recipe=recipe, minimum=1, maximum=maximum)


def seconds(default: float, help_: str) -> Any:
    """A duration."""
    return setting(default, help_ + " (seconds)", "timing", minimum=0.05, maximum=LONGEST)


@dataclass(frozen=True)
class Settings:
    """The resolved settings of one `up`.

    `sources` says where each value that is not a default came from; `engine_args` is what followed `--`; `tables` are
    the settings file's [[group]] tables, each with what it says.
    """

    run_id: str = setting("", "name of the run; made up when empty", "run", word="run")
    model: str = setting("", "model directory", "engine", recipe="MODEL")
    served_model_name: str = setting("", "name clients ask for; the model path when empty", "engine")
    engine: str = setting("vllm", "which engine to run", "engine", choices=("vllm", "reference", "command"))
    engine_file: str = setting("", "TOML file that describes the engine `command`", "engine")
    tp: int = setting(1, "tensor-parallel size over all nodes", "engine", recipe="TP", minimum=1, maximum=MOST_RANKS)
    pp: int = setting(1, "pipeline-parallel size over all nodes", "engine", minimum=1, maximum=MOST_RANKS)
    dp: int = setting(
        1,
        "data-parallel replicas over all nodes, each of tp times pp GPUs of one node",
        "engine",
        minimum=1,
        maximum=MOST_RANKS,
    )
    dp_lb: str = setting(
        "internal",
        "who shares requests out over the replicas: the first node, or (hybrid) each node takes them for its own",
        "engine",
        choices=("internal", "hybrid"),
    )
    shadows: int = setting(1, "shadow cohorts parked behind the primary", "engine", minimum=0, maximum=9)
    activation: str = setting(
        "lock",
        "who decides which shadow takes over: the lock they all wait for, or the leader's agent",
        "engine",
        choices=("lock", "agent"),
    )
    warm_slots: int = setting(
        0,
        "processes on each node that have imported what an engine needs and wait to be started as one",
        "engine",
        minimum=0,
        maximum=9,
    )
    python: str = setting("", "interpreter for engines and frontend; this one when empty", "engine")
    namespace: str = setting("dynamo", "Dynamo namespace the engines register in", "engine")
    cache_dir: str = setting("", "engines' compile caches; ~/.cache/gms-launch when empty", "engine")
    nnodes: int = setting(1, "nodes of the run", "topology", recipe="NNODES", minimum=1, maximum=MOST_NODES)
    node_rank: int = setting(
        0, "rank of this node, 0 is the leader", "topology", recipe="NODE_RANK", minimum=0, maximum=MOST_NODES
    )
    leader_addr: str = setting("127.0.0.1", "name or address of the leader node", "topology", recipe="LEADER_ADDR")
    groups: int = setting(
        1,
        "equal groups, each an engine with nodes or GPUs of its own; TOML's [[group]] tables say unequal ones",
        "topology",
        minimum=1,
        maximum=1024,
    )
    min_groups: int = setting(
        1, "a run of groups ends when fewer than so many can still serve", "topology", minimum=1, maximum=1024
    )
    spares: int = setting(
        0,
        "of the nodes, so many at the end run no engine and wait to take a lost node's place",
        "topology",
        minimum=0,
        maximum=MOST_NODES,
    )
    interface: str = setting("", "network interface that the nodes share, where a node has several", "topology")
    hosts: str = setting("", "start an agent on each of these hosts by SSH; the first leads", "topology", maximum=2**16)
    gms_server: str = setting(
        "auto",
        "which GMS server: upstream where gpu_memory_service can be imported (auto), or one of the two",
        "gms",
        choices=("auto", "builtin", "upstream"),
    )
    gms_socket_dir: str = setting(
        "",
        "directory of the GMS sockets and the failover lock; in the node-local directory when empty",
        "gms",
        recipe="GMS_SOCKET_DIR",
    )
    gms_memory: str = setting(
        "auto",
        "what the builtin GMS server owns: cuda where there is a GPU and none is made up (auto), or one of the two",
        "gms",
        choices=("auto", "host", "cuda"),
    )
    virtual_gpus: int = setting(1, "devices to make up on a machine without GPUs", "gms", minimum=1, maximum=16)
    virtual_gpu_mib: int = setting(4096, "memory of a made-up device (MiB)", "gms", minimum=1, maximum=2**24)
    etcd_bin: str = setting("", "etcd binary; found on PATH when empty", "services")
    etcd_members: str = setting(
        "1",
        "members of etcd, on the first nodes: with 3 the loss of one is borne; auto: 3 from 3 nodes (no spares) on",
        "services",
        choices=("auto", "1", "3", "5"),
    )
    nats_bin: str = setting("", "nats-server binary; found on PATH when empty", "services")
    nats: bool = setting(True, "run NATS; --no-nats keeps events on ZMQ and needs no NATS", "services")
    event_plane: str = setting(
        "auto",
        "Dynamo's event plane; auto is zmq, which every supported release understands",
        "services",
        choices=("auto", "zmq", "nats"),
    )
    etcd_endpoints: str = setting(
        "", "use this etcd (comma-separated URLs) instead of starting one", "services", recipe="ETCD_ENDPOINTS"
    )
    etcd_ca: str = setting(
        "", "authority of that etcd's certificate (PEM), with https URLs; the system's own when empty", "services"
    )
    etcd_cert: str = setting("", "certificate that is shown to that etcd (PEM)", "services")
    etcd_key: str = setting("", "private key of --etcd-cert (PEM, without a passphrase)", "services")
    nats_server: str = setting(
        "",
        "use this NATS (URL) instead of starting one; nats://USER:PASSWORD@HOST:PORT, or nats://TOKEN@... to log in",
        "services",
        recipe="NATS_SERVER",
        secret=True,
    )
    nats_ca: str = setting(
        "", "authority of that NATS's certificate (PEM), with a tls URL; the system's own when empty", "services"
    )
    nats_cert: str = setting("", "certificate that is shown to that NATS (PEM)", "services")
    nats_key: str = setting("", "private key of --nats-cert (PEM, without a passphrase)", "services")
    frontend_host: str = setting(
        "",
        "address clients come in by; when empty the leader's with --api-key-file or --open-frontend, else loopback",
        "services",
    )
    api_key_file: str = setting(
        "", "file of the keys that clients must bring, one a line; none is asked for when empty", "services"
    )
    open_frontend: bool = setting(
        False, "let anybody in who reaches the frontend, without a key, on another address than loopback", "services"
    )
    tls_cert: str = setting("", "certificate (PEM, with its chain) by which clients speak HTTPS", "services")
    tls_key: str = setting("", "private key of --tls-cert (PEM, without a passphrase)", "services")
    haproxy_bin: str = setting(
        "", "haproxy binary, for --api-key-file and several members of etcd; found on PATH when empty", "services"
    )
    frontends: str = setting(
        "1",
        "frontends, one on each of the first nodes; auto: one beside each member of etcd",
        "services",
        choices=("auto", "1", "2", "3", "4", "5"),
    )
    migration_limit: int = setting(
        50, "how often a request may move; 0: it ends with its engine", "services", minimum=0, maximum=2**32 - 1
    )
    metrics_host: str = setting(
        "127.0.0.1", "address metrics are served on; node: this node's, of the network that the nodes share", "services"
    )
    metrics_port: int = setting(
        0, "TCP port on which every agent serves metrics to Prometheus; 0: none", "ports", minimum=0, maximum=65535
    )
    frontend_port: int = port(8000, "HTTP port of the frontend", recipe="FRONTEND_PORT")
    frontend_inner_port: int = port(8001, "port of the frontend behind the proxy that asks for keys")
    etcd_port: int = port(2379, "etcd client port")
    etcd_peer_port: int = port(2380, "etcd peer port; on the loopback, where etcd has one member")
    etcd_proxy_port: int = port(2381, "port on which Dynamo's processes of a node find an etcd of several members")
    nats_port: int = port(4222, "NATS client port")
    word_port: int = port(2390, "UDP port on which a node hears from the others that a life has ended")
    master_port: int = port(29500, "first port where the ranks of cohort 0 meet; + 100 a cohort")
    system_port: int = port(8080, "first system port of the engines; + 1 a cohort", maximum=32000)
    nixl_port: int = port(8280, "first NIXL side-channel port; + 1 a cohort")
    vllm_port: int = port(21000, "first port of vLLM's own range; + 100 a cohort")
    service_timeout: float = seconds(30.0, "deadline for etcd, NATS and the frontend to be ready")
    service_liveness: float = seconds(
        3.0,
        "how long etcd may be silent before it is restarted, five times that while it is at work; NATS and the "
        "frontend: four times that; if not given, what dynamo_lease_ttl leaves at most",
    )
    gms_timeout: float = seconds(60.0, "deadline for every GMS socket to answer")
    start_timeout: float = seconds(1800.0, "deadline for an engine to be parked")
    promotion_timeout: float = seconds(60.0, "deadline from the lock to a served token")
    hold_cold_start: float = setting(
        0.0,
        "how long requests wait for an engine that starts, where no shadow is parked (seconds)",
        "timing",
        minimum=0,
        maximum=LONGEST,
    )
    health_interval: float = seconds(
        5.0,
        "pause between two looks at a rank: system port, stopped processes; if not given, health_timeout / 4 at most",
    )
    health_timeout: float = seconds(20.0, "how long a rank may be silent or stopped before it is taken for dead")
    canary: bool = setting(True, "ask the primary for a token when nobody else does", "timing")
    canary_interval: float = seconds(
        10.0, "how long nobody may have got a token before one is asked for; if not given, canary_timeout / 4 at most"
    )
    canary_timeout: float = seconds(
        60.0, "how long no token may come, although asked for, before the primary is killed"
    )
    stop_timeout: float = seconds(10.0, "time an engine gets between SIGTERM and SIGKILL")
    kill_wait: float = seconds(30.0, "time from SIGTERM to the end of the whole stop; Slurm's KillWait")
    lease_ttl: float = seconds(5.0, "how long a node may be cut off before it is taken for lost")
    node_wait: float = seconds(300.0, "how long to wait for a node that has not come yet, or was lost")
    spare_wait: float = seconds(10.0, "how long a node is lost before a spare takes its place")
    dynamo_lease_ttl: float = seconds(20.0, "lease of Dynamo's engines in etcd; that of a frontend is 40 s longer")
    restart_backoff: float = seconds(1.0, "first delay before a cohort that failed early is started again; doubles")
    restart_backoff_max: float = seconds(60.0, "longest delay between two starts of a cohort")
    restart_window: float = seconds(600.0, "window in which starts are counted")
    restart_limit: int = setting(
        5, "failed starts in the window after which a cohort is given up", "timing", minimum=1, maximum=1000
    )
    group_kill: bool = setting(True, "test switch: with --no-group-kill nothing is killed when a rank dies", "run")
    log_max_mib: int = setting(
        64, "size at which a log is rotated (MiB); one old part is kept", "run", minimum=1, maximum=2**20
    )
    on_event: str = setting(
        "", "shell command that the leader's agent runs for every event, which it gets as JSON on stdin", "run"
    )
    on_event_timeout: float = seconds(
        10.0, "time that --on-event gets for one event before its process group is killed"
    )
    engine_args: tuple[str, ...] = ()
    tables: tuple[Mapping[str, Any], ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def cohorts(self) -> int:
        return self.shadows + 1

    @property
    def world(self) -> int:
        """GPUs of one cohort, over all nodes."""
        return self.tp * self.pp * self.dp

    def members(self, nnodes: int) -> int:
        """Of the run's own etcd, in a run of so many nodes."""
        return (3 if nnodes >= 3 else 1) if self.etcd_members == "auto" else int(self.etcd_members)

    @property
    def serving_nodes(self) -> int:
        """Nodes that engines run on: those in front of the spares."""
        return max(1, self.nnodes - self.spares)

    @property
    def hybrid(self) -> bool:
        """Whether every node registers an engine of its own: a cohort serves on all of them, or on none."""
        return self.dp_lb == "hybrid" and self.serving_nodes > 1 and not self.grouped

    def fronts(self, nnodes: int) -> int:
        """How many frontends there are, in a run of so many nodes."""
        return self.members(nnodes) if self.frontends == "auto" else int(self.frontends)

    @property
    def grouped(self) -> bool:
        """Whether there was a word about groups; the sizes of the engine are then those of each group."""
        return self.groups > 1 or bool(self.tables)

    @property
    def engine_grace(self) -> float:
        """Seconds from SIGTERM to SIGKILL for a serving engine: the whole stop must fit into kill_wait."""
        return min(self.stop_timeout, 0.5 * self.kill_wait)

    def was_set(self, name: str) -> bool:
        """True when the user gave `name` a value, so that it must not be moved silently."""
        return name in self.sources

    def to_json(self) -> dict[str, Any]:
        """For whoever may read it: without logins."""
        data = asdict(self) | {s.name: hidden(getattr(self, s.name)) for s in SETTINGS if s.secret}
        data.pop("sources")
        data["engine_args"] = list(self.engine_args)
        return data


def _declared() -> tuple[Setting, ...]:
    types, found = get_type_hints(Settings), (f for f in fields(Settings) if f.metadata)
    return tuple(Setting(name=f.name, kind=types[f.name], default=f.default, **f.metadata) for f in found)


SETTINGS = _declared()
BY_NAME: Mapping[str, Setting] = {s.name: s for s in SETTINGS}
