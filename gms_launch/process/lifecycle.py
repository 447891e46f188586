"""Start, watch and kill the processes of a node.

A `Child` is the leader of its own session and process group (so group id = pid), dies with its agent, carries the
tag, and is watched through a pidfd. The rules for killing are here and nowhere else: a pid or group is signalled
only after its start time was checked, and never group 0 or 1.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gms_launch.interpreter import SAFE
from gms_launch.process import proc
from gms_launch.process.proc import ProcessId, Stat
from gms_launch.spool.output import Output

EXEC_CHILD = str(Path(__file__).with_name("exec_child.py"))
PR_SET_CHILD_SUBREAPER = 36


class Children:
    """The children that this process has started and not reaped: any other is an orphan of theirs.

    `reaper` once orphans come to us; not when we had children before that, whose orphans would be nobody's to kill.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pids: set[int] = set()
        self.reaper = False

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """`subprocess.Popen`, so that no look from another thread takes the child for an orphan."""
        with self.lock:
            child: subprocess.Popen[bytes] = subprocess.Popen(argv, **options)
            self.pids.add(child.pid)
        return child

    def reaped(self, pid: int) -> None:
        with self.lock:
            self.pids.discard(pid)


CHILDREN = Children()


@dataclass(frozen=True)
class Exit:
    """How a child ended: `code` as a shell would say it (128 + signal when killed)."""

    code: int
    signal: int

    @classmethod
    def from_wait(cls, status: int) -> Exit:
        if os.WIFSIGNALED(status):
            return cls(128 + os.WTERMSIG(status), os.WTERMSIG(status))
        return cls(os.WEXITSTATUS(status), 0)

    def __str__(self) -> str:
        if self.signal:
            return f"killed by {signal.Signals(self.signal).name}"
        return f"exit code {self.code}"


@dataclass(frozen=True)
class Command:
    """What to run. `env` is added to the agent's own environment; a value of None removes a name."""

    argv: tuple[str, ...]
    env: Mapping[str, str | None]


class Child:
    """A running child of this agent. Not reaped before `reap`, so its pid cannot be reused until then."""

    def __init__(self, name: str, tag: str, pid: int, start: int, output: Output) -> None:
        self.name = name
        self.tag = tag
        self.id = ProcessId(pid, start)
        self.output = output
        self.pidfd = os.pidfd_open(pid)
        self.exit: Exit | None = None

    @property
    def pid(self) -> int:
        return self.id.pid

    @property
    def pgid(self) -> int:
        return self.id.pid

    @property
    def ended(self) -> bool:
        """True once the process has exited, reaped or not."""
        if self.exit is not None:
            return True
        return bool(select.select([self.pidfd], [], [], 0)[0])

    def peek(self) -> Exit | None:
        """How it ended, without reaping it; None while it runs."""
        if self.exit is not None:
            return self.exit
        info = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if info is None:
            return None
        if info.si_code == os.CLD_EXITED:
            return Exit(info.si_status, 0)
        return Exit(128 + info.si_status, info.si_status)

    def reap(self) -> Exit:
        """Collect the exit status of an ended child. Call it only after the group was dealt with."""
        if self.exit is None:
            _, status = os.waitpid(self.pid, 0)
            CHILDREN.reaped(self.pid)
            self.exit = Exit.from_wait(status)
            os.close(self.pidfd)
            self.output.ended = True
        return self.exit


def become_subreaper() -> bool:
    """Make orphans of our children our own, so that a double fork does not hide a process.

    Returns False when there were children before, as of a shell that became this process: then orphans prove nothing.
    """
    before = proc.children(os.getpid())
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    CHILDREN.reaper = not before
    return CHILDREN.reaper


def child_environment(base: Mapping[str, str], command: Command, tag: str) -> dict[str, str]:
    """The environment a child gets: the agent's, without our own settings, plus the command's, plus the tag.

    Python imports nothing from the working directory there, unless the command says otherwise.
    """
    env = {k: v for k, v in base.items() if not k.startswith("GMS_LAUNCH_")} | SAFE
    for key, value in command.env.items():
        if value is None:
            env.pop(key, None)
        else:
            env[key] = value
    env[proc.TAG_ENV] = tag
    env["PYTHONUNBUFFERED"] = "1"
    return env


def spawn(name: str, command: Command, tag: str, output: Output, fds: Sequence[int] = ()) -> Child:
    """Start `command` in its own session; what it prints goes to `output`. Call from the agent's main thread.

    It inherits the descriptors `fds`, and no others.

    The parent-death signal is tied to the thread that starts the child, hence the main thread. Raises `OSError`.
    """
    argv: Sequence[str] = [sys.executable, "-I", "-S", EXEC_CHILD, str(os.getpid()), "--", *command.argv]
    popen = CHILDREN.popen(
        argv,
        env=child_environment(os.environ, command, tag),
        stdin=subprocess.DEVNULL,
        stdout=output.fd,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=fds,
    )
    popen.returncode = 0  # we reap it ourselves, after its group was dealt with
    found = proc.stat(popen.pid)
    assert found is not None, "an unreaped child always has a /proc entry"
    return Child(name, tag, popen.pid, found.start, output)


def kill_group(leader: ProcessId, sig: int = signal.SIGKILL) -> bool:
    """Signal the process group led by `leader`, if that very process still exists (a zombie will do).

    Returns False when the leader is gone or is another process by now: then nothing is signalled.
    """
    if leader.pid <= 1:
        raise ValueError(f"refusing to signal process group {leader.pid}")
    found = proc.stat(leader.pid)
    if found is None or found.start != leader.start or found.pgid != leader.pid:
        return False
    try:
        os.killpg(leader.pid, sig)
    except ProcessLookupError:
        return False
    return True


def open_pidfd(who: ProcessId) -> int | None:
    """A pidfd of that very process, dead or alive; None when it is gone."""
    try:
        fd = os.pidfd_open(who.pid)
    except ProcessLookupError:
        return None
    if proc.identity(who.pid) != who:
        os.close(fd)
        return None
    return fd


def kill_process(who: ProcessId, sig: int = signal.SIGKILL) -> int | None:
    """Signal one process through a pidfd and return the descriptor, readable once it is gone; None if it is gone, or
    another user's.

    The start time is checked after the pidfd was opened: from then on the number cannot come to mean another.
    """
    if who.pid <= 1:
        raise ValueError(f"refusing to signal process {who.pid}")
    try:
        fd = os.pidfd_open(who.pid)
    except ProcessLookupError:
        return None
    found = proc.stat(who.pid)
    if found is None or found.start != who.start or found.dead:
        os.close(fd)
        return None
    try:
        signal.pidfd_send_signal(fd, sig)
    except (ProcessLookupError, PermissionError):
        os.close(fd)
        return None
    return fd


def reap_orphans(keep: frozenset[int]) -> None:
    """Collect dead processes that became ours when their parent died. `keep` are children that are reaped elsewhere."""
    found = proc.children(os.getpid())
    with CHILDREN.lock:
        own = keep | CHILDREN.pids
    for pid in found:
        if pid not in own and (info := proc.stat(pid)) is not None and info.dead:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                pass


def kill_tagged(
    prefix: str,
    timeout: float,
    spare: frozenset[int] = frozenset(),
    uid: int | None = None,
    node_rank: int | None = None,
) -> list[ProcessId]:
    """SIGKILL everything tagged with `prefix` until a look finds nothing; return what is left after `timeout` s.

    `uid` is the user whose processes are meant, this one unless given; `node_rank` means that node's only. `spare` are
    pids not to touch (the caller's own).
    """

    def look() -> list[Stat]:
        return [info for info, _ in proc.tagged(prefix, uid, node_rank) if info.pid not in spare]

    return list(kill_all(look, timeout)[1])


#: Processes, each described for people (`proc.describe`).
Named = dict[ProcessId, str]


def kill_all(look: Callable[[], list[Stat]], timeout: float) -> tuple[Named, Named]:
    """SIGKILL whatever `look` finds until it finds nothing; returns all it found, and what is left after `timeout` s.

    Looks again after each round, since a process may have been forking while it was found.
    """
    deadline = time.monotonic() + timeout
    found: Named = {}
    while True:
        targets = look()
        # Described before it is killed: a dead process has no command line.
        found |= {info.identity: proc.describe(info) for info in targets if info.identity not in found}
        if not targets or time.monotonic() > deadline:
            return found, {info.identity: found[info.identity] for info in targets}
        fds = [fd for info in targets if (fd := kill_process(info.identity)) is not None]
        if not fds:
            time.sleep(0.01)  # gone between two looks, or nothing that we may kill
        wait_gone(fds, max(0.0, deadline - time.monotonic()))


def wait_gone(pidfds: Sequence[int], timeout: float) -> bool:
    """Wait until every pidfd is readable (its process has exited), close them, and say whether all were in time."""
    deadline = time.monotonic() + timeout
    poller = select.poll()
    pending = set(pidfds)
    for fd in pending:
        poller.register(fd, select.POLLIN)
    while pending:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        for fd, _ in poller.poll(left * 1000):
            poller.unregister(fd)
            pending.discard(fd)
    for fd in pidfds:
        os.close(fd)
    return not pending
