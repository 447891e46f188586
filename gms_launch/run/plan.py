"""What will run where: every command, environment and port of a node, computed and not yet started.

The agent starts what `Layout` describes, and `gms-launch plan` prints the same, so that the plan cannot differ from
what happens. No side effects.
"""

from __future__ import annotations

import hmac
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from gms_launch import engines
from gms_launch.cohort.records import SeatRecord
from gms_launch.control.access import Access
from gms_launch.engines import installed
from gms_launch.engines.base import LOOPBACK, DynamoPlane, Engine, Nats, RankSpec
from gms_launch.errors import UsageError
from gms_launch.gms import devices, gpus
from gms_launch.process.lifecycle import Command
from gms_launch.run import enough, nodedir, outside, ports, reach
from gms_launch.run.credentials import Credentials
from gms_launch.run.front import LATER, Front
from gms_launch.run.nodedir import NodeDir
from gms_launch.run.ports import Ports
from gms_launch.run.rundir import RunDir
from gms_launch.run.store import Store, Whereabouts
from gms_launch.run.topology import Topology
from gms_launch.services import gms, nats
from gms_launch.services.base import Service, find_binary
from gms_launch.settings import rules
from gms_launch.settings.declared import Settings

#: A primary and nine shadows.
MOST_COHORTS = 10


@dataclass(frozen=True)
class Layout:
    """Everything that is decided before the first process starts. `follows`: the first node, in a run that goes on.

    `attempt` names this run among those of the same id; `differences` and `clock_skew` say how this node compares with
    the leader.

    In a run of groups `parts` are this node's, each a layout with `group` (its name), whose settings, `topology` and
    ports are those of the group alone; `index` is its number in the run, `gpus` what it has of this node's, `place` the
    node's own. `number_of_groups` is 0 without groups. `wide`: its Dynamo processes are reached from other nodes too.
    `origin` is the node rank that this agent was started with; with spares that of `topology` may be another by now,
    and `seat` says so.
    """

    run: str
    settings: Settings
    topology: Topology
    ports: Ports
    credentials: Credentials
    run_dir: RunDir
    node_dir: NodeDir
    attempt: str = ""
    differences: tuple[str, ...] = ()
    clock_skew: float = 0.0
    group: str = ""
    index: int = 0
    gpus: range | None = None
    shift: int = 0
    role: str = "agg"
    component: str = ""
    place: Topology | None = None
    parts: tuple[Layout, ...] = ()
    number_of_groups: int = 0
    wide: bool = False
    origin: int = 0
    follows: bool = False
    seat: SeatRecord | None = None
    where: Whereabouts = field(default_factory=Whereabouts, compare=False)

    @property
    def groups(self) -> tuple[Layout, ...]:
        """This node's part of each group that it is in; the whole of a run without groups."""
        return self.parts if self.number_of_groups or self.is_spare else (self,)

    @property
    def is_spare(self) -> bool:
        """Whether no engine runs here until another node is lost."""
        return self.home.node_rank >= self.settings.serving_nodes and not self.group

    @property
    def founds(self) -> bool:
        """Whether this agent begins the run: the first node's, unless it comes to one that goes on."""
        return self.home.is_leader and not self.follows

    @property
    def role_moves(self) -> bool:
        """Whether another agent may come to lead the run: where its groups are led by themselves."""
        return self.settings.grouped and self.store.several

    @property
    def may_lead(self) -> bool:
        return self.founds or (self.role_moves and self.store.is_member)

    @property
    def home(self) -> Topology:
        """This node's place in the run."""
        return self.place or self.topology

    def slot(self, cohort_id: int) -> int:
        """The number of a cohort among those of all groups."""
        return MOST_COHORTS * self.index + cohort_id

    def tag(self, cohort_id: int, incarnation: int) -> str:
        """What everything of a life of this node's carries."""
        return f"{self.run}/{self.slot(cohort_id)}/{incarnation}/{self.home.node_rank}"

    @property
    def prefix(self) -> str:
        """What names of this group's services and logs begin with; nothing without groups."""
        return f"{self.group}." if self.group else ""

    @property
    def speaks(self) -> bool:
        """Whether this node's ranks register and take requests, and not those of the group's first node for them."""
        return self.topology.is_leader or self.settings.hybrid

    def has_gms(self, service: str) -> bool:
        """Whether a service is a GMS server of this group's."""
        return service.startswith(f"{self.prefix}gms-")

    def log(self, name: str) -> Path:
        """Where a log of this group's is on this node."""
        return self.log_dir / (self.prefix + name)

    def logs_of(self, node_rank: int) -> Path:
        """Where the logs are of that node of the group."""
        first = self.home.node_rank - self.topology.node_rank  # the nodes of a group lie beside each other
        return self.run_dir.logs / f"node{first + node_rank}"

    @property
    def engine(self) -> Engine:
        return engines.get(self.settings.engine, self.settings.engine_file)

    @property
    def python(self) -> str:
        return self.settings.python or sys.executable

    @property
    def model_name(self) -> str:
        return self.settings.served_model_name or self.settings.model

    @property
    def cache_dir(self) -> Path:
        """Where engines keep what they compile, for the next life and the next run."""
        return nodedir.cache_dir(self.settings.cache_dir)

    @property
    def kind_of_start(self) -> str:
        """Which earlier starts this one is compared with."""
        s = self.settings
        size = f"tp {s.tp} pp {s.pp}" + (f" dp {s.dp}" if s.dp > 1 else "") + f" over {s.serving_nodes} nodes"
        return f"{self.topology.host}: {s.engine}, {os.path.abspath(s.model)}, {size}"

    @property
    def log_dir(self) -> Path:
        return self.run_dir.logs / f"node{self.home.node_rank}"

    @property
    def front(self) -> Front:
        return Front(self.settings, self.home, self.ports, self.node_dir)

    @property
    def store(self) -> Store:
        return Store(self.run, self.settings, self.home, self.ports, self.node_dir, self.credentials, self.where)

    @property
    def own_etcd(self) -> bool:
        return self.store.own

    @property
    def etcd_endpoints(self) -> tuple[str, ...]:
        return self.store.endpoints

    @property
    def etcd_access(self) -> Access:
        """Etcd, as an agent reaches it."""
        return self.store.access

    @property
    def local_room(self) -> int:
        """What the node-local directory may come to take (bytes). The memory of GMS is not in it: no file has it."""
        return nodedir.ROOM + self.store.room

    @property
    def own_nats(self) -> bool:
        return self.settings.nats and not self.settings.nats_server

    @property
    def plane(self) -> DynamoPlane:
        """How Dynamo's processes of this node reach the services."""
        return DynamoPlane(
            address=self.topology.address,
            namespace=self.settings.namespace,
            etcd=self.store.for_dynamo,
            lease_ttl=self.settings.dynamo_lease_ttl,
            event_plane="zmq" if self.settings.event_plane == "auto" else self.settings.event_plane,
            nats=self.dynamo_nats,
            reach=reach.of(self.home, self.wide or self.front.apart, self.front.number),
        )

    @property
    def dynamo_nats(self) -> Nats:
        """The run's own, the user's, or none."""
        if self.own_nats and not self.home.is_leader:
            return Nats()  # it is on the leader's loopback
        if not self.own_nats:
            return outside.nats(self.settings)
        login = {"USERNAME": self.credentials.nats_user, "PASSWORD": self.credentials.nats_password}
        return Nats(f"nats://{LOOPBACK}:{self.ports.nats}", login)

    # -- what runs ---------------------------------------------------------------------------------------------

    @property
    def gms_kind(self) -> str:
        return gms.choose(self.settings.gms_server, self.settings.engine, self.settings.python)

    @property
    def gms_memory(self) -> str:
        """host or cuda: whose memory GMS owns."""
        if self.gms_kind == "upstream":
            return "cuda"
        if self.settings.gms_memory != "auto":
            return self.settings.gms_memory
        made_up = self.settings.sources.get("virtual_gpus", "Slurm") != "Slurm"
        return "cuda" if not made_up and devices.real_devices() else "host"

    @property
    def device_view(self) -> dict[str, str]:
        """The environment in which a process sees this group's devices alone, numbered from 0; empty without groups."""
        if self.gpus is None:
            return {}
        if self.gms_memory == "host":
            return {devices.VISIBLE: ",".join(map(str, self.gpus))}
        said = os.environ.get("CUDA_VISIBLE_DEVICES")
        words = [w.strip() for w in said.split(",")] if said else [str(k) for k in range(self.gpus.stop)]
        return {"CUDA_VISIBLE_DEVICES": ",".join(words[self.gpus.start : self.gpus.stop])}

    def devices(self) -> list[devices.Device]:
        if self.gpus is not None and self.gms_memory == "cuda":
            return devices.choose(gpus.look(), self.device_view["CUDA_VISIBLE_DEVICES"])
        if self.gpus is not None:
            found = devices.virtual_devices(self.gpus.stop, self.settings.virtual_gpu_mib)
            return [replace(found[k], index=n) for n, k in enumerate(self.gpus)]
        if self.gms_memory == "cuda":
            return list(devices.real_devices())
        return devices.virtual_devices(self.settings.virtual_gpus, self.settings.virtual_gpu_mib)

    def gms_services(self) -> list[Service]:
        servers = gms.Servers(
            kind=self.gms_kind,
            memory=self.gms_memory,
            python=self.python,
            directory=self.node_dir.gms,
            timeout=self.settings.gms_timeout,
            by_nvml=self.settings.engine == "vllm",
            view=self.device_view,
        )
        made = gms.services(servers, self.devices())
        return [replace(service, name=self.prefix + service.name) for service in made]

    @property
    def nats_server(self) -> nats.Server:
        return nats.Server(
            address=LOOPBACK,
            port=self.ports.nats,
            config=self.node_dir.path / "nats.conf",
            data=self.node_dir.path / "nats",
            user=self.credentials.nats_user,
            password=self.credentials.nats_password,
        )

    def nats_service(self) -> Service:
        binary = find_binary("nats_bin", self.settings.nats_bin, "nats-server", "nats-server")
        liveness = LATER * self.settings.service_liveness
        return nats.service(self.nats_server, binary, self.settings.service_timeout, liveness)

    def front_services(self) -> list[Service]:
        return self.front.services(self.plane, self.python)

    def lock_of(self, cohort_id: int) -> Path:
        """The lock that a cohort waits for here: one for all, or one of its own that this node's agent holds."""
        return self.node_dir.gate(cohort_id) if self.settings.activation == "agent" else self.node_dir.lock

    @property
    def gates(self) -> dict[int, Path]:
        """The locks that this node's agent holds, by cohort."""
        if self.settings.activation != "agent" or not self.speaks:
            return {}
        return {k: self.lock_of(k) for k in range(self.settings.cohorts)}

    def rank_command(
        self,
        cohort_id: int,
        incarnation: int,
        master_port: int,
        engine_args: tuple[str, ...] | None = None,
        given: Ports | None = None,
        master_addr: str = "",
    ) -> Command:
        """How this node's rank of a life is started; `engine_args` take the place of the settings' unless None, `given`
        that of the ports of its slot, and `master_addr` that of the leader's address.
        """
        own = given or self.ports
        return self.engine.command(
            RankSpec(
                cohort_id=cohort_id,
                incarnation=incarnation,
                node_rank=self.topology.node_rank,
                nnodes=self.topology.nnodes,
                tp=self.settings.tp,
                model=self.settings.model,
                served_model_name=self.settings.served_model_name,
                python=self.python,
                leader_address=master_addr or self.topology.leader_address,
                master_port=master_port,
                system_port=own.system[cohort_id],
                meeting_secret=self._meeting_secret(cohort_id, incarnation),
                nixl_port=own.nixl[cohort_id],
                vllm_port=own.vllm[cohort_id],
                gms_dir=self.node_dir.gms,
                lock_path=self.lock_of(cohort_id),
                plane=self.plane,
                engine_args=self.settings.engine_args if engine_args is None else engine_args,
                gms_memory=self.gms_memory,
                pp=self.settings.pp,
                dp=self.settings.dp,
                hybrid=self.settings.hybrid,
                rpc_port=ports.rpc(master_port),
                shift=self.shift + self.settings.dp * cohort_id,
                interface=self.settings.interface,
                cache_dir=self.cache_dir,
                scratch_dir=self.node_dir.scratch(cohort_id, incarnation),
                device_view=self.device_view,
                role=self.role,
                component=self.component,
                extra_ports={name: numbers[cohort_id] for name, numbers in own.extra.items()},
            )
        )

    def warm_environment(self) -> dict[str, str | None]:
        """What all lives on this node have in common; what differs between them is None."""
        commands = [self.rank_command(k, n, 0) for k, n in ((0, 1), (self.settings.cohorts - 1, 2))]
        first, second = (c.env for c in commands)
        names = dict.fromkeys([*first, *second])
        return {n: first[n] if n in first and n in second and first[n] == second[n] else None for n in names}

    def _meeting_secret(self, cohort_id: int, incarnation: int) -> str:
        """Of one life: every node's agent makes the same of what only agents know."""
        key, life = self.credentials.secret, f"meeting {self.attempt} {self.slot(cohort_id)} {incarnation}"
        return hmac.digest(key.encode(), life.encode(), "sha256").hex()

    # -- checks -----------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `UsageError` for what would stop the run, before anything is started."""
        if why := installed.unusable(self.settings.python):
            raise UsageError(f"--python {why}")
        if "ENGINE_ID" in os.environ:
            said = f"ENGINE_ID={os.environ['ENGINE_ID']} is set in the environment"
            why = "every cohort gets its own number, and exactly one of them may write the weights"
            raise UsageError(f"{said}; {why}: unset it")
        rules.check_spares(self.settings)
        self.node_dir.check()
        if not self.settings.grouped:
            enough.check(self.settings, self.engine, self.devices, self.gms_memory == "host")
        self.store.check()
        if self.front.here:
            self.front.check()
            reach.of(self.home, self.front.apart, self.front.number)
        if self.front.apart and self.own_nats and self.settings.event_plane == "nats":
            said = "dp_lb hybrid" if self.settings.hybrid else f"--frontends {self.front.number}"
            why = "the run's own NATS is on the first node's loopback, where the others do not reach it"
            ways = "leave --event-plane as it is, or name a NATS of your own (--nats-server)"
            raise UsageError(f"{said}: {why}: {ways}")
        if self.topology.is_leader:
            if self.own_nats:
                self.nats_service()
            outside.check(self.settings)
