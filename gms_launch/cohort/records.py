"""Typed records: what the keys in etcd hold, as JSON.

Decoding is tolerant of unknown fields (a newer agent may write more) and strict about the rest: `RecordError` says
which record and which field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

import msgspec

from gms_launch.cohort.model import Phase

R = TypeVar("R", bound="Record")


class RecordError(ValueError):
    """A record cannot be read."""


class Wanted(str, Enum):
    """What the controller wants of a cohort."""

    RUNNING = "running"
    DEAD = "dead"


@dataclass(frozen=True)
class Record:
    """Base of all records: JSON in and out."""

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls: type[R], data: bytes | str) -> R:
        """Raises `RecordError` when `data` is not such a record."""
        try:
            return msgspec.json.decode(data, type=cls)
        except msgspec.MsgspecError as exc:
            raise RecordError(f"{cls.__name__}: {exc}") from None


class RunState(str, Enum):
    """How far a run is: its nodes are still coming, it runs, or it is being stopped."""

    GATHERING = "gathering"
    ADMITTED = "admitted"
    STOPPING = "stopping"


@dataclass(frozen=True)
class RunRecord(Record):
    """`run`: what everybody must agree on, and the leader's word on the whole. `created` is Unix time in seconds.

    `attempt` is run.json's. `etcd`: where its members are, when it has several. `lost` are node ranks that are fenced
    without. `gms_epoch` counts how often all nodes were to begin with new GMS servers. `engine_args` are those that
    lives are started with since the last roll,
    the `generation`-th (None: what the agents were started with); `rolling` until a life of it has parked, and until
    then `engine_args_before` is the way back. A run that `failed` ends everywhere with that text and `exit_code`.
    That of a run of groups has `redundancy` once, when all of it was full for the first time; how they are, they say.
    Behind its `nnodes` come the ranks of `spares`.
    A group has one too (`groups/<name>`), with the node rank of its `leader`.
    """

    run: str
    settings_digest: str
    leader_address: str
    version: str
    created: float
    nnodes: int = 1
    shadows: int = 1
    frontend_url: str = ""
    model_name: str = ""
    attempt: str = ""
    state: RunState = RunState.GATHERING
    redundancy: str = ""
    lost: tuple[int, ...] = ()
    gms_epoch: int = 0
    engine_args: tuple[str, ...] | None = None
    engine_args_before: tuple[str, ...] | None = None
    generation: int = 0
    rolling: bool = False
    failed: str = ""
    exit_code: int = 0
    leader: int = 0
    spares: int = 0
    etcd: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServiceStatus(Record):
    """A service, GMS server or the guard of a node. `state` is starting, ready, restarting or failed."""

    name: str
    state: str
    pid: int = 0
    starts: int = 0
    detail: str = ""


@dataclass(frozen=True)
class GmsStatus(Record):
    """One GMS socket as its probe showed it; `loads` counts `rw_connected` events (reads from disk, for weights).

    `allocated_bytes` is None when the server does not tell, as upstream's. A server that `missed` looks in a row is
    shown as it was at the last one that it answered.
    """

    device: int
    uuid: str
    tag: str
    state: str
    committed: bool = False
    ro_sessions: int = 0
    allocations: int = 0
    loads: int = 0
    layout_hash: str = ""
    allocated_bytes: int | None = None
    missed: int = 0


@dataclass(frozen=True)
class GpuHolder(Record):
    """A process on a GPU; `used` in bytes, -1 when NVML does not tell."""

    pid: int
    who: str
    used: int


@dataclass(frozen=True)
class GpuStatus(Record):
    """One GPU as NVML shows it; memory in bytes."""

    uuid: str
    name: str
    total: int
    used: int
    holders: tuple[GpuHolder, ...] = ()


@dataclass(frozen=True)
class ModelStamp(Record):
    """What a node's model directory holds (`contents.stamp`): files that engines read, their bytes, and a digest.

    `weights` are the bytes of its tensors, 0 when no header tells.
    """

    files: int = 0
    bytes: int = 0
    digest: str = ""
    weights: int = 0


@dataclass(frozen=True)
class WritingStatus(Record):
    """A directory that is written to for people. `state` is empty when all is well; the rest counts what was dropped:
    entries, and bytes of logs."""

    name: str
    path: str
    state: str = ""
    dropped: int = 0
    dropped_bytes: int = 0


@dataclass(frozen=True)
class NodeRecord(Record):
    """`nodes/<rank>`, on that agent's lease.

    The leader judges it by `version`, `settings_digest`, `differences` (settings that are others than its own, for
    people), `model` and `clock_skew` (seconds ahead of its clock, 0 when not surely off). `stopping` begins the agent's
    end; `stopped` comes last, with what it could not kill in `left`. One that `failed` says so with its `exit_code`.
    `etcd` is where clients reach its member of a cluster of several, once that has its vote.
    `clock` is its `clock.OFFSET`; `gms_epoch` the one that its servers are of. `writing`: what is wrong with its
    directories, or was lost there; `strays`: processes of dead lives that would not die; `internal_errors`: errors of
    the agent's own that the run outlived. `metrics` is where it serves them (host:port; empty: nowhere), `word_port`
    where it hears from other nodes (UDP; 0: nowhere). `alarms` are etcd's own, as the leader last heard of them.
    `origin` is the node rank that its agent was started with (`SeatRecord`). `leases` are those under which its engines
    are registered with Dynamo, by group.
    """

    node_rank: int
    host: str
    address: str
    boot_id: str
    agent_pid: int
    agent_start: int
    gpus: tuple[str, ...] = ()
    services: tuple[ServiceStatus, ...] = ()
    alarms: tuple[str, ...] = ()
    gms: tuple[GmsStatus, ...] = ()
    gpu_memory: tuple[GpuStatus, ...] = ()
    lock_holder: str = ""
    stopping: bool = False
    version: str = ""
    settings_digest: str = ""
    differences: tuple[str, ...] = ()
    clock_skew: float = 0.0
    stopped: bool = False
    left: str = ""
    gms_epoch: int = 0
    failed: str = ""
    exit_code: int = 0
    strays: tuple[str, ...] = ()
    writing: tuple[WritingStatus, ...] = ()
    internal_errors: int = 0
    model: ModelStamp = ModelStamp()
    word_port: int = 0
    metrics: str = ""
    clock: float = 0.0
    number: int = -1
    origin: int = -1
    etcd: str = ""
    frontend: str = ""
    leases: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class SeatRecord(Record):
    """`seats/<rank>`: whose that node rank is now, by the rank that its agent was started with (`origin`).

    The run's leader alone writes it, two at a time, when a spare and a lost node change places: `serial` counts how
    often. A rank without one is its first owner's. What an agent writes under a rank holds only as long as this says
    what that agent was told.
    """

    node_rank: int
    origin: int
    serial: int


@dataclass(frozen=True)
class LeadRecord(Record):
    """`lead`, on its holder's lease: who leads the run, where that role moves. With its `lease`, which nobody else ever
    has, it is the holder's token (`leadership`).
    """

    node_rank: int
    origin: int
    host: str
    lease: int


@dataclass(frozen=True)
class DesiredCohort(Record):
    """`desired/cohorts/<id>`: what the controller wants. `why` is for people.

    `engine_args` take the place of the agents' own, unless they are None; `generation` is that of the roll they are of.
    `failed_starts` of the slot count against `start_limit`, the last of them ended as `last_exit` says, and it is not
    started again before `next_start` (Unix seconds): for people. `serve`: agents are to open the life's private locks.
    """

    cohort_id: int
    incarnation: int
    wanted: Wanted
    master_port: int
    why: str = ""
    given_up: bool = False
    engine_args: tuple[str, ...] | None = None
    generation: int = 0
    master_addr: str = ""
    failed_starts: int = 0
    start_limit: int = 0
    last_exit: str = ""
    next_start: float = 0.0
    serve: bool = False


@dataclass(frozen=True)
class RankRecord(Record):
    """`ranks/<id>/<rank>`: one rank as its agent sees it. Times are Unix seconds; `exit` is text for people.

    `step` is what a leader rank that starts is at (`steps.Step`), since `step_since`; `step_last` is how many seconds
    that took at the last start on this node, 0 when nobody knows. `steps` are those of its start that are over, and the
    seconds that each took. `hybrid`: every rank registers and takes requests by itself; `token`: it has given one.
    """

    cohort_id: int
    node_rank: int
    incarnation: int
    phase: Phase
    pid: int = 0
    pgid: int = 0
    start: int = 0
    since: float = 0.0
    exit: str = ""
    leftovers: tuple[int, ...] = ()
    left: tuple[str, ...] = ()
    log: str = ""
    step: str = ""
    step_since: float = 0.0
    step_last: float = 0.0
    steps: tuple[tuple[str, float], ...] = ()
    hybrid: bool = False
    token: bool = False


@dataclass(frozen=True)
class EndedRecord(Record):
    """`ended/<id>/<incarnation>`: a rank of that life has ended, and all others are to end at once.

    The first agent that sees it writes it, and nobody after that.
    """

    cohort_id: int
    incarnation: int
    node_rank: int


@dataclass(frozen=True)
class PeersRecord(Record):
    """`peers`: where every node hears from the others, as (node rank, address, UDP port); the leader writes it."""

    peers: tuple[tuple[int, str, int], ...] = ()


@dataclass(frozen=True)
class EventRecord(Record):
    """`events/<n>`: something that happened, in a run of groups to `group`. `time` is Unix time in seconds, good to a
    microsecond."""

    time: float
    node_rank: int
    kind: str
    cohort_id: int = -1
    incarnation: int = 0
    detail: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""


@dataclass(frozen=True)
class CommandRecord(Record):
    """`commands/<uuid>`: something that is asked for. `verb` is kill, roll, idle or stop (of users), or kill-rank (of
    the leader, to the agent of the node that `scope` names as rank:N).

    `to` is the cohort that shall take over, -1 for any; `engine_args` are those of a roll, None for the same again.
    `taken` names the agent that carries it out, once one does. `cause` is the verb that a person used. `idle` asks the
    leader for a moment without requests, within `wait` seconds.
    """

    uuid: str
    verb: str
    created: float
    cohort_id: int = -1
    incarnation: int = 0
    scope: str = "group"
    force: bool = False
    to: int = -1
    engine_args: tuple[str, ...] | None = None
    taken: str = ""
    cause: str = "kill-primary"
    wait: float = 0.0


@dataclass(frozen=True)
class CommandResult(Record):
    """`commands/<uuid>/result`."""

    ok: bool
    detail: str = ""
    cohort_id: int = -1
    incarnation: int = 0
    time: float = 0.0


@dataclass(frozen=True)
class QuestionRecord(Record):
    """`asked/<uuid>`, on the asking node's lease: what the leader of `group` asks of the run's, on whose node the
    frontend is. `what` is token (of `model`, from the engine `instance`, under the request id `name`, within `wait`
    seconds; unless it is to be `fresh` one that has come will do), listed (is the model?) or moves.
    """

    uuid: str
    group: str
    what: str
    model: str = ""
    instance: int = 0
    wait: float = 0.0
    name: str = ""
    fresh: bool = True


@dataclass(frozen=True)
class AnswerRecord(Record):
    """`group/<name>/answers/<uuid>`. Not `ok`: `why`, and whether the frontend itself was `away`. `certain`: the token
    is that engine's. `moves`: requests moved and lost so far.
    """

    ok: bool
    why: str = ""
    away: bool = False
    certain: bool = False
    moves: tuple[float, float] | None = None
