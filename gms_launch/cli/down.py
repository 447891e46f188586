"""`gms-launch down`: an orderly stop if the agent lives, and the rest by force; then the proof."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

from gms_launch import rundir
from gms_launch.cohort import proc, process
from gms_launch.errors import DeadlineError, LaunchError, NoContactError
from gms_launch.rundir import NodeDir, RunDir, RunFile


def main(run: str | None, timeout: float) -> None:
    directory, found = rundir.find(run)
    if not found.local:
        raise NoContactError(f"run {directory.run} is led by {found.leader_host}; run `gms-launch down` there")
    stopped = stop_agent(found, timeout)
    killed = clear(directory, found)
    print(f"run {directory.run} is down: " + ("stopped in order" if stopped else "its agent was gone already"))
    if killed:
        print(f"killed {killed} processes that were left")
    print(f"nothing of it is alive on {found.leader_host}, and {found.node_dir} is gone; logs: {directory.logs}")


def stop_agent(found: RunFile, timeout: float) -> bool:
    """End the agent, orderly within `timeout` seconds; False if there was none. Raises `DeadlineError`."""
    try:
        fd = os.pidfd_open(found.agent_pid)
    except ProcessLookupError:
        return False
    try:
        # Checked after the descriptor was opened: from here on it means this process and no other.
        if not proc.alive(found.agent):
            return False
        signal.pidfd_send_signal(fd, signal.SIGTERM)
        if process.wait_gone([os.dup(fd)], timeout):
            return True
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        process.wait_gone([os.dup(fd)], 10.0)
        raise DeadlineError(
            f"the agent (pid {found.agent_pid}) did not stop within {timeout:g} s and was killed; "
            "run `gms-launch down` again to clear up what is left"
        )
    finally:
        os.close(fd)


def clear(directory: RunDir, found: RunFile) -> int:
    """Kill what is left of a run without an agent, remove its node-local files, mark it ended.

    Returns how many processes had to be killed. Raises `LaunchError` when one would not die.
    """
    own = frozenset({os.getpid()})
    guard = [i.identity for i, _ in proc.tagged(f"{directory.run}/guard")]
    deadline = time.monotonic() + 5.0
    while any(proc.alive(g) for g in guard) and time.monotonic() < deadline:
        time.sleep(0.01)  # the guard ends by itself once it has done the same
    before = [i for i, _ in proc.tagged(directory.run) if i.pid not in own]
    left = process.kill_tagged(directory.run, 30.0, spare=own)
    if left:
        raise LaunchError(f"processes {', '.join(str(w.pid) for w in left)} of run {directory.run} could not be killed")
    NodeDir.of(directory.run, str(found.settings.get("gms_socket_dir") or "")).remove()
    if found.ended is None:
        directory.write(replace(directory.read() or found, ended=time.time()))
    return len(before)
