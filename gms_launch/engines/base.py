"""What an engine module is told, and what it must answer: a rank of one life, and the `Engine` protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gms_launch.cohort.model import Phase
from gms_launch.cohort.steps import Step
from gms_launch.control.access import Access
from gms_launch.process.lifecycle import Command
from gms_launch.urls import split_login

if TYPE_CHECKING:
    from gms_launch.settings.declared import Settings


#: Where everything listens that only the leader node uses: its frontend, its engines' leader ranks and its agent.
LOOPBACK = "127.0.0.1"

#: In every rank's environment: what it can prove by that it belongs to its life, where its ranks meet on a network.
MEETING_SECRET = "GMS_LAUNCH_MEETING_SECRET"


@dataclass(frozen=True)
class Nats:
    """The NATS that Dynamo's processes use; no URL: none. `login` is empty where it asks for none.

    `files`: what TLS to it takes, by Dynamo's names.
    """

    url: str = ""
    login: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, url: str, files: Mapping[str, str]) -> Nats:
        """The NATS of a URL, which may hold a login: Dynamo's client takes none from there."""
        found = split_login(url)
        login = {"USERNAME": found.user, "PASSWORD": found.password, "TOKEN": found.token}
        return cls(found.url, {k: v for k, v in login.items() if v}, files)

    def environment(self) -> dict[str, str | None]:
        # One that is not there blocks a start for two minutes: named only when there is one.
        env: dict[str, str | None] = {"NATS_SERVER": self.url or None}
        if self.login or not self.url:
            env |= dict.fromkeys(_NATS_LOGINS) | {f"NATS_AUTH_{k}": v for k, v in self.login.items()}
        return env | {f"NATS_TLS_{k}_PATH": path for k, path in self.files.items()}


#: Every way to log in that Dynamo takes from the environment. One that the user set counts where we have no other.
_NATS_LOGINS = tuple(f"NATS_AUTH_{k}" for k in ("USERNAME", "PASSWORD", "TOKEN", "NKEY", "CREDENTIALS_FILE"))


@dataclass(frozen=True)
class Reach:
    """Where a node's engines take requests (`host`), and the interface on which its frontend takes answers; empty for
    that of the default route.
    """

    host: str = LOOPBACK
    answers: str = "lo"


@dataclass(frozen=True)
class DynamoPlane:
    """What every Dynamo process of a run needs to find the others.

    `address` is the node's on the network, for what an engine says to its ranks on other nodes.
    """

    address: str
    namespace: str
    etcd: Access
    lease_ttl: float
    event_plane: str
    nats: Nats
    reach: Reach = Reach()

    def environment(self) -> dict[str, str | None]:
        """Environment of the frontend and of leader ranks; None removes a name that the agent may carry."""
        env: dict[str, str | None] = {
            "DYN_DISCOVERY_BACKEND": "etcd",
            "DYN_REQUEST_PLANE": "tcp",
            # Explicit: releases up to 1.2 would pick NATS, and a set NATS_SERVER alone changes nothing.
            "DYN_EVENT_PLANE": self.event_plane,
            "DYN_NAMESPACE": self.namespace,
            "ETCD_ENDPOINTS": ",".join(self.etcd.endpoints),
            "ETCD_LEASE_TTL": str(round(self.lease_ttl)),
            # PEM text, in spite of their names; a user's name beside them would switch TLS off.
            "ETCD_AUTH_CA": self.etcd.ca,
            "ETCD_AUTH_CLIENT_CERT": self.etcd.cert,
            "ETCD_AUTH_CLIENT_KEY": self.etcd.key,
            "ETCD_AUTH_USERNAME": None,
            "ETCD_AUTH_PASSWORD": None,
            # Without these Dynamo listens on the machine's default address, or on all: and none of it asks who comes.
            "DYN_SYSTEM_HOST": LOOPBACK,
            "DYN_TCP_RPC_HOST": self.reach.host,
            # Called a host, and looked up as the name of an interface (1.4).
            "DYN_TCP_RESPONSE_STREAM_HOST": self.reach.answers,
            "DYN_EVENT_PLANE_HOST": self.reach.host,
            **self.nats.environment(),
        }
        return {k: v or None for k, v in env.items()}


@dataclass(frozen=True)
class RankSpec:
    """One rank of one life of a cohort. `device_view`: the environment in which it sees its devices alone.
    `rpc_port`: where the engine cores of all nodes meet when there are several (`dp`); `shift`: added to ports that the
    engine's own arguments name, since two cohorts of a node cannot both have them.
    `hybrid`: the ranks of all nodes register and take requests, and not the first one's alone.
    `role`: agg, or the half of a request's way that it goes; `component`: under which it registers, empty for its own.
    `meeting_secret`: hexadecimal, known to the ranks of this life alone."""

    cohort_id: int
    incarnation: int
    node_rank: int
    nnodes: int
    tp: int
    model: str
    served_model_name: str
    python: str
    leader_address: str
    master_port: int
    system_port: int
    meeting_secret: str
    nixl_port: int
    vllm_port: int
    gms_dir: Path
    lock_path: Path
    plane: DynamoPlane
    cache_dir: Path
    scratch_dir: Path
    engine_args: tuple[str, ...] = ()
    gms_memory: str = "host"
    pp: int = 1
    dp: int = 1
    hybrid: bool = False
    rpc_port: int = 0
    shift: int = 0
    interface: str = ""
    extra_ports: Mapping[str, int] = field(default_factory=dict)
    device_view: Mapping[str, str] = field(default_factory=dict)
    role: str = "agg"
    component: str = ""

    @property
    def headless(self) -> bool:
        """Whether another rank of its life speaks for it: registers, takes requests and waits for the lock."""
        return self.node_rank > 0 and not self.hybrid


class Engine(Protocol):
    """What the launcher needs to know of an engine."""

    @property
    def name(self) -> str:
        """The value of --engine."""

    @property
    def ports(self) -> Mapping[str, int]:
        """Ports of its own: the first of each name, to which a cohort's number is added."""

    @property
    def imports(self) -> tuple[str, ...]:
        """What a process in a warm slot imports before it becomes one: nothing that uses CUDA. Empty when none can."""

    def problems(self, settings: Settings) -> list[str]:
        """What would stop this engine from starting with these settings; empty when nothing does."""

    def describe(self, settings: Settings) -> str:
        """What is installed of it, for people."""

    def command(self, spec: RankSpec) -> Command:
        """How to start the rank."""

    def phase_of(self, line: str) -> Phase | None:
        """The phase that a line of the leader rank's log announces, if it does."""

    def step_of(self, line: str) -> Step | None:
        """The step of its start that a line of the leader rank's log announces, if it does; for people only."""

    def is_vital(self, command_line: str) -> bool:
        """True for a process of a rank, by its command line, without which the engine is dead whatever else lives."""

    def is_awake(self, line: str) -> bool:
        """True for the line that says the memory is mapped and only registration is left."""
