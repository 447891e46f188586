"""The guard of a node: kills what an agent leaves behind when it is killed itself.

Children die with the agent by PR_SET_PDEATHSIG, but not their children (an engine's workers). The guard holds the
read end of a pipe whose other end only the agent has; end of file means that the agent is gone, however it went.
Then everything that carries the run's and the node's tag is killed, and the guard ends. It runs in a session of its
own, does nothing until then, and survives signals meant for the agent's terminal.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

#: The agent gave a process this long to die of SIGKILL before it called it unkillable (seconds).
KILL_TIMEOUT = 30.0


def start(run: str, node_rank: int, log: Path, inherit: Sequence[int] = ()) -> tuple[int, int]:
    """Start the guard of a node; returns its pid and our end of its pipe, which closes when we die.

    It opens `log` only when it has something to say, which is at its end: the disk may hang.

    It keeps the descriptors in `inherit` open until it has done its work.
    """
    from gms_launch.cohort.process import Command, child_environment

    reader, writer = os.pipe2(os.O_CLOEXEC)
    env = child_environment(os.environ, Command((), {}), f"{run}/guard/1/{node_rank}")
    guard = subprocess.Popen(
        [sys.executable, "-m", "gms_launch.cohort.guard", run, str(node_rank), str(reader), str(log.absolute())],
        pass_fds=(reader, *inherit),
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


def main() -> None:
    run, node_rank, fd = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sig, signal.SIG_IGN)
    while os.read(fd, 64):
        pass
    from gms_launch.cohort.process import kill_tagged
    from gms_launch.spool import files

    left = kill_tagged(run, KILL_TIMEOUT, spare=frozenset({os.getpid()}), node_rank=node_rank)
    text = "".join(f"guard: process {who.pid} could not be killed\n" for who in left)
    if text:
        files.append(Path(sys.argv[4]), text.encode())


if __name__ == "__main__":
    main()
