"""How `up` tells what happens: to a person's terminal, or as JSON lines to the command that started the agent.

Whoever listens may stop reading (Ctrl-S, a pager, an SSH connection that hangs), and a write then blocks: so it is a
thread that writes, and the agent goes on. What is said is in the agent's log too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gms_launch.errors import LaunchError
from gms_launch.printable import plain

if TYPE_CHECKING:
    from gms_launch.observe.snapshot import Snapshot
    from gms_launch.run.plan import Layout

#: What waits for a listener that does not read; what is said beyond that is said to the log only.
BACKLOG = 1000
#: How long the last words may take (seconds).
LAST_WORDS = 2.0


class Talker:
    """Makes calls that may block, in order, in a thread of its own."""

    def __init__(self) -> None:
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(BACKLOG)
        self._thread = threading.Thread(target=self._run, name="talker", daemon=True)
        self._thread.start()

    def say(self, call: Callable[[], None]) -> bool:
        """Make the call soon; False when too many are waiting.

        A call that raises `OSError`, as when nobody can hear it any more, was in vain. Rich answers a pipe that nobody
        reads with `SystemExit`, which ends the thread, and rightly: there is nobody to talk to.
        """
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            return False
        return True

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            with contextlib.suppress(OSError):
                call()

    def close(self) -> bool:
        """Wait for what is left to be said, within `LAST_WORDS`; False when nobody listened."""
        with contextlib.suppress(queue.Full):
            self._calls.put_nowait(None)
            self._thread.join(LAST_WORDS)
        return not self._thread.is_alive()


class Terminal:
    """Reports to the person at the terminal: lines, and a live view below them where there is a screen."""

    def __init__(self, layout: Layout | None = None) -> None:
        from rich.console import Console
        from rich.live import Live

        # Under srun the lines of all nodes come out together.
        place = layout.topology if layout is not None else None
        self._prefix = f"{place.node_rank} {place.host}: " if place is not None and place.nnodes > 1 else ""
        self._console = Console(stderr=True)
        # Only the leader's agent knows how every rank of the run is.
        whole = place is None or place.is_leader
        self._live = (
            Live(console=self._console, auto_refresh=False, transient=True)
            if whole and self._console.is_terminal
            else None
        )
        self._shot: Snapshot | None = None
        self._due = False
        self._talker = Talker()
        if self._live:
            self._talker.say(self._live.start)

    def progress(self, text: str) -> None:
        logging.info("%s", text)
        line = f"[{time.strftime('%H:%M:%S')}] {self._prefix}{plain(text)}"
        self._talker.say(lambda: self._console.print(line, markup=False, highlight=False, soft_wrap=True))

    def changed(self, shot: Snapshot) -> None:
        self._shot = shot
        if self._live and not self._due:
            self._due = True
            if not self._talker.say(self._show):
                self._due = False

    def _show(self) -> None:
        from gms_launch.observe import views

        self._due = False  # before the newest is taken, so that none is left out
        if self._live and self._shot is not None:
            self._live.update(views.status(self._shot), refresh=True)

    def ready(self, text: str) -> None:
        self.progress(f"ready: {text}")

    def stopping(self) -> None:
        pass  # said as progress, with the reason

    def failed(self, error: LaunchError) -> None:
        pass  # the caller prints it

    def close(self) -> None:
        if self._live:
            self._talker.say(self._live.stop)
        self._talker.close()


class Notify:
    """Reports to the command that started us, as JSON lines on a pipe; silently once that is gone.

    `stays`: it goes on listening when we are ready.
    """

    def __init__(self, fd: int, stays: bool = False) -> None:
        os.set_inheritable(fd, False)
        self._fd, self._stays = fd, stays
        self._talker = Talker()

    def _send(self, **message: Any) -> None:
        self._talker.say(lambda: self._write(json.dumps(message).encode() + b"\n"))

    def _write(self, line: bytes) -> None:
        if self._fd >= 0:
            try:
                os.write(self._fd, line)
            except BrokenPipeError:
                self._shut()

    def _shut(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def progress(self, text: str) -> None:
        logging.info("%s", text)
        self._send(progress=text)

    def changed(self, shot: Snapshot) -> None:
        pass

    def ready(self, text: str) -> None:
        self._send(ready=text)
        if not self._stays:
            self._talker.say(self._shut)

    def stopping(self) -> None:
        pass  # said as progress, with the reason

    def failed(self, error: LaunchError) -> None:
        self._send(failed=str(error), exit=error.exit_code)

    def close(self) -> None:
        if self._talker.close():
            self._shut()
