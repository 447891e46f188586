"""An agent and its guard: starts it, follows it, and starts another when it ends before us.

A guard that was killed protects nobody: until the next one runs, nothing kills what our own death would leave, and
nobody stands in for us. Each is given all that the first one had. What a guard does is in `process.guard`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence

from gms_launch.cohort.records import ServiceStatus
from gms_launch.node.gates import Gates
from gms_launch.node.herald import Herald
from gms_launch.process import guard, lifecycle, proc
from gms_launch.process.proc import ProcessId
from gms_launch.run.plan import Layout

#: One that lived for less than this is followed by the next after a pause that long (seconds).
AGAIN = 1.0


class Guarded:
    """The guard of this node. `changed(what)` hears in words that one has ended, or that there is a new one."""

    def __init__(
        self, layout: Layout, gates: Sequence[Gates], herald: Herald, changed: Callable[[str, str], None]
    ) -> None:
        self._layout, self._gates, self._herald, self._changed = layout, gates, herald, changed
        self._pipe = self._pidfd = -1
        self._told: set[ProcessId] = set()
        self._dismissed = False
        self._started = 0.0
        self._starts = 0
        self.pid = 0

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Shut the gates and start the first one. Raises `LaunchError`."""
        self._loop = loop
        for gates in self._gates:
            gates.take()
        self._start()

    @property
    def status(self) -> ServiceStatus:
        return ServiceStatus("guard", "ready" if self.pid else "restarting", self.pid, self._starts)

    def tell(self, untagged: Sequence[ProcessId]) -> None:
        """What only descent shows as ours; every guard has all that was ever on the list."""
        if len(self._told) > 100 * guard.LINES:
            self._told = {who for who in self._told if proc.alive(who)}
        self._told |= set(untagged)
        if self.pid:
            with contextlib.suppress(BrokenPipeError):  # it has ended, and we are about to see that
                guard.tell(self._pipe, untagged)

    async def dismiss(self) -> None:
        """End it as our own end would: it looks once more and goes."""
        self._dismissed = True
        pid = self.pid
        self._let_go()
        self._herald.close()
        if pid:
            with contextlib.suppress(ChildProcessError):
                await self._loop.run_in_executor(None, os.waitpid, pid, 0)

    def _start(self) -> None:
        node_rank = self._layout.topology.node_rank
        log = self._layout.run_dir.logs / f"guard-node{node_rank}.log"
        deputy = self._herald.open()
        try:
            self.pid, self._pipe = guard.start(
                self._layout.run,
                node_rank,
                log,
                [fd for g in self._gates for fd in g.descriptors],
                self._layout.node_dir.gms,
                deputy,
            )
        finally:
            self._herald.attach(self._loop)
        self._starts += 1
        self._started = self._loop.time()
        self._pidfd = os.pidfd_open(self.pid)  # ours, and not reaped: the number cannot mean another
        self._loop.add_reader(self._pidfd, self._ended)

    def _ended(self) -> None:
        pid = self.pid
        self._let_go()
        try:
            how = str(lifecycle.Exit.from_wait(os.waitpid(pid, 0)[1]))
        except ChildProcessError:
            how = "it is gone"
        lifecycle.CHILDREN.reaped(pid)
        self._changed("guard_exited", f"{how} (pid {pid}); a new one is started")
        if self._loop.time() - self._started >= AGAIN:
            self._again()
        else:
            self._loop.call_later(AGAIN, self._again)

    def _again(self) -> None:
        if self._dismissed or self.pid:
            return
        try:
            self._start()
        except OSError as exc:
            self._changed("guard_missing", f"a new one cannot be started: {exc.strerror}; another try in {AGAIN:g} s")
            self._loop.call_later(AGAIN, self._again)
            return
        self.tell([who for who in self._told if proc.alive(who)])
        self._changed("guard_started", f"pid {self.pid}")

    def _let_go(self) -> None:
        if not self.pid:
            return
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        os.close(self._pipe)
        self.pid = 0
