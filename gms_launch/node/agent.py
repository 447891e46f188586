"""The agent of a node: observe, decide, act, again and again. The only place that does all three.

Decisions are `reconciler.decide` for this node and, on the leader, `controller.decide` for the run; both are pure.
The agent feeds them what it sees (exits, logs, records in etcd) and carries out what they say. It owns every process
of the node: they are its children and die with it. How a run begins is in `begin`, how it ends in `end`, what only
the leader does in `lead`; `node` is what they share.

Threads: everything here runs on the event loop in the main thread, except what is handed to an executor (probes,
fencing) and the control plane's own threads, which only post to the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from gms_launch.cohort import controller, membership, reconciler
from gms_launch.cohort.model import Phase, Redundancy
from gms_launch.cohort.reconciler import Desire
from gms_launch.cohort.records import CommandRecord, RunState, Wanted
from gms_launch.cohort.view import Memory
from gms_launch.errors import LaunchError, by_code
from gms_launch.node import begin, end, lead, quiet, upkeep
from gms_launch.node.node import Node
from gms_launch.node.rank import Rank
from gms_launch.node.tasks import until
from gms_launch.observe import snapshot
from gms_launch.run.plan import Layout
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
    """

    def __init__(
        self,
        layout: Layout,
        writer: Writer,
        on_progress: Callable[[str], None],
        on_change: Callable[[snapshot.Snapshot], None] = lambda _: None,
    ) -> None:
        self.node = Node(layout, writer, on_progress, self._rank_event)
        self._on_change = on_change
        self._memory = Memory()
        self._policy = lead.policy(self.node.settings)
        self._renewing = False
        self._shown = 0.0

    async def run(self) -> None:
        """Start everything, keep it running until told to stop, stop it. Raises what ended the run early."""
        self.node.set_up()
        try:
            await until(self.node.stopping, begin.start(self.node))
            if not self.node.stopping.is_set():
                await self._work()
        except LaunchError as exc:
            self.node.failure = self.node.failure or exc
        except Exception as exc:
            self.node.report.unexpected("the agent cannot go on", exc)
            self.node.failure = self.node.failure or LaunchError(f"internal error in the agent: {exc!r}")
        finally:
            self.node.stopping.set()
            await end.shut_down(self.node)
        if self.node.failure is not None:
            raise self.node.failure

    async def _work(self) -> None:
        """The loop: look, decide, act; sleep until something happens or a deadline comes."""
        self.node.spawn(upkeep.keep_up(self.node))
        self.node.spawn(upkeep.notice_stalls(self.node))
        if self.node.is_leader:
            self.node.spawn(upkeep.watch_alarms(self.node))
        failed = 0
        while not self.node.stopping.is_set():
            self.node.wake.clear()
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
                self.node.report.unexpected("a step of the loop failed", exc)
                await asyncio.sleep(STEP_AGAIN)
                continue
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.node.wake.wait(), pause)

    def _step(self) -> float | None:
        """Decide and act once; returns seconds until the next look without news."""
        now = time.monotonic()
        self._reconcile()
        pause: float | None = None
        if self.node.is_leader:
            view = lead.view(self.node, now)
            actions, self._memory = controller.decide(view, self._memory, self._policy, now)
            for decision in actions:
                lead.carry_out(self.node, decision)
            lead.tell_tries(self.node, self._memory, self._policy, now)
            if actions:
                self._reconcile()
            if (at := controller.next_look(view, self._memory, self._policy, now)) is not None:
                pause = max(0.0, at - now)
            lead.tell_peers(self.node)
        self.node.herald.inform(self.node.ranks)
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
            for k, d in self.node.mirror.desired.items()
        }
        ended = {life: record.node_rank for life, record in self.node.mirror.ended.items()}
        if self.node.session.is_cut_off:
            desired = {}  # what we know is out of date
        for action in reconciler.decide(desired, self.node.ranks.local(), ended, self.node.settings.group_kill):
            match action:
                case reconciler.StartRank():
                    self.node.ranks.start(action.desire, self.node.files, self.node.loop)
                case reconciler.SkipRank():
                    self.node.ranks.skip(action.cohort_id, action.incarnation, "it ended before it began here")
                case reconciler.KillRank():
                    self.node.ranks.kill(action.cohort_id, action.reason)
                case _:
                    lead.nobody_does(action)
        for command in self.node.mirror.commands.values():
            mine = command.verb == "kill-rank" and command.scope == f"rank:{self.node.node_rank}"
            if mine and self.node.claims.has(command):
                self._kill_part(command)

    def _kill_part(self, command: CommandRecord) -> None:
        """A drill on this node: the leader asked for it once."""
        if command.uuid in self.node.answered:
            return
        self.node.answered.add(command.uuid)
        rank = self.node.ranks.find(command.cohort_id, command.incarnation)
        if rank is not None and rank.child is not None and not rank.local().gone:
            self.node.ranks.kill_group_only(rank, "drill")

    def _follow_the_run(self) -> None:
        """Do what the run as a whole calls for: stop when somebody asks, fail when it has failed."""
        for command in self.node.mirror.commands.values():
            if command.verb == "stop" and (command.taken or self.node.claims.has(command)):
                self.node.stop("asked to by `gms-launch down`")
        run = self.node.mirror.run
        if run is not None and not self.node.is_leader:
            if run.failed:
                self.node.fail(by_code(run.exit_code, run.failed))
            elif run.state is RunState.STOPPING:
                self.node.stop("the run is being stopped")
        if self.node.is_leader:
            lead.tell_refusals(self.node)
            quiet.answer(self.node)
            for node in self.node.mirror.nodes.values():
                if node.failed and node.node_rank != self.node.node_rank:
                    self.node.fail(by_code(node.exit_code, f"{membership.name(node)}: {node.failed}"))
                elif node.stopping and node.node_rank != self.node.node_rank:
                    self.node.stop(f"{membership.name(node)} is stopping")

    def _follow_gms(self) -> None:
        """Start new GMS servers when the run calls for them and nothing here uses the old ones any more."""
        run = self.node.mirror.run
        if run is None or run.gms_epoch <= self.node.gms_epoch or self._renewing or self.node.stopping.is_set():
            return
        if all(rank.phase is Phase.FENCED for rank in self.node.ranks):
            self._renewing = True
            self.node.spawn(self._renew_gms(run.gms_epoch))

    async def _renew_gms(self, epoch: int) -> None:
        try:
            for service in self.node.layout.gms_services():
                await self.node.services[service.name].renew()
            await self.node.look_at_gms()
            self.node.gms_epoch = epoch
        finally:
            self._renewing = False
        self.node.wake.set()

    def _rank_event(self, rank: Rank, kind: str, detail: str) -> None:
        if kind == "registered":
            self.node.spawn(lead.confirm(self.node, rank))
        elif kind == "unfenced":
            self.node.progress(f"cohort {rank.cohort_id} cannot be fenced: {detail}")
        elif kind == "fenced":
            self.node.reap()
        self.node.wake.set()

    def _show(self) -> None:
        """Work out the redundancy and tell whoever looks on."""
        self.node.publish_node()
        shot = snapshot.build(self.node.mirror)
        if self.node.is_leader:
            confirmed = any((c.cohort_id, c.incarnation) == self.node.confirmed for c in shot.cohorts)
            if shot.records is not self.node.redundancy and (confirmed or shot.records is Redundancy.DOWN):
                self.node.report.emit("redundancy", detail=shot.records.value)
                self.node.report.run(redundancy=shot.records.value)
            self.node.report.ranks()
            self.node.report.targets()
            self.node.teller.look(shot, self.node.confirmed, self.node.loop.time())
        announced = self.node.mirror.run.redundancy if self.node.mirror.run else ""
        if announced and announced != self.node.redundancy.value:
            self.node.redundancy = Redundancy(announced)
            if self.node.is_leader:
                self.node.progress(f"redundancy {announced}")
            if self.node.redundancy is Redundancy.FULL:
                self._memory = replace(self._memory, initial=False)
                self.node.ready.set()
                self.node.spawn(self.node.look_at_gms())
        self.node.exporter.look(shot)
        self._on_change(shot)
