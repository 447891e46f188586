"""Become a child that dies with its agent and adopts its own orphans: set both with prctl, then exec.

Run by path with a bare interpreter (`python -I -S exec_child.py AGENT_PID -- COMMAND...`), so that a start costs
about 10 ms and no fork handler of a threaded agent ever runs. The process id stays the same through exec, and with
it the signal. Standard library only.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    agent = int(sys.argv[1])
    command = sys.argv[3:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"gms-launch: prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    # Whatever leaves the group and clears its environment stays a descendant: `strays` finds it by that. Both last
    # through exec.
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        sys.exit(f"gms-launch: prctl(PR_SET_CHILD_SUBREAPER) failed: {os.strerror(ctypes.get_errno())}")
    # The agent may have died before prctl; then nobody would ever send the signal.
    if os.getppid() != agent:
        sys.exit("gms-launch: the agent died while this process was being started")
    # Python ignores SIGPIPE, and an ignored signal stays ignored through exec.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as exc:
        sys.exit(f"gms-launch: cannot run {command[0]}: {exc.strerror}")


main()
