"""This node's ranks of all cohorts: started, killed, fenced and reported as the agent's decisions say.

The carrying out and nothing else: what to do is decided in `reconciler`, when to look again in `agent`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Coroutine
from typing import Any, Protocol

from gms_launch.cohort.model import ALIVE, ENDED, Phase
from gms_launch.cohort.reconciler import PEER_ENDED, Desire, LocalRank
from gms_launch.cohort.records import EndedRecord, RankRecord
from gms_launch.cohort.steps import by_memory
from gms_launch.control.mirror import Mirror
from gms_launch.engines.base import LOOPBACK
from gms_launch.node.desk import Desk
from gms_launch.node.discovery import Discovery
from gms_launch.node.gates import Gates
from gms_launch.node.gms_watch import GmsWatch
from gms_launch.node.pulse import Feeler, Pulse
from gms_launch.node.rank import Rank
from gms_launch.node.reporter import Reporter
from gms_launch.node.warm import WarmSlots
from gms_launch.observe.starts import Starts
from gms_launch.process import clock, lifecycle, proc, scratch, strays
from gms_launch.process.follow import FileWatcher
from gms_launch.process.lifecycle import Child, Command
from gms_launch.process.proc import ProcessId, Stat
from gms_launch.run.plan import Layout
from gms_launch.run.ports import Ports, of_a_life, system_of_a_life
from gms_launch.services.crowd import Crowd
from gms_launch.spool.writer import Writer

log = logging.getLogger("agent")

#: A parked engine ignores SIGTERM, so it gets only this long (seconds).
PARKED_GRACE = 0.1
#: How often is looked for other users' connections at an engine (seconds).
CROWD_EVERY = 1.0
#: How long a stray that is found between failovers gets to die of SIGKILL before it is told (seconds).
STRAY_TIMEOUT = 2.0


class Owner(Protocol):
    """Whose ranks they are: what a set of ranks needs of its group on this node, and tells it.

    `desk` is its way to the frontend.
    """

    layout: Layout
    mirror: Mirror
    report: Reporter
    writer: Writer
    gms: GmsWatch
    gates: Gates
    warm: WarmSlots
    desk: Desk

    def spawn(self, work: Coroutine[Any, Any, Any], /) -> None:
        """Let something run beside."""

    def rank_event(self, rank: Rank, kind: str, detail: str, /) -> None:
        """A rank noticed something, and it was reported."""

    def life_ended(self, ended: EndedRecord, /) -> None:
        """A life ends here, and nobody had said so."""


class RankSet:
    """A group's ranks on one node. `keeper` names what keeps the lock and is no living rank's, by the last look."""

    def __init__(self, owner: Owner) -> None:
        layout, report = owner.layout, owner.report
        self._layout, self._mirror, self._report, self._gms = layout, owner.mirror, report, owner.gms
        self._writer, self._gates, self._spawn = owner.writer, owner.gates, owner.spawn
        self._on_event, self._on_end = owner.rank_event, owner.life_ended
        self.warm = owner.warm
        self._node_rank = layout.topology.node_rank
        self.keeper = ""
        self._clearer = scratch.Clearer()
        self._skipped: dict[int, RankRecord] = {}
        self._by_slot: dict[int, Rank] = {}
        self.discovery = Discovery(layout, report, owner.spawn, self._by_slot.values, self.hung, owner.desk)
        self.starts = Starts(layout.cache_dir / "starts.json", layout.kind_of_start)
        self.starts.load()

    def __iter__(self) -> Any:
        return iter(self._by_slot.values())

    def find(self, cohort_id: int, incarnation: int) -> Rank | None:
        rank = self._by_slot.get(cohort_id)
        return rank if rank is not None and rank.incarnation == incarnation else None

    def said(self, record: RankRecord) -> str | None:
        """What a life that ran here has printed; None of one that did not, and of one that is over for long."""
        rank = self.find(record.cohort_id, record.incarnation)
        here = rank is not None and rank.child is not None and record.node_rank == self._node_rank
        return rank.child.output.kept() if here and rank and rank.child else None

    def local(self) -> dict[int, LocalRank]:
        """What the reconciler is told: the newest life of every slot here, run or skipped."""
        found = {k: r.local() for k, r in self._by_slot.items()}
        for cohort_id, skipped in self._skipped.items():
            if cohort_id not in found or found[cohort_id].incarnation < skipped.incarnation:
                found[cohort_id] = LocalRank(cohort_id, skipped.incarnation, Phase.FENCED, gone=True)
        return found

    # -- acting --------------------------------------------------------------------------------------------------

    def start(self, desire: Desire, files: FileWatcher, loop: asyncio.AbstractEventLoop) -> None:
        cohort_id, incarnation = desire.cohort_id, desire.incarnation
        if not self._gates.shut(cohort_id):
            return  # something of an earlier life has that lock: the next look tries again
        if self.warm.asking():
            return  # until it answers, or has not in time
        rank = Rank(
            cohort_id=cohort_id,
            incarnation=incarnation,
            node_rank=self._node_rank,
            tag=self._layout.tag(cohort_id, incarnation),
            log=self._layout.log(f"cohort-{cohort_id}.{incarnation}.log"),
            engine=self._layout.engine,
            speaks=self._layout.speaks,
            hybrid=self._layout.settings.hybrid,
            on_event=self._noticed,
            last=self.starts.of(cohort_id, incarnation),
        )
        try:
            ports = self._ports(rank)
            rank.port = port = ports.system[cohort_id]
            command = self._layout.rank_command(
                cohort_id, incarnation, desire.master_port, desire.engine_args, ports, desire.master_addr
            )
            child, began, how = self._process(rank, command)
            rank.start(child, began, files, loop)
        except OSError as exc:
            # No process, no memory, no descriptor left: a life that failed, and the controller's to try again.
            self.skip(cohort_id, incarnation, f"could not be started: {exc}")
            return
        self._by_slot[cohort_id] = rank
        assert rank.child is not None
        self._writer.here(self._layout.node_dir.pgid_file(cohort_id), f"{rank.child.pgid}\n")
        self._report.emit("started", cohort_id, incarnation, f"{how}pid {rank.child.pid}")
        self.publish(rank)
        self._spawn(self._look_after(rank, rank.child.id, port if rank.speaks else 0))
        if rank.speaks:
            self._spawn(self._keep_free(rank, rank.child.pid))

    def _ports(self, rank: Rank) -> Ports:
        """A life's ports: its slot's, or others where somebody took those between two lives. Raises `OSError`."""
        layout, k = self._layout, rank.cohort_id
        found, taken = of_a_life(layout.ports, k, layout.settings.dp, layout.topology.address, LOOPBACK)
        if rank.speaks:
            found, also = system_of_a_life(found, k, LOOPBACK)
            taken = also + taken
        for name in taken:
            self._report.emit("port_taken", *rank.life, f"{name} is in use: this life has another")
        return found

    def _process(self, rank: Rank, command: Command) -> tuple[Child, float, str]:
        """A process for a rank, since when it litters, and for people where it is from. Raises `OSError`."""
        name, output = f"cohort-{rank.cohort_id}", self._writer.output(rank.log)
        if (taken := self.warm.take()) is not None:
            waiting, directory = taken
            try:
                # What its imports have left in there is the life's.
                self._layout.node_dir.hand_scratch(directory, *rank.life)
                return waiting.become(name, command, rank.tag, output), waiting.began, "from a warm slot, "
            except OSError as exc:
                self._report.emit("warm_lost", *rank.life, f"started cold: {exc}")
                self.warm.discard(waiting, directory)
        self._layout.node_dir.make_scratch(*rank.life)
        began = scratch.file_time()
        return lifecycle.spawn(name, command, rank.tag, output), began, ""

    async def _keep_free(self, rank: Rank, pid: int) -> None:
        """End what other users hold by the hundred at a rank's ports, for as long as it lives: an engine that has no
        descriptor left answers nobody, and would be taken for hung.
        """
        crowd, loop = Crowd(f"cohort {rank.cohort_id}", ()), asyncio.get_running_loop()
        while rank.phase in ALIVE and not rank.local().gone:
            crowd.ports = tuple(filter(None, (rank.port, rank.requests)))
            if said := await loop.run_in_executor(None, crowd.look, pid):
                self._report.emit("engine_crowded", *rank.life, said)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(rank.ended.wait(), CROWD_EVERY)

    async def _look_after(self, rank: Rank, leader: ProcessId, port: int) -> None:
        """Ask a rank how it is for as long as it lives, at its system `port` (0: none); a hanging one is as dead."""
        settings, loop = self._layout.settings, asyncio.get_running_loop()
        lock = self._layout.lock_of(rank.cohort_id)
        feeler = Feeler(leader, LOOPBACK, port, lock, max(1.0, settings.health_interval), rank.engine.is_vital)
        pulse = Pulse(settings.health_timeout)
        while True:
            rank.news.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(rank.news.wait(), settings.health_interval)
            if rank.phase not in ALIVE or rank.local().gone:
                return
            phase, fresh = rank.phase, rank.news.is_set()
            try:
                look = await loop.run_in_executor(None, feeler.feel, self._gms.sockets, phase, fresh)
            except Exception as exc:  # a rank is looked after for as long as it lives
                self._report.unexpected(f"looking at cohort {rank.cohort_id}", exc)
                continue
            if settings.group_kill:
                rank.watch_parts(look.vital, loop)
            rank.felt(look)
            why = pulse.judge(look, time.monotonic())
            if pulse.doubtful and rank.phase is Phase.ACTIVE:
                self.discovery.doubted(rank.life)
            if why and rank.phase in ALIVE and not rank.local().gone and settings.group_kill:
                self.hung(rank, why)
                return

    def memory_seen(self) -> None:
        """GMS was asked: the first writer of the weights shows there how far it is, whatever its log says."""
        rank = self.find(0, 1)
        weights = [g for g in self._gms.status if g.tag == "weights"]
        if rank is not None and weights:
            allocations = sum(g.allocations for g in weights)
            rank.read_log()  # what it says itself comes first, and is more
            rank.stepped(by_memory(allocations, all(g.committed for g in weights)))

    def activate(self, cohort_id: int, incarnation: int) -> None:
        """Let a parked life of this node's serve."""
        if (rank := self.find(cohort_id, incarnation)) is not None:
            rank.let_go = True
            self._report.emit("activated", cohort_id, incarnation)
            self._gates.open(cohort_id)

    def skip(self, cohort_id: int, incarnation: int, why: str) -> None:
        """Say that a life is dead on this node, where it never ran or ended with an earlier agent."""
        record = RankRecord(cohort_id, self._node_rank, incarnation, Phase.FENCED, since=clock.now(), exit=why)
        self._skipped[cohort_id] = record
        self._put(record)

    def kill(self, cohort_id: int, reason: str) -> None:
        """Kill and fence this node's rank of a slot."""
        rank = self._by_slot[cohort_id]
        now, role = clock.now(), self._role(rank)
        gone = rank.local().gone
        if not gone:
            assert rank.child is not None
            lifecycle.kill_group(rank.child.id)
        rank.failing()
        rank.role = role
        self.fence(rank)  # before anybody is told, whatever telling may run into
        self.publish(rank, later=reason.startswith(PEER_ENDED))
        if not gone:
            self._report.emit("kill", rank.cohort_id, rank.incarnation, reason, when=now, role=role)

    def kill_group_only(self, rank: Rank, reason: str) -> None:
        """SIGKILL a rank as a fault would, and leave it at that: a drill."""
        assert rank.child is not None
        now, role = clock.now(), self._role(rank)
        lifecycle.kill_group(rank.child.id)
        self._report.emit("kill", rank.cohort_id, rank.incarnation, reason, when=now, role=role)

    def fence(self, rank: Rank) -> None:
        self.discovery.ended(rank.life)
        self._spawn(rank.destroy(self._gms.sockets, self._gms.gpu_uuids, self._layout.node_dir.locks))

    def fence_again(self) -> None:
        """Another try at what would not die."""
        for rank in self._by_slot.values():
            if rank.phase is Phase.FAILING:
                self._spawn(rank.destroy(self._gms.sockets, self._gms.gpu_uuids, self._layout.node_dir.locks))

    async def stop(self, rank: Rank, grace: float) -> None:
        """End a rank: SIGTERM, and after `grace` seconds whatever it takes."""
        assert rank.child is not None
        if not rank.local().gone:
            rank.stopping = True
            lifecycle.kill_group(rank.child.id, signal.SIGTERM)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(rank.ended.wait(), grace)
        await rank.destroy(self._gms.sockets, self._gms.gpu_uuids, self._layout.node_dir.locks)

    @property
    def pids(self) -> set[int]:
        """Children of the agent that are ranks here, or wait to be."""
        return {r.child.pid for r in self._by_slot.values() if r.child is not None} | self.warm.pids

    # -- seeing and telling --------------------------------------------------------------------------------------

    def _noticed(self, rank: Rank, kind: str, when: float, detail: str) -> None:
        """Something a rank noticed about itself."""
        if kind == "step":
            self.publish(rank, later=True)  # for people
            self._on_event(rank, kind, detail)
            return
        if kind == "exit":
            self.fence(rank)  # before anybody is told, whatever telling may run into
        if kind == "lock" and not rank.holds(self._layout.lock_of(rank.cohort_id)):
            detail = "its log says so, and the kernel does not show it as the holder"
        # Of a rank that we killed the others know already; its exit goes out with the proof.
        known = self._mirror.ranks.get((rank.cohort_id, self._node_rank))
        if known is None or known.phase is not rank.phase or rank.phase in ALIVE:
            # While a cohort dies, what etcd and the agents do competes with the dying; nobody waits for the proof yet.
            self.publish(rank, later=kind == "fenced")
        if kind == "exit" and not rank.speaks:
            rank.role = self._role(rank)
        extra = {"role": rank.role} if kind in ("exit", "dead", "fenced") else {}
        self._report.emit(kind, rank.cohort_id, rank.incarnation, detail, when=when, **extra)
        if kind == "exit":
            self._writer.hasten()
        elif kind == "fenced":
            self._writer.not_here(self._layout.node_dir.pgid_file(rank.cohort_id))
            self._clear_up(rank)
        self._on_event(rank, kind, detail)

    def hung(self, rank: Rank, why: str) -> None:
        """A rank that lives and is to be taken for dead."""
        rank.exit = why
        self._noticed(rank, "hung", clock.now(), why)
        self.kill(rank.cohort_id, why)

    def _clear_up(self, rank: Rank) -> None:
        """Remove what a life that is proved dead left on this node; what cannot be removed is told, and no more."""
        loop = asyncio.get_running_loop()
        others = [r.segments for r in self._by_slot.values() if r is not rank and r.phase in ALIVE]
        place = self._layout.node_dir.scratch(*rank.life)
        litter = scratch.Litter(place, rank.began, rank.pids, rank.segments, frozenset().union(*others))

        def wrong(text: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the agent has ended
                loop.call_soon_threadsafe(self._report.emit, "left_behind", *rank.life, text)

        self._clearer.begin(litter, wrong)

    async def cleared(self, seconds: float) -> None:
        """Wait until what dead lives left is removed, no longer than that."""
        await asyncio.get_running_loop().run_in_executor(None, self._clearer.wait, seconds)

    def lock_holder(self) -> str:
        """Which of this node's ranks the kernel shows as holding the lock, or what else keeps it; empty for none.

        Of ranks that have taken it by what they tell, or were seen to: to look at all descriptors of an engine that
        waits takes 10 ms, and this is asked at all news.
        """
        told = [r for r in self._by_slot.values() if r.child is not None and r.is_primary]
        own = next((f"cohort {r.cohort_id}" for r in told if r.holds(self._layout.lock_of(r.cohort_id))), "")
        return own or self.keeper

    async def sweep(self) -> tuple[str, ...]:
        """Kill what a dead life or service left here and no fence has found; returns what would not die."""
        found, left = await asyncio.get_running_loop().run_in_executor(
            None, lifecycle.kill_all, self._strays, STRAY_TIMEOUT
        )
        for who, name in found.items():
            self._report.emit("stray", detail=f"process {name} {'cannot be killed' if who in left else 'was killed'}")
        return tuple(left.values())

    def _strays(self) -> list[Stat]:
        """One look, in a thread. Descriptors are read only when no living rank has acquired the lock."""
        found = strays.orphans()
        self.keeper = ""
        if not found and not self.lock_holder() and (locks := self._layout.node_dir.locks):
            found = strays.lock_keepers(self._layout.run, locks)
            self.keeper = ", ".join(f"process {proc.describe(info)}" for info in found)
        return found

    def publish(self, rank: Rank, later: bool = False) -> None:
        self._put(rank.record(), later)

    def publish_all(self) -> None:
        for record in self._skipped.values():
            self._put(record)
        for rank in self._by_slot.values():
            if rank.incarnation >= getattr(self._skipped.get(rank.cohort_id), "incarnation", 0):
                self._put(rank.record())

    def _put(self, record: RankRecord, later: bool = False) -> None:
        life, keys = (record.cohort_id, record.incarnation), self._mirror.keys
        self._mirror.ranks[record.cohort_id, self._node_rank] = record
        if record.phase in ENDED and life not in self._mirror.ended:
            # Ahead of the record, which only the leader reads: the other nodes kill their ranks upon this.
            ended = EndedRecord(*life, self._layout.home.node_rank)
            self._mirror.ended[life] = ended
            self._on_end(ended)
            self._report.put_once(keys.life_ended(*life), ended.encode())
        self._report.put(keys.rank(record.cohort_id, self._node_rank), record.encode(), later=later)

    def _role(self, rank: Rank) -> str:
        """What the cohort is for, as its leader rank shows it; a headless rank has no signs of its own."""
        phase = rank.phase
        if not rank.speaks:
            leader = self._mirror.ranks.get((rank.cohort_id, 0))
            phase = leader.phase if leader is not None and leader.incarnation == rank.incarnation else Phase.STARTING
        if phase in (Phase.WAKING, Phase.ACTIVE):
            return "primary"
        return "shadow" if phase is Phase.PARKED else "starting" if phase is Phase.STARTING else ""
