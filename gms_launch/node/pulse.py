"""Does a rank still do anything? What a hang looks like from outside, and for how long it may.

A rank that exits is noticed at once and elsewhere. This is for one that does not exit: a process of it is stopped, or
its leader's system port, which answered before, does not answer any more. `Pulse` judges and is pure; `Feeler` looks,
and finds the vital processes of the rank on the way, so that their end can be waited for.
That an engine answers and yet serves no tokens is not seen here (`canary` sees that).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from gms_launch.cohort.model import Phase
from gms_launch.engines import signals
from gms_launch.engines.signals import Health, Signals
from gms_launch.gms import probe
from gms_launch.process import proc, scratch
from gms_launch.process.proc import ProcessId

#: In the first looks the members of a group are found anew each time, later after so many: that reads all of /proc.
MEMBERS_EVERY = 5
#: How long a parked engine may have memory of GMS (seconds).
SETTLING = 1.0
#: States of /proc/PID/stat: stopped by a signal. A tracer's stop (t) is a debugger at work, and somebody's choice.
STOPPED = "T"


@dataclass(frozen=True)
class Look:
    """What was seen of a rank: its signs (leader ranks only), the KV memory's state, its stopped processes.

    `vital` are the processes without which it is dead; `members` all pids of its group; `shared` the segments of shared
    memory that they have mapped, in looks in which that was asked for. `woken`: it is parked and has memory of GMS, and
    not the lock.
    """

    signals: Signals | None = None
    kv_session: bool = False
    stopped: tuple[int, ...] = ()
    vital: tuple[ProcessId, ...] = ()
    woken: bool = False
    members: frozenset[int] = frozenset()
    shared: frozenset[scratch.Segment] = frozenset()


@dataclass
class Pulse:
    """When a rank last did well. Times in seconds of one clock; `timeout` is how long it may do badly."""

    timeout: float
    answered: bool = False
    silent_since: float | None = None
    stopped_since: float | None = None
    woken_since: float | None = None

    @property
    def doubtful(self) -> bool:
        """True while a rank does badly and is not yet taken for dead."""
        return self.stopped_since is not None or self.silent_since is not None

    def judge(self, look: Look, now: float) -> str:
        """Why the rank is to be taken for dead; empty while it is not.

        A port that has never answered is that of an engine still starting, which has a deadline of its own.
        """
        self.stopped_since = None if not look.stopped else self.stopped_since or now
        if look.signals is not None and look.signals.health.asked:
            here = look.signals.health.healthy is not None
            self.answered |= here
            self.silent_since = None if here or not self.answered else self.silent_since or now
        # A server may not have read yet that an engine which has just parked has let go.
        self.woken_since = None if not look.woken else self.woken_since or now
        if self.woken_since is not None and now - self.woken_since >= SETTLING:
            return "woken before its turn: it has memory of GMS and not the lock; somebody asked its system port to"
        if self.stopped_since is not None and now - self.stopped_since >= self.timeout:
            pids = ", ".join(map(str, look.stopped))
            return f"hung: process {pids} has been stopped for {self.timeout:g} s (health_timeout)"
        if self.silent_since is not None and now - self.silent_since >= self.timeout:
            return f"hung: no answer on its system port for {self.timeout:g} s (health_timeout)"
        return ""


@dataclass
class Feeler:
    """Looks at one rank, in a thread. `port` is its system port, 0 for a headless rank, which has none."""

    leader: ProcessId
    address: str
    port: int
    lock: Path
    timeout: float
    is_vital: Callable[[str], bool]
    _members: list[ProcessId] = field(default_factory=list)
    _its_port: bool = False
    _vital: tuple[ProcessId, ...] = ()
    _looks: int = 0
    _due: int = 1
    _pause: int = 1

    def feel(self, sockets: Collection[Path], phase: Phase, fresh: bool) -> Look:
        """One look at a rank in `phase`. `sockets` are GMS's on this node. `fresh`: find its members anew, since it has
        just changed its phase.

        A parked engine's metrics are not asked for, since the lock tells when that ends; and of an active one only
        whether it answers is of interest.
        """
        active = phase is Phase.ACTIVE
        anew = fresh or self._looks < MEMBERS_EVERY or self._looks % MEMBERS_EVERY == 0
        if anew:
            self._members = [info.identity for info in proc.group(self.leader.pid) if not info.dead]
            others = (who for who in self._members if who != self.leader)
            self._vital = tuple(who for who in others if self.is_vital(proc.command_line(who.pid)))
        self._looks += 1
        found = [info for who in self._members if (info := proc.stat(who.pid)) is not None and info.start == who.start]
        stopped = tuple(info.pid for info in found if info.state == STOPPED)
        members = frozenset(who.pid for who in self._members)
        # Reading a process's mappings holds up the process: when they are made, and then more and more seldom.
        shared = scratch.mapped(members) if fresh or self._looks & (self._looks - 1) == 0 else frozenset()
        if not self.port:
            return Look(stopped=stopped, vital=self._vital, members=members, shared=shared)
        health = self._ask(phase)
        # Before the lock is looked at: who has it may wake, and does so after taking it.
        using = phase is Phase.PARKED and any(_uses(socket, members) for socket in sockets)
        holds = not active and self._holds(members, whole=anew or using)
        mapped = holds and all(_has_writer(s) for s in sockets if s.name.endswith("_kv_cache.sock"))
        signs = Signals(health, holds, registered=active)
        woken = bool(using) and not holds
        return Look(signs, mapped, stopped, self._vital, woken=woken, members=members, shared=shared)

    def _holds(self, members: Collection[int], whole: bool) -> bool:
        """True when the rank has the lock. Its main process takes it, as a rule, and to look at all of a real engine's
        takes some 10 ms: that is for now and then, and (`whole`) when it matters who else was handed it.
        """
        among = {self.leader.pid}
        if whole:
            among.update(members, (info.pid for info in proc.below([self.leader.pid])))
        return any(info.pgid == self.leader.pid for info in proc.lock_keepers([self.lock], among))

    def _ask(self, phase: Phase) -> Health:
        """What the system port says. Of an engine that starts /health is asked for in the looks 1, 2, 4, 8 and so on.

        It answers 503 until the engine is parked, and logs each as an error, which hides the real ones. Nobody is asked
        before a process of the rank was seen to listen there: anybody may take a port that is free between two lives.
        """
        self._its_port = self._its_port or proc.one_listens([who.pid for who in self._members], self.port)
        if not self._its_port:
            return Health()
        if phase is not Phase.STARTING:
            return signals.ask(self.address, self.port, self.timeout, metrics=phase is Phase.WAKING)
        if self._looks < self._due:
            return signals.ask_metrics(self.address, self.port, self.timeout)
        found = signals.ask(self.address, self.port, self.timeout)
        # One that does not answer is asked again at the next look: it may hang, or its port is not there yet.
        self._pause = 1 if found.healthy is None else 2 * self._pause
        self._due = self._looks + self._pause
        return found


def _uses(socket: Path, pids: Collection[int]) -> bool:
    """True when one of these processes has a session with that server."""
    try:
        return any(session.pid in pids for session in probe.runtime_state(socket).sessions)
    except probe.ProbeError:
        return False


def _has_writer(socket: Path) -> bool:
    """True when a writer is connected to the socket and has memory there; upstream's server tells as ours does."""
    try:
        state = probe.runtime_state(socket)
    except probe.ProbeError:
        return False
    return state.has_rw_session and state.allocation_count > 0
