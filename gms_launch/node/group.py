"""This node's part in one group: its ranks there, what is known of the group, and what its leader remembers.

A run without groups is one group, whose records are the run's own. Everything here belongs on the event loop and
decides nothing; `lead` works on it where this node leads the group, `agent` everywhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol

from gms_launch.cohort.controller import NODE_GRACE
from gms_launch.cohort.model import Redundancy
from gms_launch.cohort.records import EndedRecord
from gms_launch.cohort.view import Memory, Sightings
from gms_launch.control.claims import Claims
from gms_launch.control.mirror import Mirror
from gms_launch.engines.base import LOOPBACK
from gms_launch.errors import LaunchError
from gms_launch.node.canary import Canary
from gms_launch.node.desk import Desk, Far, Near
from gms_launch.node.gates import Gates
from gms_launch.node.gms_watch import SILENT_LOOKS, GmsWatch
from gms_launch.node.rank import Rank
from gms_launch.node.rankset import RankSet
from gms_launch.node.reporter import Reporter
from gms_launch.node.tokens import OfAnEngine, OfTheFrontend, Tokens
from gms_launch.node.warm import WarmSlots
from gms_launch.observe.progress import Teller
from gms_launch.process import proc
from gms_launch.process.follow import FileWatcher
from gms_launch.process.listener import pids_of
from gms_launch.run.plan import Layout
from gms_launch.spool.writer import Writer


class Host(Protocol):
    """What a group needs of the agent that it is on."""

    loop: asyncio.AbstractEventLoop
    files: FileWatcher
    wake: asyncio.Event
    stopping: asyncio.Event
    writer: Writer
    progress: Callable[[str], None]

    def spawn(self, work: Coroutine[Any, Any, Any], fail: Callable[[LaunchError], None] | None = None, /) -> None:
        """Let something run beside; `fail` gets what it is to end, in place of the run."""

    def front_host(self) -> str:
        """Where the leader of the run is, with the frontend that groups ask; empty where that is this node."""

    def fail(self, error: LaunchError) -> None:
        """End the run with an error."""

    def control_changed(self) -> None:
        """There is something new to look at."""


class Group:
    """One group on one node. `node_rank` is this node's place in it, 0 for its leader.

    `on_rank(group, rank, kind, detail)` hears what its ranks noticed, `on_end(group, ended)` of a life that ends here
    first; `near` is the frontend as this node's own services know it.
    """

    def __init__(
        self,
        host: Host,
        layout: Layout,
        mirror: Mirror,
        report: Reporter,
        on_rank: Callable[[Group, Rank, str, str], None],
        on_end: Callable[[Group, EndedRecord], None],
        near: Near,
    ) -> None:
        self._host = host
        self.layout, self.mirror, self.report = layout, mirror, report
        self.settings = layout.settings
        self.node_rank = layout.topology.node_rank
        self.is_leader = layout.topology.is_leader
        self.wake, self.stopping = host.wake, host.stopping
        self.gms = GmsWatch(layout.devices(), layout.node_dir.gms, layout.gpus.start if layout.gpus else 0)
        self.gates = Gates(layout.gates)
        self.writer = host.writer
        far = not layout.home.is_leader
        self.far = Far(host.front_host, near, layout.group, mirror.keys, report) if far else None
        self.near = near
        self.desk: Desk = self.far or near
        self._on_rank, self._on_end = on_rank, on_end
        self.warm = WarmSlots(layout, host.writer.output, self.spawn, self._warm_told, host.control_changed)
        self.ranks = RankSet(self)
        self.claims = Claims(report.take, self.spawn, host.control_changed)
        self.teller = Teller(self.ranks.starts, self.progress)
        self.memory = Memory()
        self.sightings = Sightings()
        self.redundancy = Redundancy.DOWN
        self.confirmed: tuple[int, int] | None = None
        self.no_token = ""
        self.asked_since = 0.0
        self.canary = Canary(self.settings) if layout.speaks and self.settings.canary else None
        self._alone_since: float | None = None
        self.formed = not layout.group
        self.gms_epoch = 0
        self.renewing = False
        self.failure: LaunchError | None = None
        self.answered: set[str] = set()
        self.gms_asked: dict[str, tuple[str, ...] | None] = {}

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._host.loop

    @property
    def files(self) -> FileWatcher:
        return self._host.files

    def progress(self, line: str) -> None:
        """Tell people, and which group it is about where there are several."""
        self._host.progress(f"{self.layout.group}: {line}" if self.layout.group else line)

    def spawn(self, work: Coroutine[Any, Any, Any], /) -> None:
        """Let something run beside. What it fails with is this group's."""
        self._host.spawn(work, self.fail)

    def fail(self, error: LaunchError) -> None:
        """End this group, and no other, with an error: its leader hears of it. Without groups that is the run."""
        if not self.layout.group:
            self._host.fail(error)
        elif self.failure is None:
            self.failure = error
            self.wake.set()

    @property
    def over(self) -> bool:
        """Whether this group has ended for good."""
        return self.mirror.run is not None and bool(self.mirror.run.failed)

    def leaderless(self, now: float) -> bool:
        """Whether the node that leads this group is lost, and nobody decides for it. `now` in the loop's seconds."""
        outlived = self.layout.group or self.layout.store.several
        if self.is_leader or not outlived or 0 in self.mirror.nodes:
            self._alone_since = None
            return False
        if self._alone_since is None:
            self._alone_since = now
            self.loop.call_later(NODE_GRACE, self.wake.set)
        return now - self._alone_since >= NODE_GRACE and bool(self.mirror.desired)

    def listens(self, host: str, port: int) -> bool:
        """Whether a rank of this group that lives on this node takes connections there."""
        if host not in (self.layout.home.address, LOOPBACK):
            return False
        pids = [pid for r in self.ranks if r.child is not None for pid in pids_of(r.child.pgid)]
        return proc.one_listens(pids, port)

    def rank_event(self, rank: Rank, kind: str, detail: str, /) -> None:
        self._on_rank(self, rank, kind, detail)

    def life_ended(self, ended: EndedRecord, /) -> None:
        self._on_end(self, ended)

    def tokens(self, rank: Rank) -> Tokens:
        """What shows that a rank of this node's, which leads its life, gives tokens."""
        if not self.layout.group and not self.settings.hybrid:
            return OfTheFrontend(self.near, self.layout.model_name)
        instance = partial(self.ranks.discovery.instance, rank.life)
        return OfAnEngine(self.desk, self.layout.model_name, rank.port, instance)

    def hear(self) -> None:
        """What was asked of the frontend on another node has been answered, perhaps."""
        if self.far is not None:
            self.far.hear(self.mirror.answers)

    def _warm_told(self, kind: str, detail: str) -> None:
        self.report.emit(kind, detail=detail)

    async def look_at_gms(self) -> None:
        await self.loop.run_in_executor(None, self.gms.look)
        if (gone := self.gms.newly_silent()) and not (self.renewing or self.stopping.is_set()):
            self.report.emit("gms_silent", detail=f"{', '.join(gone)}: no answer to {SILENT_LOOKS} looks in a row")
            self.progress(f"GMS {', '.join(gone)} does not answer and is taken for gone: {self.without_gms}")
        self.wake.set()

    @property
    def without_gms(self) -> str:
        """What follows from the loss of a GMS server here, for people."""
        whose = f" --group {self.layout.group}" if self.layout.group else ""
        return (
            "engines go on with the memory that they have mapped, and no shadow can take over; "
            f"`gms-launch kill-primary --force{whose}`, or the primary's next failure, starts the group cold"
        )
