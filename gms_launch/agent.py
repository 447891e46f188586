"""The agent of a node: observe, decide, act, again and again. The only place that does all three.

Decisions are `reconciler.decide` for this node and, on the leader, `controller.decide` for the run; both are pure.
The agent feeds them what it sees (exits, logs, records in etcd) and carries out what they say. It owns every process
of the node: they are its children and die with it.

Threads: everything here runs on the event loop in the main thread, except what is handed to an executor (probes,
fencing) and the control plane's own threads, which only post to the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gms_launch import ports
from gms_launch.cohort import controller, proc, process, reconciler
from gms_launch.cohort.model import ALIVE, Phase, Redundancy
from gms_launch.cohort.ranks import Rank
from gms_launch.cohort.reconciler import Desire, PeerRank
from gms_launch.control.keys import dynamo_lease
from gms_launch.control.mirror import Mirror
from gms_launch.control.records import (
    CommandResult,
    DesiredCohort,
    EventRecord,
    Wanted,
)
from gms_launch.errors import DeadlineError, LaunchError
from gms_launch.observe import snapshot
from gms_launch.observe.follow import FileWatcher
from gms_launch.observe.gms import GmsWatch
from gms_launch.observe.reporter import Reporter
from gms_launch.observe.rotate import rotate
from gms_launch.plan import Layout
from gms_launch.services import frontend, nats
from gms_launch.services.base import NotReadyError, Service, log_tail
from gms_launch.services.runner import ServiceRunner

if TYPE_CHECKING:
    from gms_launch.control.link import ControlLink

log = logging.getLogger("agent")

#: How often logs are measured and GMS is asked when nothing happens (seconds).
HOUSEKEEPING = 10.0
#: Pause between two attempts to get a first token (seconds); the frontend announces nothing.
CONFIRM_PAUSE = 0.005
#: A parked engine ignores SIGTERM, so it gets only this long (seconds).
PARKED_GRACE = 0.5


class Agent:
    """Runs one node of one run. `on_progress` gets lines for people, `on_change` a snapshot whenever it changed."""

    def __init__(
        self,
        layout: Layout,
        on_progress: Callable[[str], None],
        on_change: Callable[[snapshot.Snapshot], None] = lambda _: None,
    ) -> None:
        self.layout = layout
        self.settings = layout.settings
        self.node_rank = layout.topology.node_rank
        self.mirror = Mirror(layout.run)
        self.keys = self.mirror.keys
        self.ranks: dict[int, Rank] = {}
        self.services: dict[str, ServiceRunner] = {}
        self.ready = asyncio.Event()
        self.redundancy = Redundancy.DOWN
        self._progress, self._on_change = on_progress, on_change
        self.report = Reporter(layout, self.mirror)
        self._memory = controller.Memory()
        self._policy = controller.Policy(
            cohorts=self.settings.cohorts,
            start_timeout=self.settings.start_timeout,
            promotion_timeout=self.settings.promotion_timeout,
            backoff=self.settings.restart_backoff,
            backoff_max=self.settings.restart_backoff_max,
            window=self.settings.restart_window,
            limit=self.settings.restart_limit,
        )
        self._confirmed: tuple[int, int] | None = None
        self._answered: set[str] = set()
        self._link: ControlLink | None = None
        self._wake = asyncio.Event()
        self._stop = asyncio.Event()
        self._failure: LaunchError | None = None
        self._stopping = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._mirrored = asyncio.Event()
        self._gms = GmsWatch(layout.devices(), layout.node_dir.gms)

    # -- life of the agent -------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start everything, keep it running until told to stop, stop it. Raises what ended the run early."""
        self._loop = asyncio.get_running_loop()
        process.become_subreaper()
        self._guard = self._start_guard()
        for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._loop.add_signal_handler(sig, self.stop, f"signal {sig.name}")
        self._files = FileWatcher(self._loop)
        try:
            await self._or_stopped(self._start())
            if not self._stop.is_set():
                await self._work()
        except LaunchError as exc:
            self._failure = exc
        finally:
            await self._shut_down()
        if self._failure is not None:
            raise self._failure

    def stop(self, why: str) -> None:
        """Begin an orderly stop."""
        if not self._stop.is_set():
            self._progress(f"stopping: {why}")
            self._stop.set()
            self._wake.set()

    def fail(self, error: LaunchError) -> None:
        """End the run with an error."""
        if self._failure is None:
            self._failure = error
        self.stop("the run failed")

    async def _or_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        """Await `work`, but no longer than until somebody says stop."""
        task = self._loop.create_task(work)
        stopped = self._loop.create_task(self._stop.wait())
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            return
        await task

    def _start_guard(self) -> int:
        """Start the guard; returns our end of its pipe, which closes when we die."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        env = process.child_environment(os.environ, process.Command((), {}), f"{self.layout.run}/guard/1/0")
        with open(self.layout.run_dir.logs / f"guard-node{self.node_rank}.log", "ab") as out:
            guard = subprocess.Popen(
                [sys.executable, "-m", "gms_launch.cohort.guard", self.layout.run, str(reader)],
                pass_fds=(reader,),
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd="/",
            )
        guard.returncode = 0  # it outlives us
        os.close(reader)
        return writer

    async def _start(self) -> None:
        """Bring up GMS, then the services, then the control plane; cohorts follow from the controller."""
        layout, leader = self.layout, self.layout.topology.is_leader
        self._progress(f"run {layout.run} on {layout.topology.host}: {layout.run_dir.path}")
        for service in layout.gms_services():
            await self._start_service(service)
        await self._look_at_gms()
        if leader and layout.own_etcd:
            await self._start_service(layout.etcd_service())
        await self._loop.run_in_executor(None, self._open_control)
        if leader:
            if layout.own_nats:
                credentials = layout.credentials
                nats.configure(
                    layout.nats_config,
                    layout.topology.leader_address,
                    layout.ports.nats,
                    layout.node_dir.path / "nats",
                    credentials.nats_user,
                    credentials.nats_password,
                )
                await self._start_service(layout.nats_service())
            await self._start_service(layout.frontend_service())
            self._progress(f"frontend: {layout.frontend_url}")
        await self._mirrored.wait()
        self.report.run()
        self._progress(f"starting {self.settings.cohorts} cohorts of engine {self.settings.engine}")

    async def _start_service(self, service: Service) -> None:
        runner = ServiceRunner(service, f"{self.layout.run}/{service.name}", self.layout.log_dir, self._service_changed)
        self.services[service.name] = runner
        begun = time.monotonic()
        await runner.start()
        self._progress(f"{service.name} ready after {time.monotonic() - begun:.1f} s (pid {runner.pid})")

    async def _work(self) -> None:
        """The loop: look, decide, act; sleep until something happens or a deadline comes."""
        self._spawn_task(self._housekeeping())
        while not self._stop.is_set():
            self._wake.clear()
            pause = self._step()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause)

    def _spawn_task(self, work: Coroutine[Any, Any, Any]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("internal error", exc_info=error)
            self.fail(LaunchError(f"internal error in the agent: {error!r}"))

    # -- one step ----------------------------------------------------------------------------------------------

    def _step(self) -> float | None:
        """Decide and act once; returns seconds until the next look without news."""
        now = time.time()
        local = {k: r.local() for k, r in self.ranks.items()}
        desired = {
            k: Desire(k, d.incarnation, d.wanted is Wanted.RUNNING, d.master_port, d.why)
            for k, d in self.mirror.desired.items()
        }
        peers = {
            key: PeerRank(r.cohort_id, r.incarnation, r.node_rank, r.phase)
            for key, r in self.mirror.ranks.items()
            if r.node_rank != self.node_rank
        }
        for action in reconciler.decide(desired, local, peers):
            if isinstance(action, reconciler.StartRank):
                self._start_rank(action.desire)
            else:
                self._kill_rank(action.cohort_id, action.reason)
        pause: float | None = None
        if self.layout.topology.is_leader:
            view = self._view()
            actions, self._memory = controller.decide(view, self._memory, self._policy, now)
            for decision in actions:
                self._carry_out(decision)
            if (at := controller.next_look(view, self._memory, self._policy, now)) is not None:
                pause = max(0.0, at - now)
        self._show()
        return pause

    def _view(self) -> controller.View:
        shot = snapshot.build(self.mirror)
        slots = {}
        for c in shot.cohorts:
            desired = self.mirror.desired[c.cohort_id]
            slots[c.cohort_id] = controller.Slot(
                cohort_id=c.cohort_id,
                incarnation=c.incarnation,
                running=desired.wanted is Wanted.RUNNING,
                given_up=c.given_up,
                phase=c.phase,
                since=c.since,
                exit=next((r.exit for r in c.ranks if r.exit), ""),
                leftovers=tuple(pid for r in c.ranks for pid in r.leftovers),
            )
        waiting = [
            c
            for c in self.mirror.commands.values()
            if c.verb == "kill" and c.uuid not in self.mirror.results and c.uuid not in self._answered
        ]
        return controller.View(
            slots=slots,
            confirmed=self._confirmed,
            requests=tuple(controller.KillRequest(c.uuid, c.scope, c.force) for c in waiting),
            nodes_present=len(self.mirror.nodes) >= self.layout.topology.nnodes,
        )

    def _carry_out(self, action: controller.Action) -> None:
        if isinstance(action, controller.Start):
            self._want(action.cohort_id, action.incarnation, Wanted.RUNNING, action.why)
        elif isinstance(action, controller.Kill):
            self._want(action.cohort_id, action.incarnation, Wanted.DEAD, action.why)
        elif isinstance(action, controller.GiveUp):
            self.report.emit("given_up", action.cohort_id, action.incarnation, action.why)
            self._progress(f"cohort {action.cohort_id} is given up: {action.why}")
            self._want(action.cohort_id, action.incarnation, Wanted.DEAD, action.why, given_up=True)
        elif isinstance(action, controller.KillPart):
            rank = self.ranks.get(action.cohort_id)
            if rank is not None and rank.life == (action.cohort_id, action.incarnation):
                self._kill_group_only(rank)
        elif isinstance(action, controller.Answer):
            self._answered.add(action.uuid)
            result = CommandResult(action.ok, action.detail, action.cohort_id, action.incarnation, time.time())
            self.report.put(self.keys.result(action.uuid), result.encode())
        else:
            self._abort(action)

    def _want(self, cohort_id: int, incarnation: int, wanted: Wanted, why: str, given_up: bool = False) -> None:
        """Write down what is wanted of a slot; ours takes effect at once, the others see it in etcd."""
        current = self.mirror.desired.get(cohort_id)
        port = current.master_port if current and current.incarnation == incarnation else 0
        if wanted is Wanted.RUNNING:
            port = self._master_port(cohort_id, incarnation)
        record = DesiredCohort(cohort_id, incarnation, wanted, port, why, given_up)
        self.mirror.desired[cohort_id] = record
        self.report.put(self.keys.cohort(cohort_id), record.encode())
        self._wake.set()

    def _master_port(self, cohort_id: int, incarnation: int) -> int:
        """The next port of the slot's range that nobody listens on."""
        address = self.layout.topology.leader_address
        steps = range(ports.INCARNATION_STEPS)
        candidates = [self.layout.ports.master(cohort_id, incarnation + k) for k in steps]
        return next((p for p in candidates if ports.is_free(address, p)), candidates[0])

    def _abort(self, action: controller.Abort) -> None:
        rank = self.ranks.get(action.cohort_id)
        text = f"cohort {action.cohort_id} did not come up: {action.why}"
        if rank is not None:
            text += f"\n  log: {rank.log}\n{log_tail(rank.log)}"
        self.fail(DeadlineError(text) if action.late else LaunchError(text))

    # -- ranks -------------------------------------------------------------------------------------------------

    def _start_rank(self, desire: Desire) -> None:
        cohort_id, incarnation = desire.cohort_id, desire.incarnation
        rank = Rank(
            cohort_id=cohort_id,
            incarnation=incarnation,
            node_rank=self.node_rank,
            tag=f"{self.layout.run}/{cohort_id}/{incarnation}/{self.node_rank}",
            log=self.layout.log_dir / f"cohort-{cohort_id}.{incarnation}.log",
            engine=self.layout.engine,
            on_event=self._rank_event,
        )
        self.ranks[cohort_id] = rank
        command = self.layout.rank_command(cohort_id, incarnation, desire.master_port)
        rank.start(command, self._files, self._loop)
        assert rank.child is not None
        self.layout.node_dir.write_pgid(cohort_id, rank.child.pgid)
        self.report.emit("started", cohort_id, incarnation, f"pid {rank.child.pid}")
        self._publish_rank(rank)

    def _kill_rank(self, cohort_id: int, reason: str) -> None:
        rank = self.ranks[cohort_id]
        if not rank.local().gone:
            self._kill_group_only(rank, reason)
        rank.failing()
        self._publish_rank(rank)
        self._fence(rank)

    def _kill_group_only(self, rank: Rank, reason: str = "drill") -> None:
        assert rank.child is not None
        role = "primary" if rank.is_primary else "shadow"
        now = time.time()
        process.kill_group(rank.child.id)
        self.report.emit("kill", rank.cohort_id, rank.incarnation, reason, when=now, role=role)

    def _fence(self, rank: Rank) -> None:
        self._revoke(rank)
        self._spawn_task(rank.destroy(self._gms.sockets))

    def _rank_event(self, rank: Rank, kind: str, when: float, detail: str) -> None:
        """Something a rank noticed about itself."""
        if kind == "lock":
            held = rank.holds(self.layout.node_dir.lock)
            if not held:
                detail = "its log says so, and the kernel does not show it as the holder"
        extra = {"role": rank.role} if kind in ("exit", "dead", "fenced") else {}
        self.report.emit(kind, rank.cohort_id, rank.incarnation, detail, when=when, **extra)
        if kind == "exit":
            self._fence(rank)
        elif kind == "registered":
            self._spawn_task(self._confirm(rank))
        elif kind == "fenced":
            self.layout.node_dir.clear_pgid(rank.cohort_id)
        elif kind == "unfenced":
            self._progress(f"cohort {rank.cohort_id} cannot be fenced: {detail}")
        self._publish_rank(rank)
        self._wake.set()

    def _publish_rank(self, rank: Rank) -> None:
        record = rank.record()
        self.mirror.ranks[rank.cohort_id, self.node_rank] = record
        self.report.put(self.keys.rank(rank.cohort_id, self.node_rank), record.encode())

    async def _confirm(self, rank: Rank) -> None:
        """A promotion is done when a token comes through the frontend."""
        layout, begun = self.layout, time.monotonic()
        arguments = (layout.frontend_address, layout.ports.frontend, layout.model_name)
        while rank.phase is Phase.ACTIVE and not self._stopping:
            try:
                await self._loop.run_in_executor(None, frontend.one_token, *arguments)
            except NotReadyError:
                # Quickly while it is about to come, then without getting in anybody's way.
                await asyncio.sleep(CONFIRM_PAUSE if time.monotonic() - begun < 2.0 else 0.2)
                continue
            if rank.phase is Phase.ACTIVE:
                self._confirmed = rank.life
                self.report.emit("first_token", rank.cohort_id, rank.incarnation)
                self._wake.set()
            return

    # -- the control plane -------------------------------------------------------------------------------------

    def _open_control(self) -> None:
        """Connect to etcd, with passwords on if it is ours. In a thread."""
        from gms_launch.control.link import ControlLink
        from gms_launch.control.store import Access

        layout = self.layout
        access = Access(layout.etcd_endpoints)
        if layout.own_etcd:
            access = replace(access, user="root", password=layout.credentials.admin_password)
        link = ControlLink(access, self._post)
        self._link = self.report.link = link
        link.connect(self.keys, self.settings.service_timeout)
        if layout.own_etcd and layout.topology.is_leader:
            self._enable_auth()
        link.listen(self.keys, self.settings.namespace, self.settings.lease_ttl, self)

    def _enable_auth(self) -> None:
        assert self._link is not None
        credentials = self.layout.credentials
        users = {credentials.dynamo_user: (credentials.dynamo_password, ["v1/"])}
        self._link.enable_auth(credentials.admin_password, users)

    def _post(self, call: Callable[..., None], *arguments: Any) -> None:
        """Run `call` on the loop; from any thread, also while the loop is closing."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *arguments)

    def control_snapshot(self, found: dict[str, bytes]) -> None:
        """Etcd's whole state: at the start, after compaction, or of a store that was wiped."""
        known = dict(self.mirror.desired)
        self.mirror.replace(found)
        if self._mirrored.is_set():
            self._progress("etcd was read anew; reporting what runs here")
            if self.layout.topology.is_leader:
                if not self.mirror.desired and self.layout.own_etcd:
                    self._spawn_task(self._run_blocking(self._enable_auth))
                # The controller's own memory is newer than a store that lost it.
                self.mirror.desired = {**self.mirror.desired, **known}
                for cohort_id, record in known.items():
                    self.report.put(self.keys.cohort(cohort_id), record.encode())
                self.report.run()
            for rank in self.ranks.values():
                self._publish_rank(rank)
            self._publish_node(force=True)
        self._mirrored.set()
        self._wake.set()

    async def _run_blocking(self, work: Callable[[], None]) -> None:
        await self._loop.run_in_executor(None, work)

    def control_change(self, key: str, value: bytes | None) -> None:
        # What we decide and report ourselves is known here before etcd says it, and may be newer than its echo.
        own_rank = key.startswith(self.keys.ranks) and key.endswith(f"/{self.node_rank}")
        own_desire = self.layout.topology.is_leader and key.startswith(self.keys.desired)
        if own_rank or own_desire:
            return
        if key.startswith(self.keys.events):
            self._take_event(value)
            return
        self.mirror.apply(key, value)
        if problem := self.mirror.problems.get(key):
            log.warning("record %s is not readable: %s", key, problem)
        if key.startswith(self.keys.commands) and value is not None:
            self._stop_if_asked()
        self._wake.set()

    def _take_event(self, value: bytes | None) -> None:
        if value is not None:
            self.report.take_event(EventRecord.decode(value))

    def _stop_if_asked(self) -> None:
        for command in self.mirror.commands.values():
            if command.verb == "stop" and command.created >= self.report.started:
                self.stop("asked to by `gms-launch down`")

    def control_state(self, reason: str | None) -> None:
        if reason is not None:
            log.warning("etcd: %s", reason)

    def lease_granted(self, lease: int) -> None:
        self.report.lease = lease
        self._publish_node(force=True)

    def lease_lost(self, reason: str) -> None:
        log.warning("node lease lost: %s", reason)
        self.report.emit("lease_lost", detail=reason)

    def instances_seen(self, keys: list[str]) -> None:
        """Engines registered in Dynamo's discovery: only the holder of the lock does that."""
        for key in keys:
            lease = dynamo_lease(key)
            if lease is None or any(lease in r.leases for r in self.ranks.values()):
                continue
            for rank in self.ranks.values():
                if rank.node_rank == 0 and rank.phase in (Phase.WAKING, Phase.ACTIVE):
                    rank.leases.add(lease)
                    rank.reached(Phase.ACTIVE)

    def _revoke(self, rank: Rank) -> None:
        """End a dead engine's lease, so that the router forgets it now and not when the lease runs out."""
        for lease in rank.leases:
            self._spawn_task(self._revoke_lease(rank, lease))
        rank.leases = set()

    async def _revoke_lease(self, rank: Rank, lease: int) -> None:
        assert self._link is not None
        try:
            await self._loop.run_in_executor(None, self._link.revoke, lease)
        except LaunchError as exc:
            log.warning("lease %x of cohort %d could not be revoked: %s", lease, rank.cohort_id, exc)
        else:
            self.report.emit("lease_revoked", rank.cohort_id, rank.incarnation, f"{lease:x}")

    # -- what others see ---------------------------------------------------------------------------------------

    def _lock_holder(self) -> str:
        """Which of this node's ranks the kernel shows as holding the lock; empty for none."""
        lock = self.layout.node_dir.lock
        living = [r for r in self.ranks.values() if r.child is not None and r.phase in ALIVE]
        return next((f"cohort {r.cohort_id}" for r in living if r.holds(lock)), "")

    def _publish_node(self, force: bool = False) -> None:
        self.report.node(
            tuple(runner.status() for runner in self.services.values()),
            self._gms.status,
            self._lock_holder(),
            self._stopping,
            force,
        )

    def _show(self) -> None:
        """Work out the redundancy and tell whoever looks on."""
        self._publish_node()
        shot = snapshot.build(self.mirror)
        confirmed = any((c.cohort_id, c.incarnation) == self._confirmed for c in shot.cohorts)
        if shot.redundancy is not self.redundancy and (confirmed or shot.redundancy is Redundancy.DOWN):
            self.redundancy = shot.redundancy
            self.report.emit("redundancy", detail=shot.redundancy.value)
            self._progress(f"redundancy {shot.redundancy.value}")
            if shot.redundancy is Redundancy.FULL:
                self._memory = replace(self._memory, initial=False)
                self.ready.set()
                self._spawn_task(self._look_at_gms())
        self._on_change(shot)

    def _service_changed(self, runner: ServiceRunner, event: str, detail: str) -> None:
        name = runner.service.name
        self.report.emit(f"service_{event}", detail=f"{name} {detail}".strip())
        if event != "ready":
            self._progress(f"{name}: {event} {detail}".rstrip())
        if event == "exited" and name.startswith("gms"):
            self._gms.lost(name)
        self._wake.set()

    async def _look_at_gms(self) -> None:
        await self._loop.run_in_executor(None, self._gms.look)
        self._wake.set()

    async def _housekeeping(self) -> None:
        """What needs no event: ask GMS, rotate logs, try again to fence what would not die."""
        limit = self.settings.log_max_mib * 1024 * 1024
        while True:
            await asyncio.sleep(HOUSEKEEPING)
            await self._look_at_gms()
            await self._loop.run_in_executor(None, rotate, self.layout.log_dir, limit)
            for rank in self.ranks.values():
                if rank.phase is Phase.FAILING:
                    self._spawn_task(rank.destroy(self._gms.sockets))

    # -- the end -----------------------------------------------------------------------------------------------

    async def _shut_down(self) -> None:
        """Stop everything: standbys before the primary, so that none is promoted; etcd last."""
        self._stopping = True
        self._publish_node()
        living = [r for r in self.ranks.values() if r.child is not None and r.phase is not Phase.FENCED]
        for rank in [r for r in living if not r.is_primary] + [r for r in living if r.is_primary]:
            await self._stop_rank(rank)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for name in reversed([n for n in self.services if n != "etcd"]):
            await self.services[name].stop()
        self.report.emit("stopped")
        if self._link is not None:
            await self._loop.run_in_executor(None, self._link.close, 1.0)
        if "etcd" in self.services:
            await self.services["etcd"].stop()
        self._files.close()
        spare = frozenset({os.getpid(), *self._guard_pids()})
        left = await self._loop.run_in_executor(None, process.kill_tagged, self.layout.run, 10.0, spare)
        if left:
            self._failure = self._failure or LaunchError(
                "these processes of the run could not be killed: " + ", ".join(str(w.pid) for w in left)
            )
        else:
            self.layout.node_dir.remove()
        self.report.close()
        self._progress("stopped")

    async def _stop_rank(self, rank: Rank) -> None:
        assert rank.child is not None
        if not rank.local().gone:
            grace = PARKED_GRACE if not rank.is_primary else self.settings.stop_timeout
            rank.stopping = True
            process.kill_group(rank.child.id, signal.SIGTERM)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(rank.ended.wait(), grace)
        await rank.destroy(self._gms.sockets)

    def _guard_pids(self) -> list[int]:
        return [info.pid for info, _ in proc.tagged(f"{self.layout.run}/guard")]
