"""The user's hook (`--on-event`): a command that is run for every event of the run, by the leader's agent alone.

Nothing waits for it: events go into a queue, a thread runs the command for one after the other, each for a bounded
time. Events that come while the queue is full are dropped and counted, and the next that is handed over says how many.
A hook that fails is told once, and once when it is well again; of that, it does not hear.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict

import msgspec

from gms_launch.cohort.records import EventRecord, ServiceStatus
from gms_launch.observe.stamp import stamp
from gms_launch.process import clock, once
from gms_launch.process.lifecycle import Command
from gms_launch.run.plan import Layout
from gms_launch.spool.writer import Writer

NAME = "on-event"
#: Events that wait for their turn.
QUEUE = 256
#: What is read of what one call prints (bytes).
OUTPUT = 64 * 1024


class Hook:
    """The hook of a run. `changed(kind, detail)` is called on the event loop when it begins or ceases to fail."""

    def __init__(self, layout: Layout, writer: Writer, changed: Callable[[str, str], None]) -> None:
        self._layout, self._writer, self._changed = layout, writer, changed
        self._command = layout.settings.on_event if layout.may_lead else ""
        self.leads: Callable[[], bool] = lambda: layout.founds
        self._condition = threading.Condition()
        self._waiting: deque[EventRecord] = deque()
        self._dropped = 0
        self._dropped_ever = 0
        self._calls = 0
        self._wrong = ""
        self._until: float | None = None
        self._thread: threading.Thread | None = None

    @property
    def status(self) -> tuple[ServiceStatus, ...]:
        """How it is, in status; nothing without a hook."""
        if not self._command:
            return ()
        lost = f"{self._dropped_ever} events dropped" if self._dropped_ever else ""
        detail = "; ".join(filter(None, (self._wrong, lost)))
        return (ServiceStatus(NAME, "failed" if self._wrong else "ready", detail=detail),)

    def hear(self, event: EventRecord) -> None:
        """Have the hook run for an event, in its turn. Returns at once."""
        if not self._command or not self.leads() or event.kind.startswith("hook_"):
            return
        with self._condition:
            if self._until is not None or len(self._waiting) >= QUEUE:
                self._dropped += 1
                self._dropped_ever += 1
                return
            self._waiting.append(event)
            self._condition.notify()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on it is run, also for what has been heard."""
        if self._command:
            self._loop = loop
            # The kernel kills the command when this thread ends, so it lives as long as the agent.
            self._thread = threading.Thread(target=self._run, name=NAME, daemon=True)
            self._thread.start()

    def close(self, seconds: float) -> None:
        """Let it be run for what waits, for so long at most, and kill it then. Blocks."""
        with self._condition:
            self._until = time.monotonic() + seconds
            self._condition.notify()
        if self._thread is not None:
            self._thread.join(seconds + once.LOOK + once.GONE)

    def _run(self) -> None:
        while (found := self._next()) is not None:
            event, dropped = found
            if dropped:
                self._tell("hook_dropped", f"{dropped} events were not handed to the hook: {QUEUE} waited already")
            try:
                self._call(event, dropped)
            except Exception as exc:  # an error of ours; the next event is another chance
                self._wrong = f"internal error: {exc!r}"
                self._tell("hook_failed", self._wrong)

    def _next(self) -> tuple[EventRecord, int] | None:
        with self._condition:
            self._condition.wait_for(lambda: self._waiting or self._until is not None)
            if not self._waiting or (self._until is not None and time.monotonic() > self._until):
                return None
            dropped, self._dropped = self._dropped, 0
            return self._waiting.popleft(), dropped

    def _call(self, event: EventRecord, dropped: int) -> None:
        self._calls += 1
        latest = time.monotonic() + self._layout.settings.on_event_timeout
        text = msgspec.json.encode({"run": self._layout.run, "dropped": dropped, **asdict(event)}) + b"\n"
        done = once.run(
            # Whatever it does, engines and agent have the processors first.
            Command(("nice", "-n", "10", "/bin/sh", "-c", self._command), {}),
            f"{self._layout.run}/{NAME}/{self._calls}/{self._layout.topology.node_rank}",
            text,
            lambda: latest if self._until is None else min(latest, self._until),
            OUTPUT,
        )
        cut = b"\n[gms-launch: what it printed beyond this was not read]\n" if len(done.output) >= OUTPUT else b""
        line = f"{stamp(clock.now())} {event.kind}: {done.wrong or 'done'}, {done.seconds:.1f} s\n"
        self._writer.append(self._layout.log_dir / f"{NAME}.log", done.output + cut + line.encode())
        before, self._wrong = self._wrong, done.wrong
        if bool(before) != bool(done.wrong):
            about = f"{done.wrong}; `gms-launch logs {NAME}` has what it said" if done.wrong else "it is well again"
            self._tell("hook_failed" if done.wrong else "hook_well", f"--on-event, for {event.kind}: {about}")

    def _tell(self, kind: str, detail: str) -> None:
        try:
            self._loop.call_soon_threadsafe(self._changed, kind, detail)
        except RuntimeError:  # the loop is closed: the run is over
            pass
