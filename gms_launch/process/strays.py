"""What a dead life leaves on a node that neither its group nor its tag shows: found by descent, and by the lock.

Every child of an agent is a subreaper, so whatever leaves its group, session and environment is a descendant of it for
as long as it lives. When it dies, what it leaves becomes the agent's own child: a child of the agent that it did not
start is an orphan of something that has ended. And whoever keeps the lock has a descriptor of it, which the kernel
shows in /proc/PID/fdinfo whoever acquired it, the dead too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from gms_launch.process import lifecycle, proc
from gms_launch.process.lifecycle import CHILDREN
from gms_launch.process.proc import ProcessId, Stat


def orphans() -> list[Stat]:
    """Living orphans of children that have ended, with their descendants; what is in a child's group is left out.

    Nothing in a process that is no subreaper, or that had children before it became one.
    """
    if not CHILDREN.reaper:
        return []
    me = os.getpid()
    with CHILDREN.lock:
        direct = [pid for pid in proc.children(me) if pid not in CHILDREN.pids]
        groups = set(CHILDREN.pids)
    living = [i for pid in direct if (i := proc.stat(pid)) is not None and i.ppid == me and not i.dead]
    if not living:
        return []
    return [i for i in [*living, *proc.descendants(i.pid for i in living)] if i.pgid not in groups]


def family() -> set[int]:
    """This process, its children that live, and all their descendants."""
    with CHILDREN.lock:
        own = set(CHILDREN.pids)
    living = {pid for pid in own if (info := proc.stat(pid)) is not None and not info.dead}
    return {os.getpid(), *living, *(i.pid for i in proc.descendants(living))}


def lock_keepers(run: str, locks: Iterable[Path], uid: int | None = None) -> list[Stat]:
    """Processes of a user (this one) that keep one of the locks of `run` and are neither our family nor another run's.

    Two runs may have been given one directory by their user: what carries another run's tag is not ours to judge.
    """
    found = proc.lock_keepers(locks)
    known, user = family() if found else set(), os.getuid() if uid is None else uid
    return [
        i
        for i in found
        if i.pid not in known
        and proc.owner(i.pid) == user
        and ((tag := proc.tag_of(i.pid)) is None or tag.startswith(f"{run}/"))
    ]


def untagged(run: str) -> list[ProcessId]:
    """Descendants of living children that do not carry the run's tag: what only their descent tells."""
    with CHILDREN.lock:
        own = set(CHILDREN.pids)
    return [i.identity for i in proc.below(own) if not (proc.tag_of(i.pid) or "").startswith(f"{run}/")]


def clear(
    run: str,
    timeout: float,
    spare: frozenset[int],
    node_rank: int,
    locks: Iterable[Path],
    told: Iterable[ProcessId] = (),
    uid: int | None = None,
) -> tuple[lifecycle.Named, lifecycle.Named]:
    """Kill what an agent that is gone left on its node; returns what was found, and what is left after `timeout` s.

    By tag, by the locks, and by what the agent had `told` of: nothing else can show what was a dead agent's.
    """
    found, known = list(locks), list(told)

    def look() -> list[Stat]:
        left = [info for info, _ in proc.tagged(run, uid, node_rank) if info.pid not in spare]
        left += [info for who in known if (info := proc.stat(who.pid)) and info.identity == who and not info.dead]
        return left or [info for info in lock_keepers(run, found, uid) if info.pid not in spare]

    return lifecycle.kill_all(look, timeout)
