"""What the kernel says about processes: identity, groups, tags, descendants, lock holders.

Reads /proc and nothing else. A pid alone never names a process here: `ProcessId` carries the start time, which the
kernel sets once and which tells a process from a later one with the same number. Killing is done in `lifecycle`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gms_launch.process import clock

TAG_ENV = "GMS_LAUNCH_TAG"


@dataclass(frozen=True)
class ProcessId:
    """A process: pid, and start time in clock ticks since boot (field 22 of /proc/PID/stat)."""

    pid: int
    start: int


@dataclass(frozen=True)
class Stat:
    """The fields of /proc/PID/stat that we use."""

    pid: int
    comm: str
    state: str
    ppid: int
    pgid: int
    session: int
    start: int

    @property
    def identity(self) -> ProcessId:
        return ProcessId(self.pid, self.start)

    @property
    def dead(self) -> bool:
        """True for a zombie: it runs no more and holds nothing, only its parent has not reaped it yet."""
        return self.state in "ZX"


def _read(path: str) -> bytes:
    """A whole file of /proc in half the calls of the kernel that `open` makes of it. Raises `OSError`."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = b""
        while more := os.read(fd, 65536):
            data += more
        return data
    finally:
        os.close(fd)


def stat(pid: int) -> Stat | None:
    """The process `pid`, or None when there is none."""
    try:
        text = _read(f"/proc/{pid}/stat").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    # The command name may hold spaces and parentheses; the fields begin after the last one.
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    return Stat(
        pid=pid,
        comm=head.partition("(")[2],
        state=fields[0],
        ppid=int(fields[1]),
        pgid=int(fields[2]),
        session=int(fields[3]),
        start=int(fields[19]),
    )


def identity(pid: int) -> ProcessId | None:
    """`pid` with its start time, or None when there is no such process."""
    found = stat(pid)
    return found.identity if found else None


def alive(who: ProcessId) -> bool:
    """True while that very process runs (a zombie does not)."""
    found = stat(who.pid)
    return found is not None and found.start == who.start and not found.dead


def worked(pid: int) -> float:
    """Seconds for which the threads of `pid` have run or waited for a processor, all together; 0 when it is gone.

    Who waits for one on a crowded machine is at work as much as who has it. A kernel that does not count who waits
    tells of those that ran. Source: the kernel's Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat.
    """
    wanted = 0
    try:
        fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        ran = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                wanted += sum(map(int, _read(f"/proc/{pid}/task/{task}/schedstat").split()[:2]))
    except OSError:
        return 0.0
    return max(ran, wanted / 1e9)


def address_space() -> int:
    """What this process has mapped (bytes)."""
    return int(_read("/proc/self/statm").split()[0]) * os.sysconf("SC_PAGE_SIZE")


def pids() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


def tag_of(pid: int) -> str | None:
    """The value of GMS_LAUNCH_TAG that `pid` was started with; None when it has none or cannot be read."""
    try:
        data = _read(f"/proc/{pid}/environ")
    except OSError:
        return None
    prefix = TAG_ENV.encode() + b"="
    for entry in data.split(b"\0"):
        if entry.startswith(prefix):
            return entry[len(prefix) :].decode(errors="replace")
    return None


def command_line(pid: int) -> str:
    """The command line with spaces between its words, or the title that a process gave itself; empty when unknown."""
    try:
        return _read(f"/proc/{pid}/cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def owner(pid: int) -> int | None:
    """The user id that `pid` runs as; None when it is gone, or has more than one (setuid)."""
    found = credentials(pid)
    return found[0] if found else None


def credentials(pid: int) -> tuple[int, int] | None:
    """User and group id of `pid`, where real, effective, saved and file system's agree; None where not, or it is gone.

    Not from the owner of /proc/PID, which is root for every process that keeps others from looking into it.
    """
    try:
        lines = _read(f"/proc/{pid}/status").splitlines()
        fields = dict(line.split(b":", 1) for line in lines if line[:4] in (b"Uid:", b"Gid:"))
    except OSError:
        return None
    users, groups = ({int(n) for n in fields.get(name, b"").split()} for name in (b"Uid", b"Gid"))
    return (users.pop(), groups.pop()) if len(users) == len(groups) == 1 else None


def same_namespace(pid: int) -> bool:
    """True when `pid` is numbered as we number processes: another container's run is not ours to judge."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid") == os.readlink("/proc/self/ns/pid")
    except OSError:
        return False


def namespace() -> str:
    """The pid namespace that this process is numbered in; it lasts as long as something is in it."""
    return os.readlink("/proc/self/ns/pid")


def own_numbers() -> bool:
    """False when /proc numbers processes as another pid namespace does, in a container without a /proc of its own."""
    return os.readlink("/proc/self") == str(os.getpid())


def seen_from_here(who: ProcessId, numbered_in: str) -> ProcessId | None:
    """A process by its number in our pid namespace; None when it has none: it is gone, or beside or above us.

    `numbered_in` is the namespace that gave `who` its number; empty for ours. Start times are the same in all.
    """
    if numbered_in in ("", namespace()):
        return who
    for pid in pids():
        try:
            if os.readlink(f"/proc/{pid}/ns/pid") != numbered_in:
                continue
            with open(f"/proc/{pid}/status", "rb") as file:
                numbers = next(line.split()[1:] for line in file if line.startswith(b"NSpid:"))
        except (OSError, StopIteration):
            continue
        found = identity(pid)
        if int(numbers[-1]) == who.pid and found is not None and found.start == who.start:
            return found
    return None


def tagged(prefix: str, uid: int | None = None, node_rank: int | None = None) -> list[tuple[Stat, str]]:
    """Every running process of a user whose tag is `prefix` or begins with `prefix/`, with its tag.

    `uid` is this user unless given: two users may well give their runs the same name. `node_rank` leaves out other
    nodes' processes, which are here too when several nodes of a run share a machine. Reads all of /proc.
    """
    user = os.getuid() if uid is None else uid
    found = []
    for pid in pids():
        tag = tag_of(pid)
        if tag is None or not (tag == prefix or tag.startswith(prefix + "/")):
            continue
        if owner(pid) != user or (node_rank is not None and tag.rpartition("/")[2] != str(node_rank)):
            continue
        info = stat(pid)
        if info is not None and not info.dead:
            found.append((info, tag))
    return found


def group(pgid: int) -> list[Stat]:
    """Every process of the group, zombies included."""
    return [info for pid in pids() if _group_of(pid) == pgid and (info := stat(pid)) is not None and info.pgid == pgid]


def _group_of(pid: int) -> int:
    """One call of the kernel, where /proc takes four; 0 when there is no such process, or it is not ours to ask."""
    try:
        return os.getpgid(pid)
    except OSError:
        return 0


def children(pid: int) -> list[int]:
    """The direct children of `pid`, of all its threads."""
    found: list[int] = []
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for task in tasks:
        try:
            found.extend(int(p) for p in _read(f"/proc/{pid}/task/{task}/children").split())
        except OSError:
            continue
    return found


def descendants(roots: Iterable[int]) -> list[Stat]:
    """The living descendants of `roots`, without those themselves. Reads all of /proc."""
    below: dict[int, list[Stat]] = {}
    for pid in pids():
        if (info := stat(pid)) is not None:
            below.setdefault(info.ppid, []).append(info)
    found: dict[int, Stat] = {}
    todo = list(roots)
    while todo:
        for info in below.get(todo.pop(), ()):
            if info.pid not in found and not info.dead:
                found[info.pid] = info
                todo.append(info.pid)
    return list(found.values())


def below(roots: Iterable[int]) -> list[Stat]:
    """`descendants` by the kernel's lists of children, not by all of /proc: for one who looks again soon.

    It may miss what is born, or handed on by a parent that ends, in that moment.
    """
    found: dict[int, Stat] = {}
    todo = list(roots)
    while todo:
        for pid in children(todo.pop()):
            if pid not in found and (info := stat(pid)) is not None and not info.dead:
                found[pid] = info
                todo.append(pid)
    return list(found.values())


def describe(info: Stat) -> str:
    """A process for people: pid, command and since when."""
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - info.start / os.sysconf("SC_CLK_TCK")
    since = time.strftime("%H:%M:%S", time.localtime(clock.now() - age))
    return f"{info.pid} ({(command_line(info.pid) or info.comm)[:60]}, since {since})"


def lock_keepers(paths: Iterable[Path], among: Iterable[int] | None = None) -> list[Stat]:
    """Every process that has a flock on one of these files through a descriptor, whoever acquired it.

    Reads the descriptors of `among`, else of all processes that we may look into. Not /proc/locks: that names the
    acquirer alone, also when it is dead and a child of it keeps the descriptor (and within a pid namespace it is then
    not listed at all); and it has the locks of the whole machine, of which another user may hold so many that it takes
    minutes to read.
    """
    wanted: dict[tuple[int, int], str] = {}
    for path in paths:
        try:
            info = os.stat(path)
        except OSError:
            continue
        wanted[info.st_dev, info.st_ino] = path.name
    names = set(wanted.values())
    looked = pids() if among is None else among
    return [i for pid in looked if wanted and _keeps(pid, names, wanted) and (i := stat(pid)) and not i.dead]


def _keeps(pid: int, names: set[str], wanted: dict[tuple[int, int], str]) -> bool:
    place = f"/proc/{pid}/fd/"
    try:
        descriptors = os.listdir(place)
    except OSError:
        return False
    for fd in descriptors:
        try:
            # By name first: a stat may wait for ever for a file system that hangs, and the lock's does not.
            if os.readlink(place + fd).removesuffix(" (deleted)").rpartition("/")[2] not in names:
                continue
            info = os.stat(place + fd)
            if (info.st_dev, info.st_ino) not in wanted:
                continue
            with open(f"/proc/{pid}/fdinfo/{fd}") as file:
                if any(line.startswith("lock:") and " FLOCK " in line for line in file):
                    return True
        except OSError:
            continue  # closed meanwhile
    return False


def listening(port: int, pid: int | None = None) -> dict[str, int]:
    """The sockets that listen on a TCP `port` in the network namespace of `pid` (ours): inode -> user id."""
    found = {}
    for table in ("tcp", "tcp6"):
        try:
            rows = _read(f"/proc/{'self' if pid is None else pid}/net/{table}").decode().splitlines()[1:]
        except OSError:
            continue
        # Local address as HEX:PORT in hex, state 0A = LISTEN, user id, inode.
        for row in (line.split() for line in rows):
            if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port:
                found[row[9]] = int(row[7])
    return found


def listens(pid: int, port: int) -> bool:
    """True when `pid` itself has a listening TCP socket on `port`, in its network namespace."""
    return one_listens([pid], port)


def one_listens(pids: Sequence[int], port: int) -> bool:
    """The same of any of these processes of one network namespace, by one look at the kernel's table: whoever is on
    this machine can make that long.
    """
    living = [pid for pid in pids if os.path.exists(f"/proc/{pid}/net/tcp")]
    inodes = listening(port, living[0]) if living else {}
    return bool(inodes) and any(_has_socket(pid, inodes) for pid in living)


def _has_socket(pid: int, inodes: Collection[str]) -> bool:
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    for fd in descriptors:
        with contextlib.suppress(OSError):  # closed meanwhile: another may be the one
            name = os.readlink(f"/proc/{pid}/fd/{fd}")
            if name.startswith("socket:[") and name[8:-1] in inodes:
                return True
    return False


def who_listens(port: int) -> int | None:
    """The user id of somebody who listens on a TCP `port` in our network namespace; None when nobody does."""
    return next(iter(listening(port).values()), None)


def boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
