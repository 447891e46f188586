"""The agent of a node: observe, decide, act, again and again. The only place that does all three.

Decisions are `reconciler.decide` for this node and, on the leader, `controller.decide` for the run; both are pure.
The agent feeds them what it sees (exits, logs, records in etcd) and carries out what they say. It owns every process
of the node: they are its children and die with it. How a run begins is in `gather`, how it ends in `ending`, what only
the leader does in `leading`.

Threads: everything here runs on the event loop in the main thread, except what is handed to an executor (probes,
fencing) and the control plane's own threads, which only post to the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace

from gms_launch.cohort import controller, membership, reconciler
from gms_launch.cohort.model import ALIVE, Phase, Redundancy
from gms_launch.cohort.reconciler import Desire
from gms_launch.cohort.records import CommandRecord, RunState, Wanted
from gms_launch.cohort.view import Memory, Sightings
from gms_launch.control.claims import Claims
from gms_launch.control.mirror import Mirror
from gms_launch.errors import InterruptedRunError, LaunchError, by_code
from gms_launch.node import begin, end, lead, upkeep
from gms_launch.node.canary import Canary
from gms_launch.node.gates import Gates
from gms_launch.node.gms_watch import GmsWatch
from gms_launch.node.herald import Herald
from gms_launch.node.rank import Rank
from gms_launch.node.rankset import RankSet
from gms_launch.node.reporter import Reporter
from gms_launch.node.session import Session
from gms_launch.node.tasks import Tasks, until
from gms_launch.observe import snapshot
from gms_launch.observe.progress import Teller
from gms_launch.process import guard, lifecycle
from gms_launch.process.follow import FileWatcher
from gms_launch.run.plan import Layout
from gms_launch.run.rundir import NodeEnd
from gms_launch.services.base import Service
from gms_launch.services.runner import ServiceRunner
from gms_launch.spool.output import Output
from gms_launch.spool.writer import Writer

log = logging.getLogger("agent")

#: Pause after a step that failed for an error of ours (seconds), and how many in a row end the run.
STEP_AGAIN = 1.0
STEPS_FAILED = 60
#: Least time between two reports of this node and views for people (seconds).
SHOW_PAUSE = 0.05


class Agent:
    """Runs one node of one run. `writer` writes what is for people; `on_progress` gets lines for them, `on_change` a
    snapshot whenever it changed.

    `ends` says, after `run`, how the nodes of the run ended, as far as this agent knows.
    """

    def __init__(
        self,
        layout: Layout,
        writer: Writer,
        on_progress: Callable[[str], None],
        on_change: Callable[[snapshot.Snapshot], None] = lambda _: None,
    ) -> None:
        self.layout = layout
        self.settings = layout.settings
        self.node_rank = layout.topology.node_rank
        self.is_leader = layout.topology.is_leader
        self.mirror = Mirror(layout.run)
        self.services: dict[str, ServiceRunner] = {}
        self.ready = asyncio.Event()
        self.redundancy = Redundancy.DOWN
        self.progress, self._on_change = on_progress, on_change
        self.writer = writer
        self.report = Reporter(layout, self.mirror, writer)
        self.tasks = Tasks(self.fail, self._outlived)
        self.spawn = self.tasks.spawn
        self.gms = GmsWatch(layout.devices(), layout.node_dir.gms)
        self.gates = Gates(layout.gates)
        self.herald = Herald(layout, self.mirror, self.control_changed, self._guard_acted)
        self.ranks = RankSet(
            layout,
            self.mirror,
            self.report,
            writer,
            self.gms,
            self.gates,
            self.spawn,
            self._rank_event,
            self.herald.say,
        )
        self.claims = Claims(self.report.take, self.spawn, self.control_changed)
        self.teller = Teller(self.ranks.starts, on_progress)
        self.failure: LaunchError | None = None
        self.stopping = asyncio.Event()
        self.wake = asyncio.Event()
        self.hurry = False
        self.strays: tuple[str, ...] = ()
        self.ends: tuple[NodeEnd, ...] = ()
        self.sightings = Sightings()
        self._memory = Memory()
        self._policy = lead.policy(self.settings)
        self.confirmed: tuple[int, int] | None = None
        self.no_token = ""
        self.canary = Canary(layout) if self.is_leader and self.settings.canary else None
        self.gms_epoch = 0
        self._renewing = False
        self._shown = 0.0
        self.answered: set[str] = set()

    # -- life of the agent -------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start everything, keep it running until told to stop, stop it. Raises what ended the run early."""
        self.loop = asyncio.get_running_loop()
        self.tasks.watch(self.loop)
        if not lifecycle.become_subreaper():
            self.progress("this process had children before it became an agent: strays are found by tag and lock alone")
        log_file = self.layout.run_dir.logs / f"guard-node{self.node_rank}.log"
        deputy = self.herald.open()
        self.report.word_port = self.herald.port
        self.guard_pid, self.guard_pipe = guard.start(
            self.layout.run, self.node_rank, log_file, self.gates.take(), self.layout.node_dir.gms, deputy
        )
        self.herald.attach(self.loop)
        for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self.loop.add_signal_handler(sig, self.interrupt, f"signal {sig.name}")
        self.files = FileWatcher(self.loop)
        self.session = Session(self.layout, self.mirror, self.report, self)
        try:
            await until(self.stopping, begin.start(self))
            if not self.stopping.is_set():
                await self._work()
        except LaunchError as exc:
            self.failure = self.failure or exc
        except Exception as exc:
            self.report.unexpected("the agent cannot go on", exc)
            self.failure = self.failure or LaunchError(f"internal error in the agent: {exc!r}")
        finally:
            self.stopping.set()
            await end.shut_down(self)
        if self.failure is not None:
            raise self.failure

    def stop(self, why: str, hurry: bool = False) -> None:
        """Begin an orderly stop. `hurry`: whoever sent the signal may send SIGKILL after kill_wait."""
        self.hurry |= hurry
        if not self.stopping.is_set():
            self.progress(f"stopping: {why}")
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

    async def dismiss_guard(self) -> None:
        """End the guard as our own end would: it looks once more and goes."""
        os.close(self.guard_pipe)
        self.herald.close()
        with contextlib.suppress(ChildProcessError):
            await self.loop.run_in_executor(None, os.waitpid, self.guard_pid, 0)

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

    async def _work(self) -> None:
        """The loop: look, decide, act; sleep until something happens or a deadline comes."""
        self.spawn(upkeep.keep_up(self))
        failed = 0
        while not self.stopping.is_set():
            self.wake.clear()
            try:
                pause = self._step()
                failed = 0
            except LaunchError:
                raise
            except Exception as exc:
                # What is wanted and what is there are compared anew at each step: the next may do what this did not.
                failed += 1
                if failed >= STEPS_FAILED:
                    raise
                self.report.unexpected("a step of the loop failed", exc)
                await asyncio.sleep(STEP_AGAIN)
                continue
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.wake.wait(), pause)

    # -- one step ----------------------------------------------------------------------------------------------

    def _step(self) -> float | None:
        """Decide and act once; returns seconds until the next look without news."""
        now = time.monotonic()
        self._reconcile()
        pause: float | None = None
        if self.is_leader:
            view = lead.view(self, now)
            actions, self._memory = controller.decide(view, self._memory, self._policy, now)
            for decision in actions:
                lead.carry_out(self, decision)
            lead.tell_tries(self, self._memory, self._policy, now)
            if actions:
                self._reconcile()
            if (at := controller.next_look(view, self._memory, self._policy, now)) is not None:
                pause = max(0.0, at - now)
            lead.tell_peers(self)
        self.herald.inform(self.ranks)
        self._follow_the_run()
        self._follow_gms()
        # Showing costs more than deciding, and while a cohort dies every moment brings news: not with each.
        left = self._shown + SHOW_PAUSE - time.monotonic()
        if left > 0:
            return left if pause is None else min(pause, left)
        self._show()
        self._shown = time.monotonic()
        return pause

    def _reconcile(self) -> None:
        """What this node has to do."""
        desired = {
            k: Desire(k, d.incarnation, d.wanted is Wanted.RUNNING, d.master_port, d.why, d.engine_args)
            for k, d in self.mirror.desired.items()
        }
        ended = {life: record.node_rank for life, record in self.mirror.ended.items()}
        if self.session.is_cut_off:
            desired = {}  # what we know is out of date
        for action in reconciler.decide(desired, self.ranks.local(), ended, self.settings.group_kill):
            if isinstance(action, reconciler.StartRank):
                self.ranks.start(action.desire, self.files, self.loop)
            elif isinstance(action, reconciler.SkipRank):
                self.ranks.skip(action.cohort_id, action.incarnation, "it ended before it began here")
            else:
                self.ranks.kill(action.cohort_id, action.reason)
        for command in self.mirror.commands.values():
            mine = command.verb == "kill-rank" and command.scope == f"rank:{self.node_rank}"
            if mine and self.claims.has(command):
                self._kill_part(command)

    def _kill_part(self, command: CommandRecord) -> None:
        """A drill on this node: the leader asked for it once."""
        if command.uuid in self.answered:
            return
        self.answered.add(command.uuid)
        rank = self.ranks.find(command.cohort_id, command.incarnation)
        if rank is not None and rank.child is not None and not rank.local().gone:
            self.ranks.kill_group_only(rank, "drill")

    def _follow_the_run(self) -> None:
        """Do what the run as a whole calls for: stop when somebody asks, fail when it has failed."""
        for command in self.mirror.commands.values():
            if command.verb == "stop" and (command.taken or self.claims.has(command)):
                self.stop("asked to by `gms-launch down`")
        run = self.mirror.run
        if run is not None and not self.is_leader:
            if run.failed:
                self.fail(by_code(run.exit_code, run.failed))
            elif run.state is RunState.STOPPING:
                self.stop("the run is being stopped")
        if self.is_leader:
            lead.tell_refusals(self)
            for node in self.mirror.nodes.values():
                if node.failed and node.node_rank != self.node_rank:
                    self.fail(by_code(node.exit_code, f"{membership.name(node)}: {node.failed}"))
                elif node.stopping and node.node_rank != self.node_rank:
                    self.stop(f"{membership.name(node)} is stopping")

    def _follow_gms(self) -> None:
        """Start new GMS servers when the run calls for them and nothing here uses the old ones any more."""
        run = self.mirror.run
        if run is None or run.gms_epoch <= self.gms_epoch or self._renewing or self.stopping.is_set():
            return
        if all(rank.phase is Phase.FENCED for rank in self.ranks):
            self._renewing = True
            self.spawn(self._renew_gms(run.gms_epoch))

    async def _renew_gms(self, epoch: int) -> None:
        try:
            for service in self.layout.gms_services():
                await self.services[service.name].renew()
            await self.look_at_gms()
            self.gms_epoch = epoch
        finally:
            self._renewing = False
        self.wake.set()

    # -- what the parts report ---------------------------------------------------------------------------------

    def _rank_event(self, rank: Rank, kind: str, detail: str) -> None:
        if kind == "registered":
            self.spawn(lead.confirm(self, rank))
        elif kind == "unfenced":
            self.progress(f"cohort {rank.cohort_id} cannot be fenced: {detail}")
        elif kind == "fenced":
            services = {runner.pid for runner in self.services.values()}
            self.ranks.reap(frozenset(services | {self.guard_pid}))
        self.wake.set()

    def _guard_acted(self, life: tuple[int, int]) -> None:
        self.report.emit("guard_kill", *life, "this node's agent had stood still, and its guard ended that life")
        self.wake.set()

    def control_changed(self) -> None:
        self.wake.set()

    def control_resynced(self) -> None:
        self.progress("etcd was read anew, or this node's lease is new; reporting what runs here")
        self.ranks.publish_all()
        self.publish_node(force=True)

    def instances(self, found: dict[str, bytes]) -> None:
        self.ranks.instances(found)

    def cut_off(self, why: str) -> None:
        self.progress(f"{why}: killing this node's ranks, since the others go on without them")
        self.report.emit("cut_off", detail=why)
        for rank in self.ranks:
            if rank.phase in ALIVE:
                self.ranks.kill(rank.cohort_id, "this node is cut off from the leader")

    def give_up(self, error: LaunchError) -> None:
        self.fail(error)

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

    # -- what others see ---------------------------------------------------------------------------------------

    def publish_node(self, force: bool = False, stopped: bool = False, left: str = "") -> None:
        failed = self.failure if self.stopping.is_set() else None
        self.report.node(
            services=tuple(runner.status() for runner in self.services.values()),
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
            force=force,
        )

    def _show(self) -> None:
        """Work out the redundancy and tell whoever looks on."""
        self.publish_node()
        shot = snapshot.build(self.mirror)
        if self.is_leader:
            confirmed = any((c.cohort_id, c.incarnation) == self.confirmed for c in shot.cohorts)
            if shot.records is not self.redundancy and (confirmed or shot.records is Redundancy.DOWN):
                self.report.emit("redundancy", detail=shot.records.value)
                self.report.run(redundancy=shot.records.value)
            self.report.ranks()
            self.teller.look(shot, self.confirmed, self.loop.time())
        announced = self.mirror.run.redundancy if self.mirror.run else ""
        if announced and announced != self.redundancy.value:
            self.redundancy = Redundancy(announced)
            if self.is_leader:
                self.progress(f"redundancy {announced}")
            if self.redundancy is Redundancy.FULL:
                self._memory = replace(self._memory, initial=False)
                self.ready.set()
                self.spawn(self.look_at_gms())
        self._on_change(shot)

    async def look_at_gms(self) -> None:
        await self.loop.run_in_executor(None, self.gms.look)
        self.wake.set()
