"""`gms-launch sweep`: clear this node of runs whose agent is dead. Also what a Slurm epilog calls.

As root it sweeps every user's dead runs, as anybody else one's own. A live run is told by its agent, which holds a
lock in the run's node-local directory, looked up as the run's own processes see it: in a container /dev/shm may be
another one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from gms_launch.errors import LaunchError, NoContactError, RefusedError, UsageError
from gms_launch.numbers import count
from gms_launch.process import proc, strays
from gms_launch.run.nodedir import LOCAL_ROOT, node_name, user_root
from gms_launch.settings.rules import RUN_ID


@dataclass
class DeadRun:
    """What is left of a run: processes, and the node-local directories it used, as this process can reach them.

    `name` is that of its node-local directory: the run, and its node rank where that is not 0.
    """

    name: str
    uid: int
    processes: list[proc.Stat] = field(default_factory=list)
    directories: set[Path] = field(default_factory=set)

    @property
    def run(self) -> str:
        return self.name.partition("+")[0]

    @property
    def node_rank(self) -> int:
        return count(self.name.partition("+")[2]) or 0


def main(run: str | None, dry_run: bool) -> None:
    dead_ones, living = look()
    found = [d for d in dead_ones if run is None or run in (d.run, d.name)]
    if not found and run is not None:
        if not RUN_ID.match(run.partition("+")[0]):
            raise UsageError(f"{run!r} is not the name of a run")
        if any(run in (name, name.partition("+")[0]) for _, name in living):
            raise RefusedError(
                f"run {run} is up on this node, and only dead runs are swept; `gms-launch down --run {run}` stops it"
            )
        raise NoContactError(f"nothing of a run {run} is on this node")
    if not found:
        print("nothing to sweep")
    for dead in found:
        pids = ", ".join(f"{i.pid} ({i.comm})" for i in dead.processes) or "no process"
        print(f"run {dead.run} of user {dead.uid}: {pids}" + (", files" if dead.directories else ""))
        if dry_run:
            continue
        # While the processes live: their directory may be reachable through them only.
        for directory in dead.directories:
            shutil.rmtree(directory, ignore_errors=True)
        told = [i.identity for i in dead.processes]
        _, left = strays.clear(dead.run, 30.0, frozenset({os.getpid()}), dead.node_rank, (), told, dead.uid)
        if left:
            raise LaunchError(f"processes {', '.join(left.values())} of run {dead.run} could not be killed")
        print(f"run {dead.run}: swept")


def dead_runs() -> list[DeadRun]:
    """Runs on this node without a living agent."""
    return look()[0]


def look() -> tuple[list[DeadRun], set[tuple[int, str]]]:
    """The runs on this node without a living agent, and user and name of those that have one."""
    runs: dict[tuple[int, str], DeadRun] = {}
    living: set[tuple[int, str]] = set()
    for pid in proc.pids():
        tag, uid, info = proc.tag_of(pid), proc.owner(pid), proc.stat(pid)
        if tag is None or uid is None or info is None or info.dead:
            continue
        if pid == os.getpid() or not proc.same_namespace(pid):
            continue
        name, node_rank = tag.split("/")[0], tag.rpartition("/")[2]
        name = node_name(name, count(node_rank) or 0)
        dead = runs.setdefault((uid, name), DeadRun(name, uid))
        dead.processes.append(info)
        seen = Path(f"/proc/{pid}/root{user_root(uid)}") / name
        if agent_alive(seen):
            living.add((uid, name))
        elif seen.is_dir():
            here = user_root(uid) / name
            dead.directories.add(here if here.is_dir() and seen.samefile(here) else seen)
    for root in LOCAL_ROOT.glob("gms-launch-*"):
        owner = root.lstat().st_uid
        if root != user_root(owner) or (os.getuid() not in (0, owner)):
            continue
        for path in root.iterdir():
            if path.is_dir() and path.name != "ports":
                dead = runs.setdefault((owner, path.name), DeadRun(path.name, owner))
                dead.directories.add(path)
                if agent_alive(path):
                    living.add((owner, path.name))
    found = [dead for key, dead in sorted(runs.items()) if key not in living]
    for dead in found:
        locks = [lock for directory in dead.directories for lock in directory.glob("failover*.lock")]
        known = {i.pid for i in dead.processes}
        dead.processes += [i for i in strays.lock_keepers(dead.run, locks, dead.uid) if i.pid not in known]
    return found, living


def agent_alive(node_dir: Path) -> bool:
    """True while an agent holds its place in the node-local directory."""
    try:
        fd = os.open(node_dir / "agent.lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
