"""The state of a run at one moment, from its records: what `status` shows and `status --json` prints. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gms_launch.cohort.model import CohortView, Phase, Redundancy, cohort_phase, primary, redundancy
from gms_launch.cohort.records import DesiredCohort, NodeRecord, RankRecord, RunRecord, RunState
from gms_launch.control.mirror import Mirror

#: Version of the --json layout: raised when a field changes its meaning or goes away.
SCHEMA = 2


@dataclass(frozen=True)
class CohortStatus:
    """One slot: the life that is wanted, its phase, its role for people, and its ranks."""

    cohort_id: int
    incarnation: int
    phase: Phase
    since: float
    role: str
    why: str
    given_up: bool
    ranks: tuple[RankRecord, ...]
    generation: int = 0
    failed_starts: int = 0
    start_limit: int = 0
    last_exit: str = ""
    next_start: float = 0.0

    @property
    def view(self) -> CohortView:
        return CohortView(self.cohort_id, self.incarnation, self.phase, self.since)


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment. `records` is the redundancy that the records of its ranks amount to.

    `alarms` are etcd's own, by name; `spares` the nodes that wait for another to be lost, of `wanted_spares`. `fronts`:
    the URL and host of each frontend whose node is there, where there are several; `members`: how many etcd has.
    In a run of groups the cohorts are those of `groups`, each a snapshot of its own with its name in `group`, whose
    nodes have their place in it for a rank; `leader` is the node rank in the run of the one that leads it, `places` the
    node ranks of all of its nodes where that is known, and `over` says why one has ended.
    `lead`: the node rank of the node that leads the run, where that is not always the first; -1 for nobody.
    `starting` until the run served for the first time: its redundancy is down, and nothing is wrong with that.
    `reported_ago`: seconds since the leader's agent was heard of, as far as was asked; `leader_silent` says it in words
    when that is so long that the rest may be out of date.
    """

    run: str
    records: Redundancy
    announced: Redundancy
    cohorts: tuple[CohortStatus, ...]
    nodes: tuple[NodeRecord, ...]
    nnodes: int
    shadows: int
    frontend_url: str
    model_name: str
    created: float
    stopping: bool
    lost: tuple[int, ...] = ()
    gms_epoch: int = 0
    generation: int = 0
    rolling: bool = False
    starting: bool = False
    group: str = ""
    leader: int = 0
    lead: int | None = None
    places: tuple[int, ...] = ()
    frontend_host: str = ""
    fronts: tuple[tuple[str, str], ...] = ()
    members: int = 1
    groups: tuple[Snapshot, ...] = ()
    over: str = ""
    alarms: tuple[str, ...] = ()
    spares: tuple[NodeRecord, ...] = ()
    wanted_spares: int = 0
    reported_ago: float = field(default=0.0, compare=False)
    leader_silent: str = field(default="", compare=False)

    @property
    def missing(self) -> list[int]:
        """The node ranks that have no living record: they have not come, or their agent is silent, stopped or gone."""
        return sorted(set(range(self.nnodes)) - {n.node_rank for n in self.nodes})

    @property
    def redundancy(self) -> Redundancy:
        """The lower of what the records show and what the leader has announced.

        Records may show what the leader has yet to act upon: it announces more only after a token came. While its
        agent stands still nobody starts anything again, so that is not full redundancy.
        """
        most = Redundancy.DEGRADED if self.leader_silent else Redundancy.FULL
        return max(self.records, self.announced, most, key=list(Redundancy).index)

    @property
    def primary(self) -> CohortStatus | None:
        found = primary(c.view for c in self.cohorts)
        return next((c for c in self.cohorts if found and c.cohort_id == found.cohort_id), None)

    def to_json(self) -> dict[str, Any]:
        """The documented layout (docs/reference.md)."""
        serving = self.primary
        if self.group:
            return {"schema": SCHEMA, "run": self.run, **self.group_json()}
        return {
            "schema": SCHEMA,
            "run": self.run,
            "redundancy": self.redundancy.value,
            "starting": self.starting,
            "primary": serving.cohort_id if serving else None,
            "stopping": self.stopping,
            "leader_reported_ago": self.reported_ago,
            "leader_silent": bool(self.leader_silent),
            "frontend_url": self.frontend_url,
            "frontend_urls": self.frontend_urls,
            "model": self.model_name,
            "created": self.created,
            "nnodes": self.nnodes,
            "lost_nodes": list(self.lost),
            "missing_nodes": self.missing,
            "leader": self.leader if self.lead is None else self.lead,
            "generation": self.generation,
            "rolling": self.rolling,
            "alarms": list(self.alarms),
            "groups": [g.group_json() for g in self.groups or (self,)],
            "cohorts": [_cohort_json(c) for c in self.cohorts],
            "nodes": [_node_json(n) for n in self.nodes],
            "spares": [_node_json(n) for n in self.spares],
        }

    @property
    def frontend_urls(self) -> list[str]:
        """Where clients ask: at each frontend whose node is there, where there are several."""
        return [url for url, _ in self.fronts] or ([self.frontend_url] if self.frontend_url else [])

    @property
    def members_here(self) -> int:
        """Of etcd's members those that are well, by their nodes' records."""
        return sum(any(s.name == "etcd" and s.state == "ready" for s in n.services) for n in self.nodes if n.etcd)

    def group_json(self) -> dict[str, Any]:
        """One of `groups`; of a run without any the one that it is."""
        serving = self.primary
        return {
            "name": self.group,
            "redundancy": self.redundancy.value,
            "starting": self.starting,
            "over": self.over or None,
            "primary": serving.cohort_id if serving else None,
            "leader": self.leader,
            "leader_reported_ago": self.reported_ago,
            "leader_silent": bool(self.leader_silent),
            "model": self.model_name,
            "nnodes": self.nnodes,
            "lost_nodes": list(self.lost),
            "missing_nodes": self.missing,
            "generation": self.generation,
            "rolling": self.rolling,
            "cohorts": [_cohort_json(c) for c in self.cohorts],
            "nodes": [_node_json(n) for n in self.nodes],
        }


def with_groups(shot: Snapshot, groups: tuple[Snapshot, ...]) -> Snapshot:
    """A run of groups has the redundancy of the worst, as it is shown and by what their leaders announce."""
    rank = list(Redundancy).index
    if not groups:
        return shot
    worst, announced = max((g.redundancy for g in groups), key=rank), max((g.announced for g in groups), key=rank)
    served = [g.model_name for g in groups]
    name = shot.model_name if shot.model_name in served else served[0]
    return replace(shot, groups=groups, records=worst, announced=announced, model_name=name)


def as_known_here(shot: Snapshot, own: Iterable[Snapshot], groups: Mapping[str, RunRecord]) -> Snapshot:
    """A run of groups as one of its agents knows it: its `own` groups, and of others what their leaders say of them.

    Where nothing is heard of the node that leads one, nobody serves in it.
    """
    found = {g.group: g for g in own}
    here = {n.node_rank for n in shot.nodes}
    for name in sorted(groups, key=natural):
        record = groups[name]
        known = found.pop(name, None) or _as_announced(name, record)
        found[name] = known if record.leader in here else replace(known, records=Redundancy.DOWN)
    return with_groups(shot, tuple(found.values()))


def _as_announced(name: str, record: RunRecord) -> Snapshot:
    announced = Redundancy(record.redundancy) if record.redundancy and not record.failed else Redundancy.DOWN
    mirror = Mirror(record.run, name)
    mirror.run = record
    return replace(build(mirror), records=announced)


def natural(name: str) -> tuple[str, int]:
    """Sorts names: g2 comes before g10."""
    front = name.rstrip("0123456789")
    return front, int(name[len(front) :] or 0)


def build(mirror: Mirror) -> Snapshot:
    """The snapshot that a mirror of the run's keys amounts to."""
    run = mirror.run
    nnodes, shadows = (run.nnodes, run.shadows) if run else (1, 0)
    serving = nnodes if run and run.spares else max(mirror.nodes, default=0) + 1
    counting = set(range(nnodes)) - set(run.lost if run else ())
    cohorts = tuple(_cohort(d, mirror.ranks.values(), counting) for _, d in sorted(mirror.desired.items()))
    nodes = tuple(n for r, n in sorted(mirror.nodes.items()) if r < serving)
    gms_ready = bool(nodes) and all(g.state != "DOWN" for n in nodes for g in n.gms)
    return Snapshot(
        run=run.run if run else "",
        records=redundancy((c.view for c in cohorts), shadows, gms_ready),
        announced=Redundancy(run.redundancy) if run and run.redundancy else Redundancy.DOWN,
        cohorts=cohorts,
        nodes=nodes,
        nnodes=nnodes,
        shadows=shadows,
        frontend_url=run.frontend_url if run else "",
        model_name=run.model_name if run else "",
        created=run.created if run else 0.0,
        stopping=any(n.stopping for n in nodes) or (run is not None and run.state is RunState.STOPPING),
        lost=run.lost if run else (),
        gms_epoch=run.gms_epoch if run else 0,
        generation=run.generation if run else 0,
        rolling=run.rolling if run else False,
        starting=run is None or not run.redundancy,
        group=mirror.group,
        leader=run.leader if run else 0,
        over=run.failed if run and mirror.group else "",
        fronts=tuple((n.frontend, n.host) for n in nodes if n.frontend),
        members=max(1, len(run.etcd)) if run else 1,
        spares=tuple(n for r, n in sorted(mirror.nodes.items()) if r >= serving),
        wanted_spares=run.spares if run else 0,
        alarms=tuple(sorted({a for n in nodes for a in n.alarms})),
    )


def _cohort(desired: DesiredCohort, records: Iterable[RankRecord], nodes: Collection[int]) -> CohortStatus:
    ranks = tuple(
        sorted(
            (r for r in records if (r.cohort_id, r.incarnation) == (desired.cohort_id, desired.incarnation)),
            key=lambda r: r.node_rank,
        )
    )
    phase = cohort_phase({r.node_rank: r.phase for r in ranks}, nodes, any(r.hybrid for r in ranks))
    roles: Mapping[Phase, str] = {Phase.ACTIVE: "primary", Phase.WAKING: "primary", Phase.PARKED: "shadow"}
    return CohortStatus(
        cohort_id=desired.cohort_id,
        incarnation=desired.incarnation,
        phase=phase,
        since=max((r.since for r in ranks), default=0.0),
        role=roles.get(phase, ""),
        why=desired.why,
        given_up=desired.given_up,
        generation=desired.generation,
        failed_starts=desired.failed_starts,
        start_limit=desired.start_limit,
        last_exit=desired.last_exit,
        next_start=desired.next_start,
        ranks=ranks,
    )


def _cohort_json(c: CohortStatus) -> dict[str, Any]:
    return {
        "cohort_id": c.cohort_id,
        "incarnation": c.incarnation,
        "phase": c.phase.value,
        "role": c.role or None,
        "since": c.since,
        "why": c.why,
        "given_up": c.given_up,
        "generation": c.generation,
        "failed_starts": c.failed_starts,
        "last_exit": c.last_exit or None,
        "next_start": c.next_start or None,
        "ranks": [
            {
                "node_rank": r.node_rank,
                "phase": r.phase.value,
                "pid": r.pid,
                "pgid": r.pgid,
                "exit": r.exit or None,
                "leftovers": list(r.leftovers),
                "left": list(r.left),
                "log": r.log,
                "step": r.step or None,
                "step_since": r.step_since or None,
                "step_last_seconds": r.step_last or None,
            }
            for r in c.ranks
        ],
    }


def _node_json(n: NodeRecord) -> dict[str, Any]:
    return {
        "node_rank": n.node_rank,
        "number": n.node_rank if n.number < 0 else n.number,
        "host": n.host,
        "address": n.address,
        "agent_pid": n.agent_pid,
        "lock_holder": n.lock_holder or None,
        "strays": list(n.strays),
        "writing": [
            {
                "name": p.name,
                "path": p.path,
                "state": p.state or "well",
                "dropped": p.dropped,
                "dropped_bytes": p.dropped_bytes,
            }
            for p in n.writing
        ],
        "internal_errors": n.internal_errors,
        "services": [
            {"name": s.name, "state": s.state, "pid": s.pid, "starts": s.starts, "detail": s.detail} for s in n.services
        ],
        "gms": [
            {
                "device": g.device,
                "uuid": g.uuid,
                "tag": g.tag,
                "state": g.state,
                "committed": g.committed,
                "ro_sessions": g.ro_sessions,
                "allocations": g.allocations,
                "loads": g.loads,
                "allocated_bytes": g.allocated_bytes,
                "missed_looks": g.missed,
            }
            for g in n.gms
        ],
        "gpus": [
            {
                "uuid": g.uuid,
                "name": g.name,
                "total_bytes": g.total,
                "used_bytes": g.used,
                "holders": [{"pid": h.pid, "who": h.who, "used_bytes": h.used} for h in g.holders],
            }
            for g in n.gpu_memory
        ],
    }
