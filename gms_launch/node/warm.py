"""Warm slots: processes of this node that have imported what an engine needs and wait to become one.

A re-arm takes one of them and is spared the imports. One process a slot, for one life: nothing is forked from it, since
neither CUDA nor the threads that imports start would survive that. They hold no lock, no GMS session and no GPU memory;
what they are is told by their tag (`<run>/warm/<group and number>/<node>`), and they die with the agent as its other
children do.

Started once redundancy is full, so that they never compete with a failover or a start for the processor. Nothing waits
for them: where none is ready, or the one that is asked does not answer in time, a life is started cold.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gms_launch.cohort.records import ServiceStatus
from gms_launch.node import fence
from gms_launch.process.lifecycle import Child
from gms_launch.process.waiting import Waiting
from gms_launch.run.plan import Layout
from gms_launch.spool.output import Output

#: How long one that is asked may take to answer before a life is started without it (seconds).
ANSWER = 1.0
#: The next one after one that ended before it was ready comes so much later, doubled each time (seconds).
AGAIN, AGAIN_MAX = 5.0, 300.0
#: How long it may take to be proved dead (seconds).
FENCE_TIMEOUT = 30.0


@dataclass
class Slot:
    """One place for a process. `state` is empty, imports, ready, asked, here or dying."""

    name: str
    state: str = "empty"
    waiting: Waiting | None = None
    directory: Path = field(default_factory=Path)
    starts: int = 0
    failed: int = 0
    not_before: float = 0.0
    timer: asyncio.TimerHandle | None = None


class WarmSlots:
    """The warm slots of a node. `changed` hears that a start that waited for an answer may go on.

    `report(kind, detail)` gets what people may want to know.
    """

    def __init__(
        self,
        layout: Layout,
        output: Callable[[Path], Output],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        report: Callable[[str, str], None],
        changed: Callable[[], None],
    ) -> None:
        self._layout, self._output, self._spawn = layout, output, spawn
        self._report, self._changed = report, changed
        self._slots = [Slot(f"warm-{n}") for n in range(1, layout.settings.warm_slots + 1)]
        self._number = 0
        self._closed = False

    @property
    def pids(self) -> set[int]:
        return {s.waiting.child.pid for s in self._slots if s.waiting is not None}

    @property
    def status(self) -> tuple[ServiceStatus, ...]:
        words = {"empty": "stopped", "imports": "starting", "dying": "stopping"}
        whose = f"{self._layout.group}." if self._layout.group else ""
        return tuple(
            ServiceStatus(
                f"{whose}{s.name}",
                words.get(s.state, "ready"),
                s.waiting.child.pid if s.waiting is not None else 0,
                s.starts,
            )
            for s in self._slots
        )

    def keep(self) -> None:
        """Start what is missing. Call now and then on the main thread, while redundancy is full."""
        now = asyncio.get_running_loop().time()
        for slot in self._slots:
            if slot.state == "empty" and now >= slot.not_before and not self._closed:
                self._start(slot)

    def asking(self) -> bool:
        """True while one that seems ready was asked whether it is there, and may still answer."""
        states = {s.state for s in self._slots}
        if "here" in states:
            return False
        if "asked" in states:
            return True
        for slot in self._slots:
            if slot.state == "ready" and slot.waiting is not None:
                try:
                    slot.waiting.ask()
                except OSError:
                    self._give_up(slot, "it cannot be asked")
                    continue
                slot.state = "asked"
                slot.timer = asyncio.get_running_loop().call_later(ANSWER, self._late, slot)
                return True
        return False

    def take(self) -> tuple[Waiting, Path] | None:
        """One that has just answered, no longer ours, with its directory for temporary files; None without one."""
        for slot in self._slots:
            if slot.state == "here" and slot.waiting is not None:
                found = slot.waiting, slot.directory
                self._forget(slot)
                slot.state, slot.waiting = "empty", None
                return found
        return None

    def discard(self, waiting: Waiting, directory: Path) -> None:
        """End one that was taken and could not be used."""
        waiting.line.close()

        async def end() -> None:
            await self._end(waiting.child, directory)

        self._spawn(end())

    async def stop(self) -> None:
        """End all of them, for good."""
        self._closed = True
        for slot in self._slots:
            if slot.state != "dying" and slot.waiting is not None:
                self._forget(slot)
                slot.state = "dying"
                await self._bury(slot)

    # -- one slot ------------------------------------------------------------------------------------------------

    def _start(self, slot: Slot) -> None:
        loop, layout = asyncio.get_running_loop(), self._layout
        self._number += 1
        slot.directory = layout.node_dir.warm_scratch(self._number)
        # Long enough for the tag that takes its place, and no other group's of this node.
        tag = f"{layout.run}/warm/{layout.index:04d}{self._number:08d}/{layout.home.node_rank}"
        made = layout.warm_environment() | {"TMPDIR": str(slot.directory)}
        try:
            layout.node_dir.make_warm_scratch(self._number)
            output = self._output(layout.log(f"{slot.name}.log"))
            slot.waiting = Waiting.start(slot.name, layout.python, layout.engine.imports, made, tag, output)
        except OSError as exc:
            self._failed(slot, f"{slot.name} could not be started: {exc}")
            return
        slot.state, slot.starts = "imports", slot.starts + 1
        loop.add_reader(slot.waiting.child.pidfd, self._ended, slot)
        loop.add_reader(slot.waiting.line, self._heard, slot)

    def _heard(self, slot: Slot) -> None:
        assert slot.waiting is not None
        said = slot.waiting.heard()
        if not said:
            asyncio.get_running_loop().remove_reader(slot.waiting.line)  # its end is about to be seen
        elif "h" in said and slot.state == "asked":
            self._calm(slot)
            slot.state = "here"
            # Whoever wanted it may not want it any more; then it is asked again.
            slot.timer = asyncio.get_running_loop().call_later(ANSWER, self._not_taken, slot)
            self._changed()
        elif "r" in said and slot.state == "imports":
            slot.state, slot.failed = "ready", 0
            self._changed()

    def _late(self, slot: Slot) -> None:
        self._give_up(slot, f"it did not answer within {ANSWER:g} s")

    def _not_taken(self, slot: Slot) -> None:
        slot.state, slot.timer = "ready", None

    def _ended(self, slot: Slot) -> None:
        assert slot.waiting is not None
        how = str(slot.waiting.child.peek())
        if slot.state == "imports":
            how += " before everything was imported"
            self._failed(slot, "")
        self._give_up(slot, how)

    def _failed(self, slot: Slot, why: str) -> None:
        slot.failed += 1
        pause = min(AGAIN_MAX, AGAIN * 2 ** (slot.failed - 1))
        slot.not_before = asyncio.get_running_loop().time() + pause
        if why:
            self._report("warm_lost", f"{why}; another try in {pause:g} s")

    def _give_up(self, slot: Slot, why: str) -> None:
        assert slot.waiting is not None
        self._forget(slot)
        slot.state = "dying"
        self._report("warm_lost", f"{slot.name} (pid {slot.waiting.child.pid}): {why}; lives are started without it")
        self._spawn(self._bury(slot))
        self._changed()

    def _forget(self, slot: Slot) -> None:
        """Stop listening to its process."""
        assert slot.waiting is not None
        self._calm(slot)
        loop = asyncio.get_running_loop()
        loop.remove_reader(slot.waiting.child.pidfd)
        loop.remove_reader(slot.waiting.line)

    def _calm(self, slot: Slot) -> None:
        if slot.timer is not None:
            slot.timer.cancel()
            slot.timer = None

    async def _bury(self, slot: Slot) -> None:
        assert slot.waiting is not None
        slot.waiting.line.close()
        if await self._end(slot.waiting.child, slot.directory):
            slot.state, slot.waiting = "empty", None

    async def _end(self, child: Child, directory: Path) -> bool:
        """Kill one and prove it dead; False when it will not die."""
        loop = asyncio.get_running_loop()
        done = await loop.run_in_executor(None, fence.destroy, child.id, child.tag, (), FENCE_TIMEOUT)
        if not done.proved:
            self._report("warm_lost", f"{child.name}: {', '.join(done.names)} cannot be killed")
            return False
        child.reap()
        with contextlib.suppress(OSError):
            os.rmdir(directory)  # what else is in it goes with the run's directory
        return True
