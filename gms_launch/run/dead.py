"""The dead runs of this user on this node: found, and cleared. A live run is told by its agent, which holds a lock in
the run's node-local directory, looked up as the run's own processes see it: in a container /dev/shm may be another one.

For one user only, the one this process runs as: root sweeps others' through children that have become them
(`process.become`). Names that are no run's, and places that an agent does not make, are left alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gms_launch.errors import RefusedError
from gms_launch.numbers import count
from gms_launch.process import proc, scratch, strays
from gms_launch.run import nodedir
from gms_launch.settings.rules import RUN_ID

#: A start removes what has been dead for so long (seconds): until then its user may be looking at it.
LONG_DEAD = 60.0
#: What a start gives to that (seconds).
CLEARED_WITHIN = 10.0
_RANK = re.compile(r"[0-9]{1,6}")


@dataclass(frozen=True)
class Root:
    """A directory of this user's runs, held open: whatever its name comes to mean, it stays the one that was judged."""

    fd: int
    shown: str

    def path(self, name: str) -> Path:
        return Path(f"/proc/self/fd/{self.fd}/{name}")


@dataclass
class DeadRun:
    """What is left of a run: processes, and the directories that its own is in.

    `name` is that of its node-local directory: the run, and its node rank where that is not 0.
    """

    name: str
    processes: list[proc.Stat] = field(default_factory=list)
    roots: list[Root] = field(default_factory=list)

    @property
    def run(self) -> str:
        return self.name.partition("+")[0]

    @property
    def node_rank(self) -> int:
        return count(self.name.partition("+")[2]) or 0


@dataclass
class Found:
    """The runs without a living agent, the names of those that have one, and what could not be judged."""

    dead: list[DeadRun] = field(default_factory=list)
    living: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)


def run_name(name: str) -> bool:
    """True for the name of a run's node-local directory: a run id, and maybe a plus and a node rank."""
    run, plus, rank = name.partition("+")
    return bool(RUN_ID.match(run)) and (not plus or bool(_RANK.fullmatch(rank)))


def tagged_name(tag: str) -> str | None:
    """The name of the directory of the run that a process's tag names; None when it is not one that we make."""
    parts = tag.split("/")
    if len(parts) != 4 or not _RANK.fullmatch(parts[3]):
        return None
    name = nodedir.node_name(parts[0], int(parts[3]))
    return name if run_name(name) else None


@contextlib.contextmanager
def look() -> Iterator[Found]:
    """This user's runs on this node, for as long as their directories are held open."""
    found = Found()
    opened: dict[tuple[int, int], Root] = {}
    try:
        shm = _identity(nodedir.LOCAL_ROOT)
        _open(nodedir.roots(os.getuid()), opened, found)
        runs = {run.name: run for run in _processes(opened, found, shm)}
        for root in opened.values():
            _directories(root, runs, found)
        found.dead = [run for name, run in sorted(runs.items()) if name not in found.living]
        for run in found.dead:
            known = {i.pid for i in run.processes}
            run.processes += [i for i in strays.lock_keepers(run.run, _locks(run)) if i.pid not in known]
        yield found
    finally:
        for root in opened.values():
            os.close(root.fd)


def clear(run: DeadRun, seconds: float) -> str:
    """Kill what is left of a dead run and remove its files; returns what is left after all, empty when nothing is.

    Its agent's place is taken meanwhile, so that no new agent comes into a directory that is being removed. Raises
    `BlockingIOError` when somebody has it: an agent that came, or another who clears it.
    """
    deadline = time.monotonic() + seconds
    held: list[int] = []
    try:
        for root in run.roots:
            if (fd := _agents_place(root, run.name, fcntl.LOCK_EX)) is not None:
                held.append(fd)
        told = [i.identity for i in run.processes]
        _, left = strays.clear(run.run, seconds, frozenset({os.getpid()}), run.node_rank, _locks(run), told)
        if left:
            return f"processes {', '.join(left.values())} of run {run.run} could not be killed"
        for root in run.roots:
            if why := scratch.remove_tree(root.path(run.name), max(1.0, deadline - time.monotonic())):
                return f"{root.shown}/{run.name} could not be removed: {why}"
    except BlockingIOError:
        raise
    except OSError as exc:
        return f"run {run.run}: {exc.strerror}"
    finally:
        for fd in held:
            os.close(fd)
    return ""


def clear_long_dead(spare: str, age: float, seconds: float) -> list[str]:
    """Remove the directories of runs of which nothing is alive or has changed for `age` seconds; returns their names.

    Not the one named `spare`, and not one that tells how its run ended because the run directory could not be told.
    """
    gone = []
    deadline = time.monotonic() + seconds
    with look() as found:
        for run in found.dead:
            if run.name == spare or run.processes or time.monotonic() > deadline:
                continue
            old = [root for root in run.roots if _last_change(root.path(run.name)) < scratch.file_time() - age]
            ends = [root for root in run.roots if (root.path(run.name) / nodedir.END).exists()]
            if old != run.roots or ends:
                continue
            with contextlib.suppress(BlockingIOError):
                if not clear(run, max(1.0, deadline - time.monotonic())):
                    gone.append(run.name)
    return gone


def make_room(name: str, needed: int) -> None:
    """Remove what is long dead, and whatever is dead if `needed` bytes are not there; `name` is of the run that begins.

    Raises `RefusedError` when there is no room then either.
    """
    with contextlib.suppress(OSError):
        clear_long_dead(name, LONG_DEAD, CLEARED_WITHIN)
        if nodedir.wanting(needed):
            clear_long_dead("", 0.0, CLEARED_WITHIN)
    if why := nodedir.wanting(needed):
        raise RefusedError(why)


def _processes(opened: dict[tuple[int, int], Root], found: Found, shm: tuple[int, int]) -> list[DeadRun]:
    """Runs that have processes; opens the directories that these have in a /dev/shm of their own."""
    runs: dict[str, DeadRun] = {}
    seen = {shm}
    for pid in proc.pids():
        if pid == os.getpid() or proc.owner(pid) != os.getuid() or not proc.same_namespace(pid):
            continue
        tag, info = proc.tag_of(pid), proc.stat(pid)
        name = tagged_name(tag) if tag is not None else None
        if name is None or info is None or info.dead:
            continue
        their = Path(f"/proc/{pid}/root") / nodedir.LOCAL_ROOT.relative_to("/")
        where = _identity(their)
        if where not in seen:
            if os.getuid() == 0:
                # A user decides what is there, in a namespace of that user's. Not judged, so not touched.
                continue
            seen.add(where)
            _open(nodedir.roots(os.getuid(), their), opened, found)
        runs.setdefault(name, DeadRun(name)).processes.append(info)
    return list(runs.values())


def _open(paths: list[Path], opened: dict[tuple[int, int], Root], found: Found) -> None:
    for path in paths:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as exc:
            found.wrong.append(f"{path}: {exc.strerror}")
            continue
        info = os.fstat(fd)
        if info.st_uid != os.getuid() or (info.st_dev, info.st_ino) in opened:
            os.close(fd)
        else:
            opened[info.st_dev, info.st_ino] = Root(fd, str(path))


def _directories(root: Root, runs: dict[str, DeadRun], found: Found) -> None:
    with os.scandir(root.fd) as entries:
        names = [e.name for e in entries if e.name != "ports" and run_name(e.name) and e.is_dir(follow_symlinks=False)]
    for name in names:
        try:
            fd = _agents_place(root, name, fcntl.LOCK_SH)
        except BlockingIOError:
            found.living.add(name)
            continue
        except OSError as exc:
            found.living.add(name)  # it cannot be judged, so it is left alone
            found.wrong.append(f"{root.shown}/{name}/agent.lock: {exc.strerror}")
            continue
        if fd is not None:
            os.close(fd)
        runs.setdefault(name, DeadRun(name)).roots.append(root)


def _agents_place(root: Root, name: str, how: int) -> int | None:
    """The lock that an agent holds, taken (shared by all who only look).

    None where there is none: nothing but a regular file is an agent's.

    Raises `BlockingIOError` when an agent has it, `OSError` when it cannot be told.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(f"{name}/agent.lock", flags, dir_fd=root.fd)
    except FileNotFoundError:
        return None
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENOTDIR):
            return None
        if exc.errno == errno.EAGAIN:  # a file lease, which is no agent's lock
            raise OSError(errno.ETXTBSY, os.strerror(errno.ETXTBSY)) from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            return None
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _locks(run: DeadRun) -> list[Path]:
    return [lock for root in run.roots for lock in root.path(run.name).glob("failover*.lock")]


def _last_change(directory: Path) -> float:
    """When something in a run's directory was last written, as far as its first levels tell (Unix seconds)."""
    times = [0.0]
    for path in (directory, *directory.glob("*"), *directory.glob("etcd/member/*/*")):
        with contextlib.suppress(OSError):
            times.append(path.lstat().st_mtime)
    return max(times)


def _identity(path: Path) -> tuple[int, int]:
    try:
        info = path.stat()
    except OSError:
        return -1, -1
    return info.st_dev, info.st_ino
