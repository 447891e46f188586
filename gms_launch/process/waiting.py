"""A process that has imported what an engine needs and waits to become one, as its agent sees it.

What it does itself is in `warm_child`. Calls never block: what does not fit into the socket's buffer is an error.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from gms_launch.process import lifecycle, scratch
from gms_launch.process.lifecycle import Child, Command
from gms_launch.spool.output import Output

_WARM_CHILD = str(Path(__file__).with_name("warm_child.py"))
#: Room for an engine's command line (bytes).
COMMAND_LINE = 8192
#: Room in the socket: a life's environment holds certificates (bytes).
ROOM = 1 << 20


def command(
    python: str, modules: Sequence[str], env: Mapping[str, str | None], fd: str = "FD", room: str = "ROOM"
) -> Command:
    """How to start one; `fd` is the number of its end of the socket."""
    return Command((python, _WARM_CHILD, fd, room, *modules), env)


class Waiting:
    """A child of this agent with the agent's end of its socket, `line`; `began` is as of `scratch.file_time`."""

    def __init__(self, child: Child, line: socket.socket, began: float) -> None:
        self.child, self.line = child, line
        self.began = began

    @classmethod
    def start(
        cls, name: str, python: str, modules: Sequence[str], env: Mapping[str, str | None], tag: str, output: Output
    ) -> Waiting:
        """Start one. Call on the main thread. Raises `OSError`."""
        ours, theirs = socket.socketpair()
        try:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM)
            ours.setblocking(False)
            made = command(python, modules, env, str(theirs.fileno()), " " * COMMAND_LINE)
            began = scratch.file_time()
            child = lifecycle.spawn(name, made, tag, output, (theirs.fileno(),))
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(child, ours, began)

    def ask(self) -> None:
        """Ask whether it is there. Raises `OSError`."""
        self.line.send(b"?")

    def heard(self) -> str:
        """What it said since the last look: `r` for ready, `h` for here; empty when it hung up."""
        try:
            return self.line.recv(64).decode(errors="replace")
        except BlockingIOError:
            return " "
        except OSError:
            return ""

    def become(self, name: str, command: Command, tag: str, output: Output) -> Child:
        """Let it be the engine that `command` would start: the child, under its new name. Raises `OSError`."""
        env = lifecycle.child_environment(os.environ, command, tag)
        life = json.dumps({"argv": command.argv, "env": env, "cwd": os.getcwd()}).encode(errors="surrogateescape")
        message = b"!" + len(life).to_bytes(8, "big") + life
        # The first byte by itself: it is read by itself, and the descriptor goes with what follows.
        self.line.send(message[:1])
        if socket.send_fds(self.line, [message[1:]], [output.fd]) < len(message) - 1:
            raise OSError(f"{len(message)} bytes do not fit into the socket of process {self.child.pid}")
        self.line.close()
        self.child.output.ended = True
        self.child.name, self.child.tag, self.child.output = name, tag, output
        return self.child
