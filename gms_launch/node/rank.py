"""This node's rank of a cohort, alive: its process, its log, its phase.

A `Rank` notices (an exit, a line of the log) and tells; what follows is decided elsewhere.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gms_launch.cohort.model import ALIVE, Phase, move
from gms_launch.cohort.reconciler import LocalRank
from gms_launch.cohort.records import RankRecord
from gms_launch.cohort.steps import Step, later
from gms_launch.engines import signals
from gms_launch.engines.base import Engine
from gms_launch.node import fence
from gms_launch.node.fence import Fenced
from gms_launch.node.pulse import Look
from gms_launch.process import clock, lifecycle, proc, scratch
from gms_launch.process.follow import FileWatcher, LogFollower
from gms_launch.process.lifecycle import Child
from gms_launch.process.proc import ProcessId, below, lock_keepers

#: How long a rank gets to be proved dead (seconds). SIGKILL is quick; a process in the driver may not be.
FENCE_TIMEOUT = 30.0
#: Before the next piece of a log that grows faster than it is read (seconds): others have the loop meanwhile.
READ_PAUSE = 0.02


@dataclass
class Rank:
    """One life of a cohort's rank on this node. Times are Unix seconds.

    `began` is when it was started, `port` its system port, `requests` the one where it takes them, 0 before it
    is registered; `pids` and `segments` are processes and shared memory that were seen of it.
    It `speaks` for itself where it registers and takes requests, as the ranks of all nodes do with `hybrid` load
    balancing. `let_go`: it has got its private lock; `token`: one came from it since.
    `last` is how long each step took at the last start like this one (seconds). `stopping`: its end is wanted, so its
    exit is no news. `on_event(rank, kind, time, detail)` gets: step, parked, lock, awake, registered, hung, exit, dead,
    fenced, unfenced.
    """

    cohort_id: int
    incarnation: int
    node_rank: int
    tag: str
    log: Path
    engine: Engine
    on_event: Callable[[Rank, str, float, str], None]
    speaks: bool = True
    hybrid: bool = False
    phase: Phase = Phase.PENDING
    since: float = 0.0
    exit: str = ""
    leftovers: tuple[int, ...] = ()
    left: tuple[str, ...] = ()
    role: str = ""
    child: Child | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    stopping: bool = False
    awake: bool = False
    let_go: bool = False
    token: bool = False
    began: float = 0.0
    port: int = 0
    requests: int = 0
    pids: frozenset[int] = frozenset()
    segments: frozenset[scratch.Segment] = frozenset()
    step: Step = Step.IMPORTS
    step_since: float = 0.0
    steps: tuple[tuple[str, float], ...] = ()
    last: Mapping[str, float] = field(default_factory=dict)
    _follower: LogFollower | None = None
    _loop: asyncio.AbstractEventLoop | None = None
    _reading: bool = False
    _watcher: FileWatcher | None = None
    _watch: int | None = None
    _fencing: bool = False
    _parts: dict[ProcessId, int] = field(default_factory=dict)
    _first_gone: str = ""
    _keeper: int = 0

    @property
    def life(self) -> tuple[int, int]:
        return self.cohort_id, self.incarnation

    @property
    def is_primary(self) -> bool:
        return self.phase in (Phase.WAKING, Phase.ACTIVE)

    def local(self) -> LocalRank:
        gone = self.child is not None and self.child.ended
        return LocalRank(self.cohort_id, self.incarnation, self.phase, gone, self.let_go)

    def record(self) -> RankRecord:
        pid = self.child.pid if self.child else 0
        told = self.phase is Phase.STARTING and self.speaks
        return RankRecord(
            cohort_id=self.cohort_id,
            node_rank=self.node_rank,
            incarnation=self.incarnation,
            phase=self.phase,
            pid=pid,
            pgid=pid,
            start=self.child.id.start if self.child else 0,
            since=self.since,
            exit=self.exit,
            leftovers=self.leftovers,
            left=self.left,
            log=str(self.log),
            step=self.step.value if told else "",
            step_since=(self.step_since or self.since) if told else 0.0,
            step_last=self.last.get(self.step.value, 0.0) if told else 0.0,
            steps=self.steps,
            hybrid=self.hybrid,
            token=self.token,
        )

    def _move(self, phase: Phase, when: float) -> None:
        if phase is not self.phase:
            self.phase, self.since = move(self.phase, phase), when

    # -- starting and watching ---------------------------------------------------------------------------------

    def start(self, child: Child, began: float, watcher: FileWatcher, loop: asyncio.AbstractEventLoop) -> None:
        """`child` is its process, begun just before: watch it. Call on the main thread. Raises `OSError`."""
        self.child, self.began = child, began
        self._move(Phase.STARTING, clock.now())
        loop.add_reader(self.child.pidfd, self._exited, loop)
        if self.speaks:
            self._follower = LogFollower(child.output.source)
            self._watcher, self._loop = watcher, loop
            self._watch = watcher.add(child.output.source, self.read_log)
            self.read_log()

    def read_log(self) -> None:
        """Take in what the leader rank has written, piece by piece, and stop listening once it serves."""
        if self._follower is None:
            return
        lines = self._follower.lines()
        if self._follower.behind and self._loop is not None and not self._reading:
            self._reading = True
            self._loop.call_later(READ_PAUSE, self._read_on)
        for line in lines:
            if self.phase not in ALIVE or self._follower is None:
                break
            if self.engine.is_awake(line):
                self.woke()
            if (step := self.engine.step_of(line)) is not None:
                self.stepped(step)
            phase = self.engine.phase_of(line)
            if phase is not None:
                self.reached(phase, "by its own word")

    def _read_on(self) -> None:
        self._reading = False
        if self.phase in ALIVE:
            self.read_log()

    def stepped(self, step: Step) -> None:
        """It is at `step` of its start now."""
        if self.phase is Phase.STARTING and later(self.step, step):
            now = clock.now()
            self._step_over(now)
            self.step, self.step_since = step, now
            self.on_event(self, "step", self.step_since, step.value)

    def _step_over(self, now: float) -> None:
        self.steps += ((self.step.value, round(max(0.0, now - (self.step_since or self.since)), 3)),)

    def woke(self) -> None:
        """The memory is mapped, and only registration is left."""
        if self.phase is Phase.WAKING and not self.awake:
            self.awake = True
            self.on_event(self, "awake", clock.now(), "")

    def reached(self, phase: Phase, how: str = "") -> None:
        """The engine is in `phase` now. A signal that comes twice, or late, changes nothing.

        `how` it is known that it serves, where that is not discovery's word.
        """
        order = [Phase.STARTING, Phase.PARKED, Phase.WAKING, Phase.ACTIVE]
        if self.phase not in order or order.index(phase) <= order.index(self.phase):
            return
        now = clock.now()
        if self.phase is Phase.STARTING and self.node_rank == 0:
            self._step_over(now)
        self._move(phase, now)
        if phase is Phase.PARKED:
            self.news.set()  # a good moment to look at it; later ones are not, while it takes over
        kind = {Phase.PARKED: "parked", Phase.WAKING: "lock", Phase.ACTIVE: "registered"}[phase]
        self.on_event(self, kind, now, how if phase is Phase.ACTIVE else "")
        if phase is Phase.ACTIVE:
            # It has said all that is listened for; from now on others have it print, and as fast as they like.
            self._unwatch()
            self._follower = None

    def watch_parts(self, vital: Sequence[ProcessId], loop: asyncio.AbstractEventLoop) -> None:
        """Wait for the end of processes whose end is this rank's: its main process may take its time to notice."""
        for who in vital:
            if who not in self._parts and self.phase in ALIVE and (fd := lifecycle.open_pidfd(who)) is not None:
                self._parts[who] = fd
                loop.add_reader(fd, self._part_ended, who, proc.command_line(who.pid)[:80], loop)

    def _part_ended(self, who: ProcessId, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self._drop_parts(loop)
        assert self.child is not None
        if self.phase in ALIVE and not self.child.ended and not self.stopping:
            self._first_gone = f"; its process {who.pid} ({name}) ended first"
            lifecycle.kill_group(self.child.id)  # and with that the main process, which `_exited` hears of

    def _drop_parts(self, loop: asyncio.AbstractEventLoop) -> None:
        for fd in self._parts.values():
            loop.remove_reader(fd)
            os.close(fd)
        self._parts = {}

    def _unwatch(self) -> None:
        if self._watcher is not None and self._watch is not None:
            self._watcher.remove(self._watch)
            self._watch = None

    def holds(self, lock: Path) -> bool:
        """True when the kernel says that a process of this rank's group has the lock."""
        assert self.child is not None
        if not self._keeps(lock, {self._keeper} - {0}):
            # One that was born since the last look may have been handed it.
            born = (info.pid for info in below([self.child.pid]))
            self._keeper = self._keeps(lock, {self.child.pid, *self.pids, *born})
        return self._keeper != 0

    def _keeps(self, lock: Path, among: set[int]) -> int:
        """The first of these that is of this rank's group and has the lock; 0 if none."""
        assert self.child is not None
        return next((i.pid for i in lock_keepers([lock], among) if i.pgid == self.child.pgid), 0)

    def _exited(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self.child is not None
        loop.remove_reader(self.child.pidfd)
        self._drop_parts(loop)
        now = clock.now()
        # First the rest of the group, then everything else: this is the fast path.
        lifecycle.kill_group(self.child.id)
        self.read_log()
        self.exit = self.exit or str(self.child.peek()) + self._first_gone
        self.failing()
        self.ended.set()
        if not self.stopping:
            self.on_event(self, "exit", now, self.exit)

    def felt(self, look: Look) -> None:
        """Take in what was asked for and not heard: the log comes first, and may say nothing."""
        self.pids |= look.members
        self.segments |= look.shared
        if self.phase not in ALIVE or look.signals is None:
            return
        self.read_log()
        if (phase := signals.phase(look.signals)) is not None:
            self.reached(phase, "" if look.signals.registered else "by its own word")
        if signals.mapped(look.signals, look.kv_session):
            self.woke()

    # -- ending ------------------------------------------------------------------------------------------------

    def failing(self) -> None:
        """From now on this life only ends. Remembers what it was."""
        if self.phase in ALIVE:
            self.role = "primary" if self.is_primary else "shadow" if self.phase is Phase.PARKED else "starting"
            self._move(Phase.FAILING, clock.now())
            self._unwatch()

    async def destroy(
        self, sockets: Sequence[Path], gpu_uuids: frozenset[str] = frozenset(), locks: Sequence[Path] = ()
    ) -> None:
        """Kill what is left and fence. Does nothing when that is done or under way."""
        if self._fencing or self.child is None or self.phase is Phase.FENCED:
            return
        self._fencing = True
        try:
            self.failing()
            loop = asyncio.get_running_loop()
            self._drop_parts(loop)
            done: Fenced = await loop.run_in_executor(
                None, fence.destroy, self.child.id, self.tag, sockets, FENCE_TIMEOUT, gpu_uuids, locks
            )
        except BaseException:
            self._fencing = False  # so that it can be tried again
            raise
        strays = f"found outside the group: {', '.join(done.strays)}" if done.strays else ""
        self.on_event(self, "dead", done.dead_at, strays)
        self.leftovers, self.left = done.leftovers, done.names
        self.pids |= done.pids
        if done.proved:
            # Reaped only now: until then nobody else can get this pid, and the group can be named by it.
            loop.remove_reader(self.child.pidfd)
            self.exit = self.exit or str(self.child.peek())
            self.child.reap()
            self._move(Phase.FENCED, done.fenced_at)
            gpu = f"gone from the GPU {(done.gpu_free_at - done.dead_at) * 1000:.0f} ms after its death"
            self.on_event(self, "fenced", done.fenced_at, gpu if done.gpu_free_at else "")
        else:
            self._fencing = False
            left = [f"process {name}" for name in done.names] + [f"a GMS session on {s}" for s in done.sessions]
            left += [f"process {pid} on a GPU, by NVML" for pid in done.on_gpu]
            self.on_event(self, "unfenced", done.fenced_at, f"still there after {FENCE_TIMEOUT:g} s: {', '.join(left)}")
