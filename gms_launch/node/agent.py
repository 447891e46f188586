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
import math
import time
from collections.abc import Callable
from dataclasses import replace

from gms_launch.cohort import census, controller, membership, reconciler, seats
from gms_launch.cohort.model import ALIVE, Phase, Redundancy
from gms_launch.cohort.reconciler import Desire
from gms_launch.cohort.records import CommandRecord, RunState, Wanted
from gms_launch.errors import LaunchError, MovedError, UsageError, by_code
from gms_launch.node import begin, end, lead, members, proof, quiet, upkeep
from gms_launch.node.desk import Clerk
from gms_launch.node.group import Group
from gms_launch.node.losses import Losses
from gms_launch.node.node import Node
from gms_launch.node.orphans import Orphans
from gms_launch.node.rank import Rank
from gms_launch.node.role import Role
from gms_launch.node.severing import Severing
from gms_launch.node.takeover import Takeover
from gms_launch.node.tasks import until
from gms_launch.observe import snapshot
from gms_launch.process.proc import ProcessId
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
        self._shown = 0.0
        self._losses = Losses(self.node)
        self._orphans = Orphans(self.node, self._losses)
        self._severing = Severing(self.node)
        self._clerk = Clerk(layout.run, self.node.near, self.node.report)
        self._takeover = Takeover(self.node)
        self._role = Role(self.node, self._begin_to_lead)

    def _begin_to_lead(self) -> None:
        """What was seen when this agent led before, if it did, is long over."""
        self._losses.forget()
        self._takeover = Takeover(self.node)

    async def run(self) -> None:
        """Start everything, keep it running until told to stop, stop it. Raises what ended the run early."""
        self.node.set_up()
        try:
            await until(self.node.stopping, begin.start(self.node))
            if not self.node.stopping.is_set():
                self.node.begun = True
                await self._work()
        except MovedError:
            self.node.moved()
        except LaunchError as exc:
            self.node.failure = self.node.failure or exc
            if self.node.comes_late:
                self.node.report.emit("node_refused", detail=f"node {self.node.node_rank}: {exc}")
        except Exception as exc:
            self.node.report.unexpected("the agent cannot go on", exc)
            self.node.failure = self.node.failure or LaunchError(f"internal error in the agent: {exc!r}")
        finally:
            self.node.stopping.set()
            self._clerk.close()
            await end.shut_down(self.node)
        if self.node.failure is not None:
            raise self.node.failure

    async def _work(self) -> None:
        """The loop: look, decide, act; sleep until something happens or a deadline comes."""
        self.node.spawn(upkeep.keep_up(self.node))
        self.node.spawn(upkeep.notice_stalls(self.node))
        if self.node.layout.may_lead:
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
        pauses: list[float] = []
        for group in self.node.groups:
            try:
                at = self._look_after(group, now)
            except LaunchError as exc:
                if not group.layout.group:
                    raise
                group.fail(exc)
                continue
            if at is not None:
                pauses.append(max(0.0, at - now))
        if (at := self._role.look(now)) is not None:
            pauses.append(max(0.0, at - now))
        if self.node.leads:
            lead.tell_peers(self.node)
            if self.node.settings.spares and self.node.session.may_act and (at := self._takeover.look(now)) is not None:
                pauses.append(max(0.0, at - now))
        self.node.herald.inform(self._living())
        self._follow_the_run()
        members.look(self.node)
        members.look_at_fronts(self.node)
        self._severing.look()
        for group in self.node.groups:
            self._follow_gms(group)
        pause = min(pauses, default=None)
        # Showing costs more than deciding, and while a cohort dies every moment brings news: not with each.
        left = self._shown + SHOW_PAUSE - time.monotonic()
        if left > 0:
            return left if pause is None else min(pause, left)
        self._show()
        self._shown = time.monotonic()
        return pause

    def _look_after(self, group: Group, now: float) -> float | None:
        """This node's part in a group; returns when its leader has to look again though nothing happened."""
        group.hear()
        self._reconcile(group)
        if not group.is_leader or group.over or not self.node.session.may_act:
            return None
        if group.layout.group and lead.end_failed(group):
            return None
        return self._decide(group, now) if self._formed(group) else None

    def _formed(self, group: Group) -> bool:
        """Whether all of a group's nodes have taken their places in it once, and fit: until then none is lost, unless
        the group had begun under another agent.
        """
        if not group.formed:
            nodes, nnodes = group.mirror.nodes, group.layout.topology.nnodes
            group.formed = not membership.missing(nodes, nnodes)
            if group.formed:
                group.report.emit("group_formed", nodes=nnodes)
                if group.memory.initial and (found := membership.objections(nodes, nnodes)):
                    lead.end(group, UsageError("; ".join(found)))
        return (group.formed or not group.memory.initial) and not group.over

    def _decide(self, group: Group, now: float) -> float | None:
        """The leader's part for one group; returns when it has to look again though nothing happened."""
        if group.settings.hybrid:
            proof.look_at_tokens(group)
        view, policy = lead.view(group, now, self._heard_since()), lead.policy(group.settings)
        actions, group.memory = controller.decide(view, group.memory, policy, now)
        for decision in actions:
            lead.carry_out(group, decision)
        lead.tell_tries(group, group.memory, policy, now)
        if actions:
            self._reconcile(group)
        return controller.next_look(view, group.memory, policy, now)

    def _heard_since(self) -> float:
        """Since when this agent hears of others without a gap (monotonic seconds; infinite: it does not now)."""
        store, session = self.node.layout.store, self.node.session
        if store.own and store.is_member and not store.several:
            return 0.0  # without this node's etcd nobody hears of anybody
        return session.heard_since if (session.lease_left() or 0.0) > 0 else math.inf

    def _living(self) -> dict[tuple[int, int], ProcessId]:
        """The ranks that live here, by slot and incarnation."""
        return {
            (g.layout.slot(r.cohort_id), r.incarnation): r.child.id
            for g in self.node.groups
            for r in g.ranks
            if r.child is not None and r.phase in ALIVE
        }

    def _reconcile(self, group: Group) -> None:
        """What this node has to do for a group."""
        mirror, ranks = group.mirror, group.ranks
        desired = {
            k: Desire(
                k,
                d.incarnation,
                d.wanted is Wanted.RUNNING,
                d.master_port,
                d.why,
                d.engine_args,
                d.master_addr,
                d.serve,
            )
            for k, d in mirror.desired.items()
        }
        ended = {life: record.node_rank for life, record in mirror.ended.items()}
        if self.node.session.is_cut_off or not self.node.session.may_act:
            desired = {}  # what we know is out of date
        elif group.leaderless(self.node.loop.time()):
            desired = {k: replace(d, running=False, why="its group's leader was lost") for k, d in desired.items()}
        elif group.layout.group and group.over:
            desired = {k: replace(d, running=False, why="its group is over") for k, d in desired.items()}
        for action in reconciler.decide(desired, ranks.local(), ended, group.settings.group_kill):
            match action:
                case reconciler.StartRank():
                    ranks.start(action.desire, self.node.files, self.node.loop)
                case reconciler.SkipRank():
                    ranks.skip(action.cohort_id, action.incarnation, "it ended before it began here")
                case reconciler.KillRank():
                    ranks.kill(action.cohort_id, action.reason)
                case reconciler.LetGo():
                    ranks.activate(action.cohort_id, action.incarnation)
                case _:
                    lead.nobody_does(action)
        for command in mirror.commands.values():
            mine = command.verb == "kill-rank" and command.scope == f"rank:{group.node_rank}"
            if mine and group.claims.has(command):
                self._kill_part(group, command)

    def _kill_part(self, group: Group, command: CommandRecord) -> None:
        """A drill on this node: the leader asked for it once."""
        if command.uuid in group.answered:
            return
        group.answered.add(command.uuid)
        rank = group.ranks.find(command.cohort_id, command.incarnation)
        if rank is not None and rank.child is not None and not rank.local().gone:
            group.ranks.kill_group_only(rank, "drill")

    def _follow_the_run(self) -> None:
        """Do what the run as a whole calls for: stop when somebody asks, fail when it has failed."""
        for command in self.node.mirror.commands.values():
            if command.verb == "stop" and (command.taken or self.node.claims.has(command)):
                self.node.stop("asked to by `gms-launch down`")
        if seats.seat_of(self.node.mirror.seats, self.node.layout.origin) != self.node.node_rank:
            self.node.moved()
        run = self.node.mirror.run
        if run is not None and not self.node.leads:
            if run.failed:
                self.node.fail(by_code(run.exit_code, run.failed))
            elif run.state is RunState.STOPPING:
                self.node.stop("the run is being stopped")
        if self.node.leads:
            lead.tell_refusals(self.node)
            quiet.answer(self.node)
            self._clerk.look(self.node.mirror.asked)
            for node in self.node.mirror.nodes.values():
                if node.node_rank >= self.node.settings.serving_nodes:
                    continue  # a spare's end is its own
                if node.failed and self.node.outlives_agents:
                    continue  # as one that is lost: each of its groups waits for it
                if node.failed and node.node_rank != self.node.node_rank:
                    self.node.fail(by_code(node.exit_code, f"{membership.name(node)}: {node.failed}"))
                elif node.stopping and node.node_rank != self.node.node_rank:
                    self.node.stop(f"{membership.name(node)} is stopping")

    def _follow_gms(self, group: Group) -> None:
        """Start new GMS servers when the group calls for them and nothing here uses the old ones any more."""
        run = group.mirror.run
        if run is None or run.gms_epoch <= group.gms_epoch or group.renewing or self.node.stopping.is_set():
            return
        if group.failure is not None or (group.layout.group and group.over):
            return
        if all(rank.phase is Phase.FENCED for rank in group.ranks):
            group.renewing = True
            group.spawn(self._renew_gms(group, run.gms_epoch))

    async def _renew_gms(self, group: Group, epoch: int) -> None:
        try:
            for service in group.layout.gms_services():
                await self.node.services[service.name].renew()
            await group.look_at_gms()
            group.gms_epoch = epoch
        finally:
            group.renewing = False
        self.node.wake.set()

    def _rank_event(self, group: Group, rank: Rank, kind: str, detail: str) -> None:
        if kind == "registered":
            group.spawn(proof.confirm(group, rank))
        elif kind == "unfenced":
            group.progress(f"cohort {rank.cohort_id} cannot be fenced: {detail}")
        elif kind == "fenced":
            self.node.reap()
        self.node.wake.set()

    def _show(self) -> None:
        """Work out the redundancy and tell whoever looks on."""
        self.node.publish_node()
        shots = []
        for group in self.node.groups:
            shots.append(shot := snapshot.build(group.mirror))
            if group.is_leader:
                self._show_group(group, shot)
            self._follow_redundancy(group)
        if self.node.leads:
            if self.node.layout.number_of_groups:
                self._sum_up()
            self.node.report.ranks()
            self.node.report.targets()
            self._look_at_losses()
        elif self.node.layout.may_lead:
            self.node.report.look()
        self._announce()
        shot = snapshot.build(self.node.mirror)
        if self.node.layout.number_of_groups:
            shot = snapshot.as_known_here(shot, shots, self.node.mirror.groups if self.node.leads else {})
        self.node.exporter.look(shot)
        self._on_change(shot)

    def _show_group(self, group: Group, shot: snapshot.Snapshot) -> None:
        """The leader's word on its group: more redundancy only when a token came."""
        confirmed = any((c.cohort_id, c.incarnation) == group.confirmed for c in shot.cohorts)
        if shot.records is not group.redundancy and (confirmed or shot.records is Redundancy.DOWN):
            group.report.emit("redundancy", detail=shot.records.value)
            group.report.run(redundancy=shot.records.value)
        if group.layout.group:
            group.report.ranks()
        group.teller.look(shot, group.confirmed, self.node.loop.time())

    def _follow_redundancy(self, group: Group) -> None:
        announced = group.mirror.run.redundancy if group.mirror.run else ""
        if not announced or announced == group.redundancy.value:
            return
        group.redundancy = Redundancy(announced)
        if group.is_leader:
            group.progress(f"redundancy {announced}")
        if group.redundancy is Redundancy.FULL:
            group.memory = replace(group.memory, initial=False)
            if group.layout.group:
                group.spawn(group.look_at_gms())

    def _sum_up(self) -> None:
        """What the groups amount to, and whether too few are left."""
        groups, number = self.node.mirror.groups, self.node.layout.number_of_groups
        found = census.redundancy(groups, number)
        run = self.node.mirror.run
        if found is Redundancy.FULL and run is not None and not run.redundancy:
            self.node.report.run(
                redundancy=found.value
            )  # once: all nodes hear it, and what is of one group they need not
        why, code = census.too_few(groups, number, self.node.settings.min_groups, self.node.ready.is_set())
        if why:
            self.node.fail(by_code(code, why))

    def _look_at_losses(self) -> None:
        """What the run's leader does for nodes that are lost."""
        run, several = self.node.mirror.run, self.node.layout.number_of_groups > 0
        if self.node.stopping.is_set() or run is None:
            return
        groups = self.node.mirror.groups if several else {"": run}
        self._losses.look(groups)
        if several:
            self._orphans.look(groups)

    def _announce(self) -> None:
        """What the run as a whole amounts to; the first time that it is full, everything is up."""
        announced = self.node.mirror.run.redundancy if self.node.mirror.run else ""
        if not announced or announced == self.node.redundancy.value:
            return
        self.node.redundancy = Redundancy(announced)
        if self.node.redundancy is Redundancy.FULL:
            self.node.ready.set()
            self.node.spawn(self.node.look_at_gms())
