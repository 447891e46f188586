"""One command, run to its end and bounded: in time, in what it prints, and in what it leaves. Not for what stays up.

It leads a session of its own, dies with the agent and carries the tag, as `lifecycle.spawn`'s children do. What it
prints comes through a pipe that is closed when enough was read, so that one that prints without end gets SIGPIPE.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gms_launch.process import lifecycle, proc
from gms_launch.process.lifecycle import CHILDREN, EXEC_CHILD, Command, Exit
from gms_launch.process.proc import ProcessId

#: How often `deadline` is asked again (seconds).
LOOK = 0.2
#: What a killed process may take to be gone (seconds).
GONE = 5.0


@dataclass(frozen=True)
class Outcome:
    """`wrong` is empty for exit code 0, else what was the matter; `output` as far as it was read."""

    wrong: str
    output: bytes
    seconds: float


def run(command: Command, tag: str, stdin: bytes, deadline: Callable[[], float], most: int) -> Outcome:
    """Run `command` with `stdin`, read `most` bytes of what it prints, and kill its process group when it has ended or
    at the deadline (monotonic seconds, asked for again and again). Blocks.

    The calling thread must live for as long as the process: its death is the command's too.
    """
    begun = time.monotonic()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    text = os.memfd_create("stdin", os.MFD_CLOEXEC)
    try:
        os.truncate(text, len(stdin))
        os.pwrite(text, stdin, 0)
        child = CHILDREN.popen(
            [sys.executable, "-I", "-S", EXEC_CHILD, str(os.getpid()), "--", *command.argv],
            env=lifecycle.child_environment(os.environ, command, tag),
            stdin=text,
            stdout=writer,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as exc:
        os.close(reader)
        return Outcome(f"it cannot be started: {exc.strerror}", b"", 0.0)
    finally:
        os.close(text)
        os.close(writer)
    child.returncode = 0  # reaped here, after its group was dealt with
    found = proc.stat(child.pid)
    assert found is not None, "an unreaped child always has a /proc entry"
    pidfd = os.pidfd_open(child.pid)
    try:
        output, late = _follow(pidfd, reader, deadline, most)
        wrong = _end(ProcessId(child.pid, found.start), pidfd)
    finally:
        os.close(pidfd)
    seconds = time.monotonic() - begun
    return Outcome(f"killed after {seconds:.1f} s, it had not ended" if late else wrong, output, seconds)


def _follow(pidfd: int, reader: int, deadline: Callable[[], float], most: int) -> tuple[bytes, bool]:
    """What it prints until it ends, and True when it did not in time. Closes `reader`."""
    output, open_ = b"", True
    os.set_blocking(reader, False)
    try:
        while True:
            left = deadline() - time.monotonic()
            ready = _ready([pidfd, reader] if open_ else [pidfd], max(0.0, min(LOOK, left)))
            if open_ and (reader in ready or pidfd in ready):
                # One of its own that lives on may hold the other end: what is there now is all that is waited for.
                data = _now(reader, most - len(output))
                output += data or b""
                if data == b"" or len(output) >= most:
                    os.close(reader)
                    open_ = False
            if pidfd in ready:
                return output, False
            if left <= 0:
                return output, True
    finally:
        if open_:
            os.close(reader)


def _ready(fds: Sequence[int], seconds: float) -> set[int]:
    """Those that have something to read or are at their end; of any number, which `select` would not take."""
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    return {fd for fd, _ in poller.poll(seconds * 1000)}


def _now(reader: int, most: int) -> bytes | None:
    """What can be read without waiting, empty at the end of it; None when there is nothing yet."""
    try:
        return os.read(reader, most)
    except BlockingIOError:
        return None


def _end(who: ProcessId, pidfd: int) -> str:
    """Kill what is left of its group and reap it; how it ended, empty when well."""
    lifecycle.kill_group(who, signal.SIGKILL)
    if not _ready([pidfd], GONE):
        return f"process {who.pid} cannot be killed"
    _, status = os.waitpid(who.pid, 0)
    CHILDREN.reaped(who.pid)
    found = Exit.from_wait(status)
    return str(found) if found.code else ""
