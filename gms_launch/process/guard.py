"""The guard of a node: kills what an agent leaves behind when it is killed itself.

Children die with the agent by PR_SET_PDEATHSIG, but not their children (an engine's workers). The guard holds the
read end of a pipe whose other end only the agent has; end of file means that the agent is gone, however it went.
Then everything is killed that carries the run's and the node's tag, keeps one of the node's locks, or is on the list
that the agent sent through the pipe (descendants without a tag, every few seconds), and the guard ends. What was born
since the last list, without tag and lock, it cannot find: descent ends with the agent. It runs in a session of its own,
and survives signals meant for the agent's terminal. Until then it stands in for an agent that stands still (`deputy`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gms_launch.interpreter import module

if TYPE_CHECKING:
    from gms_launch.process.proc import ProcessId

#: The agent gave a process this long to die of SIGKILL before it called it unkillable (seconds).
KILL_TIMEOUT = 30.0
#: How long what stands in for the agent has to say that it is dead (seconds): on a busy machine we may be done sooner.
LAST_WORD = 2.0
#: Of one process on the list: pid and start time, a line. So many lines are one write that a pipe keeps whole.
LINES = 100


def start(
    run: str,
    node_rank: int,
    log: Path,
    inherit: Sequence[int] = (),
    lock_dir: Path | None = None,
    deputy: tuple[int, int] = (-1, -1),
) -> tuple[int, int]:
    """Start the guard of a node; returns its pid and our end of its pipe, which closes when we die.

    It opens `log` only when it has something to say, which is at its end: the disk may hang.

    It keeps the descriptors in `inherit` open until it has done its work. The node's locks are in `lock_dir`.
    `deputy` are the descriptors with which it stands in for us (`Herald.open`); -1 for none.
    """
    from gms_launch.process.lifecycle import CHILDREN, Command, child_environment

    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(writer, False)
    env = child_environment(os.environ, Command((), {}), f"{run}/guard/1/{node_rank}")
    words = [run, str(node_rank), str(reader), str(log.absolute()), str(lock_dir or ""), *map(str, deputy)]
    guard = CHILDREN.popen(
        module(sys.executable, "gms_launch.process.guard", *words),
        pass_fds=(reader, *inherit, *(fd for fd in deputy if fd >= 0)),
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )
    guard.returncode = 0  # it outlives us
    os.close(reader)
    return guard.pid, writer


def tell(writer: int, untagged: Sequence[ProcessId]) -> None:
    """Send a new list. One that does not fit into the pipe is left out; the next will do."""
    lines = [f"{who.pid} {who.start}\n" for who in untagged]
    with contextlib.suppress(BlockingIOError):
        for begin in range(0, len(lines), LINES):
            os.write(writer, "".join(lines[begin : begin + LINES]).encode())


def listen(fd: int) -> Iterable[ProcessId]:
    """Everything that was ever on a list, once the other end is closed. A process that ended meanwhile does no harm."""
    from gms_launch.process.proc import ProcessId

    found: set[ProcessId] = set()
    with open(fd) as pipe:
        for line in pipe:
            pid, _, born = line.partition(" ")
            found.add(ProcessId(int(pid), int(born)))
            if len(found) > 100 * LINES:
                from gms_launch.process.proc import alive

                found = {who for who in found if alive(who)}
    return found


def main() -> None:
    run, node_rank, fd, log = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    lock_dir = sys.argv[5] if len(sys.argv) > 5 else ""
    leash, words = (int(n) for n in sys.argv[6:8]) if len(sys.argv) > 7 else (-1, -1)
    beside: threading.Thread | None = None
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sig, signal.SIG_IGN)
    if leash >= 0:
        from gms_launch.process.deputy import Deputy

        # Beside the first duty, whatever becomes of this one.
        line = socket.socket(fileno=words) if words >= 0 else None
        stand_in = Deputy(run, node_rank, socket.socket(fileno=leash), line)
        beside = threading.Thread(target=stand_in.serve, name="deputy", daemon=True)
        beside.start()
    told = listen(fd)
    from gms_launch.process import strays
    from gms_launch.spool import files

    places = [Path(lock_dir), *Path(lock_dir).glob("g*")] if lock_dir else []
    locks = sorted(lock for place in places for lock in place.glob("failover*.lock"))
    _, left = strays.clear(run, KILL_TIMEOUT, frozenset({os.getpid()}), node_rank, locks, told)
    text = "".join(f"guard: process {name} could not be killed\n" for name in left.values())
    if beside is not None:
        beside.join(LAST_WORD)
    if text:
        files.append(log, text.encode())


if __name__ == "__main__":
    main()
