"""What the parts of an agent share: this node's place in the run, what runs on it, and what is known of the others.

`begin`, `lead`, `end` and `upkeep` are given a `Node` and work on it; `agent` has the loop. All of it belongs
on the event loop. It decides nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from gms_launch.cohort.model import ALIVE, Redundancy
from gms_launch.cohort.records import EndedRecord
from gms_launch.control.claims import Claims
from gms_launch.control.mirror import Mirror
from gms_launch.errors import InterruptedRunError, LaunchError, NoContactError
from gms_launch.node import whose
from gms_launch.node.desk import Near
from gms_launch.node.exporter import Exporter
from gms_launch.node.group import Group
from gms_launch.node.guarded import Guarded
from gms_launch.node.herald import Herald
from gms_launch.node.hook import Hook
from gms_launch.node.rank import Rank
from gms_launch.node.reporter import Reporter
from gms_launch.node.session import Part, Session
from gms_launch.node.tasks import Tasks
from gms_launch.process import lifecycle, word
from gms_launch.process.follow import FileWatcher
from gms_launch.run.plan import Layout
from gms_launch.run.rundir import NodeEnd, RunFile
from gms_launch.services.base import Service
from gms_launch.services.runner import ServiceRunner
from gms_launch.spool.output import Output
from gms_launch.spool.writer import Writer

log = logging.getLogger("agent")

#: How many descriptors an agent wants to be allowed.
DESCRIPTORS = 65536


class Node:
    """One node of one run. `writer` writes what is for people, `on_progress` gets lines for them.

    `on_rank(group, rank, kind, detail)` hears what ranks noticed. `ends` says, in the end, how the nodes of the run
    ended, as far as this one knows. `member` is where clients reach this node's member of a cluster of etcd, and
    `front` where they reach its frontend, where there are several; `members` where those of all nodes are, as far as
    the leader knows, and `members_seen` the nodes with one that were there at the last look. `record`, on the leader,
    is what run.json says; `begun`, whether this node has all that its ranks need; `ends_run`, in the end, whether this
    agent says how the run has ended.
    """

    def __init__(
        self,
        layout: Layout,
        writer: Writer,
        on_progress: Callable[[str], None],
        on_rank: Callable[[Group, Rank, str, str], None],
    ) -> None:
        self.layout = layout
        self.settings = layout.settings
        self.node_rank = layout.topology.node_rank
        self.mirror = Mirror(layout.run)
        self.services: dict[str, ServiceRunner] = {}
        self.ready = asyncio.Event()
        self.stopping = asyncio.Event()
        self.wake = asyncio.Event()
        self.redundancy = Redundancy.DOWN
        self.progress = on_progress
        self.writer = writer
        self.report = Reporter(layout, self.mirror, writer)
        self.hook = Hook(layout, writer, self._hook_changed)
        self.report.listeners.append(self.hook.hear)
        self.tasks = Tasks(self.fail, self._outlived)
        self.herald = Herald(layout, self.mirror, self.heard, self._guard_acted)
        self.near = Near(layout.front.where, self._front, self._front_ready)
        self.groups = tuple(self._group(mine) for mine in layout.groups)
        self.guard = Guarded(layout, [g.gates for g in self.groups], self.herald, self._guard_changed)
        self.exporter = Exporter(layout, self.report)
        self.dead_agents: dict[int, int] = {}
        self.claims = Claims(self.report.take, self.spawn, self.control_changed)
        self.failure: LaunchError | None = None
        self.hurry = False
        self.has_moved = False
        self.strays: tuple[str, ...] = ()
        self.alarms: tuple[str, ...] = ()
        self.ends: tuple[NodeEnd, ...] = ()
        self.ends_run = layout.founds
        self.begun = False
        self.record: RunFile | None = None
        self.member = ""
        self.members: dict[int, str] = {}
        self.members_seen: frozenset[int] = frozenset()
        self.alone_since: float | None = None
        self.front = ""
        self.answered: set[str] = set()
        self._on_rank = on_rank
        self._whose = whose.Whose(self.groups, layout.home.address)
        self._instances: dict[str, bytes] = {}

    def _group(self, mine: Layout) -> Group:
        """This node's part in one group; the run's own records are those of a run without groups."""
        mirror, report = self.mirror, self.report
        if mine.group:
            mirror = Mirror(mine.run, mine.group)
            report = Reporter(mine, mirror, self.writer, self.report)
        return Group(self, mine, mirror, report, self._rank_event, self._ended, self.near)

    def _rank_event(self, group: Group, rank: Rank, kind: str, detail: str) -> None:
        self._on_rank(group, rank, kind, detail)

    def _ended(self, group: Group, ended: EndedRecord) -> None:
        self.herald.say(replace(ended, cohort_id=group.layout.slot(ended.cohort_id), node_rank=self.node_rank))

    def _front(self) -> int:
        return runner.pid if (runner := self.services.get("frontend")) else 0

    def _front_ready(self) -> bool:
        runner = self.services.get("frontend")
        return runner is not None and runner.serves

    def set_up(self) -> None:
        """Make the guard and what else must be there before anything is started. Raises `LaunchError`."""
        self.loop = asyncio.get_running_loop()
        _raise_limit()
        self.tasks.watch(self.loop)
        if not lifecycle.become_subreaper():
            self.progress("this process had children before it became an agent: strays are found by tag and lock alone")
        self.guard.start(self.loop)
        self.report.word_port = self.herald.port
        for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self.loop.add_signal_handler(sig, self.interrupt, f"signal {sig.name}")
        self.files = FileWatcher(self.loop)
        parts = [Part(g.layout, g.mirror, g.report) for g in self.groups if g.layout.group]
        self.session = Session(self.layout, self.mirror, self.report, self, parts)
        self.report.leads = self.hook.leads = lambda: self.leads
        self.exporter.start(self.session)

    @property
    def leads(self) -> bool:
        """Whether this agent leads the run, as far as it knows."""
        return self.session.leads

    def front_host(self) -> str:
        if not self.layout.role_moves or self.mirror.run is None:
            home = self.layout.home
            return home.leader_address if home.leader_address != home.address else ""  # two nodes of one machine
        return "" if self.leads else self.mirror.run.leader_address

    def stop(self, why: str, hurry: bool = False) -> None:
        """Begin an orderly stop. `hurry`: whoever sent the signal may send SIGKILL after kill_wait."""
        self.hurry |= hurry
        if not self.stopping.is_set():
            self.progress(f"stopping: {why}")
            self.report.emit("stopping", detail=str(self.failure or why))
            self.stopping.set()
            self.wake.set()

    @property
    def comes_late(self) -> bool:
        """Whether this agent has yet to take its place in a run of groups that was up without it, as a spare or as who
        is back. It may fail in that alone: its place stays empty, and the other groups serve on.
        """
        run = self.mirror.run
        later = self.layout.settings.grouped and self.layout.follows and not self.begun
        return later and run is not None and bool(run.redundancy)

    @property
    def outlives_agents(self) -> bool:
        """Whether the end of another node's agent with an error concerns the groups there alone: once all is up."""
        return self.layout.number_of_groups > 0 and self.ready.is_set()

    def abandoned(self, why: str) -> None:
        """Nobody is there any more who could stop this agent. Where groups outlive an agent, it goes alone: they wait
        for another here. Should all be abandoned, the run's leader stops the run.
        """
        if self.outlives_agents and not self.leads:
            self.failure = self.failure or NoContactError(why)
            self.stop(why)
        else:
            self.interrupt(why)

    def interrupt(self, why: str) -> None:
        """Stop, since somebody wants no more of it; before the run was up once, that is a start that failed."""
        if not self.ready.is_set() and not self.stopping.is_set():
            self.failure = InterruptedRunError(f"stopped before redundancy was full for the first time: {why}")
        self.stop(why, hurry=True)

    def fail(self, error: LaunchError) -> None:
        """End the run with an error."""
        if self.failure is None:
            self.failure = error
        self.stop("the run failed")

    def spawn(self, work: Coroutine[Any, Any, Any], fail: Callable[[LaunchError], None] | None = None, /) -> None:
        """Let something run beside, until it ends or the agent does; `fail` gets an error of it that ends something."""
        self.tasks.spawn(work, fail)

    def _outlived(self, what: str, error: BaseException) -> None:
        """An error of ours in a task or a callback: the run goes on."""
        self.report.unexpected(what, error)
        self.wake.set()

    async def start_service(self, service: Service) -> None:
        """Start a service and wait until it is ready. Raises `ServiceError`."""
        tag = f"{self.layout.run}/{service.name}"
        runner = ServiceRunner(service, tag, self.node_rank, self._output, self._service_changed)
        self.services[service.name] = runner
        begun = time.monotonic()
        await runner.start()
        self.progress(f"{service.name} ready after {time.monotonic() - begun:.1f} s (pid {runner.pid})")

    def _output(self, name: str) -> Output:
        return self.writer.output(self.layout.log_dir / name)

    def of_slot(self, slot: int) -> tuple[Group, int] | None:
        """The group and the cohort that a number stands for that is the run's own; None where it has no rank here."""
        found = ((g, slot - g.layout.slot(0)) for g in self.groups)
        return next(((g, k) for g, k in found if 0 <= k < g.settings.cohorts), None)

    def heard(self, said: EndedRecord) -> None:
        """Another node says that a life has ended, or a guard that its agent has."""
        if said.cohort_id == word.AGENT:
            self.dead_agents[said.node_rank] = said.incarnation
            self.wake.set()
            return
        if (found := self.of_slot(said.cohort_id)) is None:
            return
        group, cohort_id = found
        life = (cohort_id, said.incarnation)
        desired = group.mirror.desired.get(cohort_id)
        if life in group.mirror.ended or (desired is not None and said.incarnation < desired.incarnation):
            return  # it is known, or long over
        group.mirror.ended[life] = EndedRecord(*life, said.node_rank)
        self.wake.set()

    def _guard_acted(self, life: tuple[int, int]) -> None:
        if (found := self.of_slot(life[0])) is None:
            return
        group, cohort_id = found
        group.report.emit(
            "guard_kill", cohort_id, life[1], "this node's agent had stood still, and its guard ended that life"
        )
        self.wake.set()

    def _guard_changed(self, kind: str, detail: str) -> None:
        self.report.emit(kind, detail=detail)
        self.wake.set()  # a new one is told its duty, and status of it

    def _hook_changed(self, kind: str, detail: str) -> None:
        self.report.emit(kind, detail=detail)
        self.wake.set()

    def control_changed(self) -> None:
        self.wake.set()

    def control_resynced(self) -> None:
        self.progress("etcd was read anew, or this node's lease is new; reporting what runs here")
        for group in self.groups:
            group.ranks.publish_all()
        self.publish_node(force=True)

    def instances(self, found: dict[str, bytes]) -> None:
        if not self.layout.number_of_groups and self.groups and not self.settings.hybrid:
            self.groups[0].ranks.discovery.seen(found)
            return
        self._instances = found
        self._tell_whose(whose.PAUSE)

    def _tell_whose(self, pause: float) -> None:
        """Tell each group of its engines."""
        found = self._whose.look(self._instances)
        for group in self.groups:
            group.ranks.discovery.seen({k: r for k, r in self._instances.items() if found[k] is group})
        if not self.stopping.is_set() and not self._whose.settled(found):
            self.loop.call_later(pause, self._tell_whose, 2 * pause)

    def cut_off(self, why: str) -> None:
        self.progress(f"{why}: killing this node's ranks, since the others go on without them")
        self.report.emit("cut_off", detail=why)
        for group in self.groups:
            for rank in group.ranks:
                if rank.phase in ALIVE:
                    group.ranks.kill(rank.cohort_id, "this node is cut off from the leader")

    def lease_until(self, moment: float) -> None:
        self.herald.prolong(moment)

    def moved(self) -> None:
        """Another agent has this node's rank: end what is here at once, and leave."""
        if self.stopping.is_set():
            return
        self.progress("this node has been given another rank: its agent begins again")
        self.has_moved = True
        for group in self.groups:
            for rank in group.ranks:
                if rank.phase in ALIVE:
                    group.ranks.kill(rank.cohort_id, "another node has its place")
        self.stopping.set()
        self.wake.set()

    def give_up(self, error: LaunchError) -> None:
        self.fail(error)

    def _service_changed(self, runner: ServiceRunner, event: str, detail: str) -> None:
        name = runner.service.name
        self.report.emit(f"service_{event}", detail=f"{name} {detail}".strip())
        if event not in ("ready", "failed"):
            self.progress(f"{name}: {event} {detail}".rstrip())
        if event == "exited" and (group := next((g for g in self.groups if g.layout.has_gms(name)), None)) is not None:
            group.gms.lost(name)
            self.progress(f"{name} is gone: {group.without_gms}")
        if event == "failed":
            self.fail(LaunchError(f"{name} could not be brought back: {detail}"))
        self.wake.set()

    def publish_node(self, force: bool = False, stopped: bool = False, left: str = "") -> None:
        ends = self.stopping.is_set() and not self.comes_late
        failed = self.failure if ends else None
        state: dict[str, Any] = {
            "stopping": ends,
            "stopped": stopped,
            "left": left,
            "failed": str(failed or ""),
            "exit_code": failed.exit_code if failed else 0,
        }
        own: dict[str, Any] = {
            "services": (
                *(runner.status() for runner in self.services.values()),
                self.guard.status,
                *(s for g in self.groups for s in g.ranks.warm.status),
                *self.hook.status,
            ),
            "alarms": self.alarms,
            "etcd": self.member,
            "frontend": self.front,
            "strays": self.strays,
            "writing": self.report.places(),
            "internal_errors": self.report.errors,
            "metrics": self.exporter.address,
            "leases": self._leases(),
        }
        for group in self.groups:
            part = {
                "gms": group.gms.told,
                "gms_epoch": group.gms_epoch,
                "gpu_memory": group.gms.gpus,
                "lock_holder": group.ranks.lock_holder() if group.layout.speaks else "",
            }
            if group.report is self.report:
                own |= part
            else:
                wrong = failed or group.failure
                told = {} if wrong is None else {"failed": str(wrong), "exit_code": wrong.exit_code}
                group.report.node(**(state | told), **part, force=force)
        self.report.node(**state, **own, force=force)

    def _leases(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Under which its engines are registered, by group, where the run may outlive this node."""
        if not self.layout.number_of_groups and not self.settings.hybrid:
            return ()
        found = ((g.layout.group, g.ranks.discovery.leases) for g in self.groups)
        return tuple((name, leases) for name, leases in found if leases)

    def reap(self) -> None:
        """Collect what has died and is nobody else's: of dead ranks, and where we are a container's init, of all."""
        living = {self.guard.pid, *(runner.pid for runner in self.services.values())}
        lifecycle.reap_orphans(frozenset(living.union(*(g.ranks.pids for g in self.groups))))

    async def look_at_gms(self) -> None:
        for group in self.groups:
            await group.look_at_gms()


def _raise_limit() -> None:
    """More descriptors than the usual 1,024, where they may be had: held requests are connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, DESCRIPTORS)), hard))
