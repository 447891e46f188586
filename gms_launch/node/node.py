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
from collections.abc import Callable

from gms_launch.cohort.model import ALIVE, Redundancy
from gms_launch.cohort.view import Sightings
from gms_launch.control.claims import Claims
from gms_launch.control.mirror import Mirror
from gms_launch.errors import InterruptedRunError, LaunchError
from gms_launch.node.canary import Canary
from gms_launch.node.exporter import Exporter
from gms_launch.node.gates import Gates
from gms_launch.node.gms_watch import GmsWatch
from gms_launch.node.guarded import Guarded
from gms_launch.node.herald import Herald
from gms_launch.node.hook import Hook
from gms_launch.node.rank import Rank
from gms_launch.node.rankset import RankSet
from gms_launch.node.reporter import Reporter
from gms_launch.node.session import Session
from gms_launch.node.tasks import Tasks
from gms_launch.node.warm import WarmSlots
from gms_launch.observe.progress import Teller
from gms_launch.process import lifecycle
from gms_launch.process.follow import FileWatcher
from gms_launch.run.plan import Layout
from gms_launch.run.rundir import NodeEnd
from gms_launch.services.base import Service
from gms_launch.services.runner import ServiceRunner
from gms_launch.spool.output import Output
from gms_launch.spool.writer import Writer

log = logging.getLogger("agent")

#: How many descriptors an agent wants to be allowed.
DESCRIPTORS = 65536


class Node:
    """One node of one run. `writer` writes what is for people, `on_progress` gets lines for them.

    `on_rank(rank, kind, detail)` hears what ranks noticed. `ends` says, in the end, how the nodes of the run ended, as
    far as this one knows.
    """

    def __init__(
        self,
        layout: Layout,
        writer: Writer,
        on_progress: Callable[[str], None],
        on_rank: Callable[[Rank, str, str], None],
    ) -> None:
        self.layout = layout
        self.settings = layout.settings
        self.node_rank = layout.topology.node_rank
        self.is_leader = layout.topology.is_leader
        self.mirror = Mirror(layout.run)
        self.services: dict[str, ServiceRunner] = {}
        self.ready = asyncio.Event()
        self.redundancy = Redundancy.DOWN
        self.progress = on_progress
        self.writer = writer
        self.report = Reporter(layout, self.mirror, writer)
        self.hook = Hook(layout, writer, self._hook_changed)
        self.report.listeners.append(self.hook.hear)
        self.tasks = Tasks(self.fail, self._outlived)
        self.spawn = self.tasks.spawn
        self.gms = GmsWatch(layout.devices(), layout.node_dir.gms)
        self.gates = Gates(layout.gates)
        self.herald = Herald(layout, self.mirror, self.control_changed, self._guard_acted)
        self.guard = Guarded(layout, self.gates, self.herald, self._guard_changed)
        self.ranks = RankSet(
            layout,
            self.mirror,
            self.report,
            writer,
            self.gms,
            self.gates,
            self.spawn,
            on_rank,
            self.herald.say,
            lambda: runner.pid if (runner := self.services.get("frontend")) else 0,
            WarmSlots(layout, writer.output, self.spawn, self._warm_told, self.control_changed),
        )
        self.exporter = Exporter(layout, self.report)
        self.claims = Claims(self.report.take, self.spawn, self.control_changed)
        self.teller = Teller(self.ranks.starts, on_progress)
        self.failure: LaunchError | None = None
        self.stopping = asyncio.Event()
        self.wake = asyncio.Event()
        self.hurry = False
        self.strays: tuple[str, ...] = ()
        self.alarms: tuple[str, ...] = ()
        self.ends: tuple[NodeEnd, ...] = ()
        self.sightings = Sightings()
        self.confirmed: tuple[int, int] | None = None
        self.no_token = ""
        self.canary = Canary(layout) if self.is_leader and self.settings.canary else None
        self.gms_epoch = 0
        self.answered: set[str] = set()
        self.gms_asked: dict[str, tuple[str, ...] | None] = {}

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
        self.session = Session(self.layout, self.mirror, self.report, self)
        self.exporter.start(self.session)

    def stop(self, why: str, hurry: bool = False) -> None:
        """Begin an orderly stop. `hurry`: whoever sent the signal may send SIGKILL after kill_wait."""
        self.hurry |= hurry
        if not self.stopping.is_set():
            self.progress(f"stopping: {why}")
            self.report.emit("stopping", detail=str(self.failure or why))
            self.stopping.set()
            self.wake.set()

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

    def _guard_acted(self, life: tuple[int, int]) -> None:
        self.report.emit("guard_kill", *life, "this node's agent had stood still, and its guard ended that life")
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
        self.ranks.publish_all()
        self.publish_node(force=True)

    def instances(self, found: dict[str, bytes]) -> None:
        self.ranks.discovery.seen(found)

    def cut_off(self, why: str) -> None:
        self.progress(f"{why}: killing this node's ranks, since the others go on without them")
        self.report.emit("cut_off", detail=why)
        for rank in self.ranks:
            if rank.phase in ALIVE:
                self.ranks.kill(rank.cohort_id, "this node is cut off from the leader")

    def give_up(self, error: LaunchError) -> None:
        self.fail(error)

    def _warm_told(self, kind: str, detail: str) -> None:
        self.report.emit(kind, detail=detail)

    def _service_changed(self, runner: ServiceRunner, event: str, detail: str) -> None:
        name = runner.service.name
        self.report.emit(f"service_{event}", detail=f"{name} {detail}".strip())
        if event not in ("ready", "failed"):
            self.progress(f"{name}: {event} {detail}".rstrip())
        if event == "exited" and name.startswith("gms"):
            self.gms.lost(name)
            self.progress(
                f"{name} is gone: engines go on with the memory that they have mapped, and no shadow can take over; "
                "`gms-launch kill-primary --force`, or the primary's next failure, starts the group cold"
            )
        if event == "failed":
            self.fail(LaunchError(f"{name} could not be brought back: {detail}"))
        self.wake.set()

    def publish_node(self, force: bool = False, stopped: bool = False, left: str = "") -> None:
        failed = self.failure if self.stopping.is_set() else None
        self.report.node(
            services=(
                *(runner.status() for runner in self.services.values()),
                self.guard.status,
                *self.ranks.warm.status,
                *self.hook.status,
            ),
            alarms=self.alarms,
            gms=self.gms.status,
            gms_epoch=self.gms_epoch,
            gpu_memory=self.gms.gpus,
            strays=self.strays,
            lock_holder=self.ranks.lock_holder() if self.is_leader else "",
            stopping=self.stopping.is_set(),
            stopped=stopped,
            left=left,
            failed=str(failed or ""),
            exit_code=failed.exit_code if failed else 0,
            writing=self.report.places(),
            internal_errors=self.report.errors,
            metrics=self.exporter.address,
            force=force,
        )

    def reap(self) -> None:
        """Collect what has died and is nobody else's: of dead ranks, and where we are a container's init, of all."""
        self.ranks.reap(frozenset({self.guard.pid, *(runner.pid for runner in self.services.values())}))

    async def look_at_gms(self) -> None:
        await self.loop.run_in_executor(None, self.gms.look)
        self.wake.set()


def _raise_limit() -> None:
    """More descriptors than the usual 1,024, where they may be had: held requests are connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, DESCRIPTORS)), hard))
