"""Bring a service to life: start it, wait until it is ready, start it again when it dies.

Runs on the agent's event loop; probes run in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from typing import Any

from gms_launch.cohort.records import ServiceStatus
from gms_launch.errors import LaunchError
from gms_launch.process import lifecycle, listener, proc
from gms_launch.process.lifecycle import Child, Command
from gms_launch.services.base import (
    BUSY,
    ESSENTIAL_MAX,
    LISTENS,
    LOOP,
    RESTART_MAX,
    SHARE,
    STABLE_AFTER,
    NotReadyError,
    Service,
    StuckError,
    last_words,
    restart_delay,
)
from gms_launch.services.crowd import Crowd
from gms_launch.spool.output import Output

log = logging.getLogger("agent")


class ServiceError(LaunchError):
    """A service did not become ready; the message ends with its log."""


class ServiceRunner:
    """One service of this node. `on_change(event, detail)` is told: ready, exited, restarted, failed; looping, when it
    ends again and again soon after its start, and steady, when it no longer does; crowded, when connections of other
    users were ended. `output` makes what it prints to, by the log's name.

    Only an essential one fails for good: when it cannot be brought back within its own timeout.
    """

    def __init__(
        self,
        service: Service,
        tag: str,
        node_rank: int,
        output: Callable[[str], Output],
        on_change: Callable[[ServiceRunner, str, str], None],
    ) -> None:
        self.service = service
        self.state = "starting"
        self.detail = ""
        self.starts = 0
        self._loop = ""
        self._crowd = Crowd(service.name, service.private)
        self._tag, self._node_rank, self._open, self._on_change = tag, node_rank, output, on_change
        self._child: Child | None = None
        self._exited = asyncio.Event()
        self._listener: socket.socket | None = None
        self._stopping = False
        self._keeper: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        return self._child.pid if self._child and not self._exited.is_set() else 0

    @property
    def serves(self) -> bool:
        """Whether it is ready and has not ended since, as the kernel has it now: then its port is its own."""
        return self.state == "ready" and self._child is not None and proc.alive(self._child.id)

    def status(self) -> ServiceStatus:
        return ServiceStatus(self.service.name, self.state, self.pid, self.starts, self.detail)

    async def start(self) -> None:
        """Start it and wait until it is ready. Raises `ServiceError`; what was started is then dead again."""
        self._spawn()
        try:
            await self._wait_ready()
        except ServiceError as exc:
            self.state, self.detail = "failed", str(exc).splitlines()[0]
            await self.stop()
            raise
        self._became("ready")
        self._begin_to_keep()

    def _begin_to_keep(self) -> None:
        if not self._stopping:
            self._keeper = asyncio.get_running_loop().create_task(self._keep())
            self._keeper.add_done_callback(self._kept)

    def _kept(self, keeper: asyncio.Task[None]) -> None:
        """A keeper that ends in an error of ours is followed by another: the service must not be left alone."""
        if not keeper.cancelled() and (error := keeper.exception()) is not None:
            log.error("keeping %s", self.service.name, exc_info=error)
            asyncio.get_running_loop().call_later(RESTART_MAX, self._begin_to_keep)

    def _spawn(self) -> None:
        self.starts += 1
        tag = f"{self._tag}/{self.starts}/{self._node_rank}"
        try:
            command, fds = self._listens(self.service.command)
            output = self._open(f"{self.service.name}.{self.starts}.log")
            child = lifecycle.spawn(self.service.name, command, tag, output, fds)
        except OSError as exc:
            raise ServiceError(f"{self.service.name} could not be started: {exc}{self._squatter()}") from None
        self._child, self._exited = child, asyncio.Event()
        loop = asyncio.get_running_loop()
        exited = self._exited

        def ended() -> None:
            loop.remove_reader(child.pidfd)
            lifecycle.kill_group(child.id)
            child.reap()
            exited.set()

        loop.add_reader(child.pidfd, ended)

    def _listens(self, command: Command) -> tuple[Command, tuple[int, ...]]:
        """What to run, and the descriptors that it is given. Raises `OSError`."""
        if self.service.binds is None:
            return command, ()
        if self._listener is None:
            self._listener = listener.bind(*self.service.binds)
        number = self._listener.fileno()
        return Command(command.argv, {**command.env, LISTENS: str(number)}), (number,)

    async def _wait_ready(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.service.timeout
        exited = loop.create_task(self._exited.wait())
        try:
            while True:
                assert self._child is not None
                probe = asyncio.ensure_future(asyncio.to_thread(self._ask, self._child.pid))
                waiting: set[asyncio.Future[Any]] = {probe, exited}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if self._exited.is_set():
                    raise self._error(f"ended while it was starting ({self._child.exit}){self._squatter()}")
                if (reason := await probe) is None:
                    return
                if loop.time() > deadline:
                    raise self._error(f"was not ready within {self.service.timeout:g} s ({reason})")
                # Readiness of another process can only be asked for.
                await asyncio.wait({exited}, timeout=0.02)
        finally:
            exited.cancel()

    def _ask(self, pid: int) -> str | None:
        """Why it is not ready; None when it is. Before it listens itself nobody is asked, or shown a password."""
        port = self.service.port
        if port is not None and not proc.listens(pid, port):
            return f"it does not listen on port {port} yet"
        failure = _failure(self.service.probe)
        return None if failure is None else str(failure)

    def _squatter(self) -> str:
        """Whoever has taken one of its ports meanwhile, for people: what is sent there goes to him now."""
        for port in dict.fromkeys((self.service.port, *self.service.private)) if self._listener is None else ():
            if port is not None and (uid := proc.who_listens(port)) is not None:
                return f"; a process of uid {uid} listens on port {port}"
        return ""

    def _error(self, text: str) -> ServiceError:
        command = " ".join(self.service.command.argv)
        assert self._child is not None
        output = self._child.output
        said = last_words(output)
        return ServiceError(f"{self.service.name} {text}\n  command: {command}\n  log: {output.path}\n{said}")

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            since = loop.time()
            silent = await self._ended_or_silent()
            if self._stopping:
                return
            assert self._child is not None
            self._became("exited", silent or str(self._child.exit))
            if not self.service.restart:
                self.state = "failed"
                return
            failures = 1 if loop.time() - since > STABLE_AFTER else failures + 1
            gone = loop.time()
            while True:
                await self._pause(failures)
                try:
                    self._spawn()
                    await self._wait_ready()
                    break
                except ServiceError as exc:
                    self.detail = str(exc).splitlines()[0]
                    await self._kill()
                    failures += 1
                    if self.service.essential and loop.time() - gone > self.service.timeout:
                        self.state = "failed"
                        self._on_change(self, "failed", str(exc))
                        return
            self._became("restarted", f"start {self.starts}")

    async def _pause(self, ends: int) -> None:
        """Wait before the next start, the longer the more often it has ended in a row; a loop is told."""
        delay = restart_delay(ends, ESSENTIAL_MAX if self.service.essential else RESTART_MAX)
        self.state = "restarting"
        if ends >= LOOP:
            self._loop = f"ended {ends} times in a row, each time within {STABLE_AFTER:g} s of its start"
            why = f" ({self.detail})" if self.detail else ""
            self.detail = f"{self._loop}; the next start after a pause of {delay:g} s{why}"
            self._on_change(self, "looping", self.detail)
        await asyncio.sleep(delay)

    async def _ended_or_silent(self) -> str:
        """Wait for its end, or bring it about when it does not answer any more; why, in that case."""
        liveness, loop = self.service.liveness, asyncio.get_running_loop()
        begun = good = loop.time()
        looked, worked, took = begun, 0.0, 0.0
        exited = loop.create_task(self._exited.wait())
        try:
            while True:
                pause = max(0.0, liveness / 3 - took)
                await asyncio.wait({exited}, timeout=pause if liveness else STABLE_AFTER if self._loop else None)
                if self._exited.is_set():
                    return ""
                if self._loop and loop.time() - begun >= STABLE_AFTER:
                    self._loop = ""
                    self._became("steady")
                if not liveness:
                    continue
                if crowd := await asyncio.to_thread(self._crowd.look, self.pid):
                    self._on_change(self, "crowded", crowd)
                asked = loop.time()
                failure = await asyncio.to_thread(_failure, self.service.alive or self.service.probe)
                before, looked, took = looked, loop.time(), loop.time() - asked
                earlier, worked = worked, await asyncio.to_thread(proc.worked, self.pid)
                if failure is None or self._exited.is_set():
                    good = looked
                    continue
                busy = self.service.bears_load and worked - earlier > SHARE * (looked - before)
                patience = BUSY * liveness if busy and not isinstance(failure, StuckError) else liveness
                if looked - good >= patience:
                    await self._kill()
                    return f"killed: no answer for {patience:g} s ({failure})"
        finally:
            exited.cancel()

    def let_go(self) -> None:
        """Do not start it again when it ends."""
        self._stopping = True
        if self._keeper is not None:
            self._keeper.cancel()

    async def renew(self) -> None:
        """End it and start it anew. Raises `ServiceError`."""
        await self._end()
        self._stopping = False
        await self.start()

    def _became(self, event: str, detail: str = "") -> None:
        self.state = "restarting" if event == "exited" else "ready"
        self.detail = detail if event == "exited" else self._loop
        self._on_change(self, event, detail)

    async def _kill(self) -> None:
        if self._child is not None and not self._exited.is_set():
            lifecycle.kill_group(self._child.id)
            await self._exited.wait()

    async def stop(self, grace: float = 3.0) -> None:
        """End it: SIGTERM, and SIGKILL after `grace` seconds."""
        await self._end(grace)
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def _end(self, grace: float = 3.0) -> None:
        self.let_go()
        if self._child is None or self._exited.is_set():
            return
        lifecycle.kill_group(self._child.id, signal.SIGTERM)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._exited.wait(), grace)
        await self._kill()
        self.state = "stopped"


def _failure(probe: Callable[[], object]) -> NotReadyError | None:
    try:
        probe()
    except NotReadyError as exc:
        return exc
    return None
