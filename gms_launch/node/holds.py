"""Keeps the requests of a dead primary waiting until there is somebody to go to: the carrying out of `hold`.

`arm` takes a second descriptor of a new primary's listening socket, `ended` begins to hold with it. Nothing here is in
the way of a kill or of the fence: both return at once. When this process dies, the kernel closes what is held.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from gms_launch.cohort import hold
from gms_launch.cohort.hold import Act, Around
from gms_launch.node.desk import Desk
from gms_launch.node.reporter import Reporter
from gms_launch.numbers import numbered
from gms_launch.process import listener
from gms_launch.process.clients import Address, Client, Clients, plain
from gms_launch.process.listener import TakeError

log = logging.getLogger("agent")

Life = tuple[int, int]

#: Most connections that are taken out of the kernel's backlog, and most of our descriptors that they may be; more of
#: them wait in it.
KEPT, SHARE = 2048, 0.25
#: For how long a connection of a frontend that came back is kept before it is turned away again (seconds). It doubles
#: each time, since each time costs one of the frontend's tries: up to the second once it is seen to know the successor,
#: and anew from then on; else up to the third.
TURN_PAUSE, TURN_PAUSE_KNOWN, TURN_PAUSE_MAX = 0.01, 0.04, 1.0
#: For how much longer one is kept as long as nothing was asked over it (seconds). A frontend that finds five new
#: connections in a row gone before it could use them gives up the request that wanted one, and does not ask again.
UNASKED = 0.5
#: Longest pause between two looks at who has asked the successor (seconds); no event tells.
LOOK_MAX = 0.16
#: How often the registration of a dead engine is looked after while its requests wait (seconds).
KEEP_EVERY = 2.0
#: How long a dead process may take to let go of its port, where that is bound anew (seconds).
BIND_TRIES = 0.3


@dataclass
class _Held:
    """One dead primary's socket at work: `waiting` since when. `known` have asked the dead one, `seen` of these have
    asked the successor.
    """

    life: Life
    listening: socket.socket
    begun: float
    waiting: dict[socket.socket, float] = field(default_factory=dict)
    known: set[Client] = field(default_factory=set)
    seen: set[Client] = field(default_factory=set)
    whose: dict[Address, Client] = field(default_factory=dict)
    all_seen: float = 0.0
    turned_away: int = 0
    knocked: float = 0.0
    released: float | None = None
    ended: bool = False
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def take_in(self) -> None:
        """Take what waits out of the backlog, so that it is never full."""
        room = _room() - len(self.waiting)
        found, more = listener.accept_all(self.listening, room)
        self.waiting.update(dict.fromkeys(found, time.monotonic()))
        if more:
            asyncio.get_running_loop().remove_reader(self.listening)  # the rest stays in the backlog

    def knocks(self) -> None:
        """Somebody has come, while they are turned away."""
        self.take_in()
        self.news.set()

    def turn_away(self, may: Callable[[Client | None, float], bool] = lambda *_: True) -> set[Client | None]:
        """Close those who wait and `may` go; returns whose were closed.

        `may` is asked whose one is and since when it waits, later by `UNASKED` where nothing was asked over it.
        """
        self.take_in()
        gone = {}
        for connection, since in self.waiting.items():
            if may(whose := self.client(connection), since if listener.asked(connection) else since + UNASKED):
                gone[connection] = whose
        for connection in gone:
            del self.waiting[connection]
            connection.close()
        self.turned_away += len(gone)
        if gone:
            self.knocked = time.monotonic()
        return set(gone.values())

    def client(self, connection: socket.socket) -> Client | None:
        """Whose a connection is; None when it is not known (yet)."""
        try:
            host, port = connection.getpeername()[:2]
        except OSError:
            return None
        return self.whose.get((plain(host), port))

    def close(self) -> None:
        for connection in self.waiting:
            connection.close()
        self.listening.close()


class Holds:
    """All that is held on a node. `around` says how things stand for a dead life; `keep` lets the frontends go on
    knowing it, and `revoke` ends that.

    `desk` is where the run's frontend is asked.
    """

    def __init__(
        self,
        on: bool,
        report: Reporter,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        around: Callable[[Life], Around],
        keep: Callable[[Life], Awaitable[None]],
        revoke: Callable[[Life], Awaitable[None]],
        desk: Desk,
    ) -> None:
        self.on = on
        self._clients = Clients(desk.pid, desk.host)
        self._blind = False
        self._count_now = desk.moves
        self._moved: float | None = None
        self._report, self._spawn, self._around = report, spawn, around
        self._keep, self._revoke = keep, revoke
        self._armed: dict[Life, socket.socket] = {}
        self._where: dict[Life, tuple[str, int]] = {}
        self._held: dict[Life, _Held] = {}
        self._stopping = False

    def arm(self, life: Life, pgid: int, where: tuple[str, int]) -> None:
        """Be ready for the end of a life whose processes are in group `pgid` and that takes requests at `where`."""
        if self.on and not self._stopping and life not in self._where:
            self._where[life] = where
            self._spawn(self._take(life, pgid, where))

    async def _take(self, life: Life, pgid: int, where: tuple[str, int]) -> None:
        def take() -> socket.socket:
            return listener.take(listener.pids_of(pgid), where[1])

        try:
            found = await asyncio.get_running_loop().run_in_executor(None, take)
        except TakeError as exc:
            why = f"{exc}; when it dies its port is bound instead, and requests of that moment may fail"
            self._report.emit("hold_refused", *life, why)
            return
        if life in self._where and not self._stopping:
            self._armed[life] = found
            if not self._held:
                self._moved = (await self._count() or (None,))[0]
            self._report.emit("hold_armed", *life, f"{where[0]}:{where[1]}")
        else:
            found.close()  # it was quicker to die

    def ended(self, life: Life) -> None:
        """A life has ended: hold what it was sent, if it was sent anything, and in any case end its leases in time."""
        where, armed = self._where.pop(life, None), self._armed.pop(life, None)
        self._spawn(self._go_through(life, where, armed))

    def news(self) -> None:
        """Something has changed that holds are judged by."""
        for held in self._held.values():
            held.news.set()

    def stop(self) -> None:
        """The run is being stopped: nothing is held any more."""
        self._stopping = True
        for found in self._armed.values():
            found.close()
        self._armed, self._where = {}, {}
        self.news()

    async def _go_through(self, life: Life, where: tuple[str, int] | None, armed: socket.socket | None) -> None:
        begun = time.monotonic()
        judge = partial(self._judge, life, begun)
        if where is not None and (verdict := judge()).act is Act.CLOSE:
            self._report.emit("not_held", *life, verdict.why)
            where = None  # nobody will come
        if armed is None and where is not None:
            armed = await self._bind(where)
        if armed is None or where is None:
            if armed is not None:
                armed.close()
            await self._revoke(life)
            return
        held = self._held[life] = _Held(life, armed, begun)
        counting = asyncio.ensure_future(self._count())
        looking = asyncio.ensure_future(self._look(held))  # a dead process's connections can be seen for a moment
        standing = asyncio.ensure_future(self._keep_up(held))
        armed.setblocking(False)  # whose own that was does not mind any more
        try:
            self._report.emit("held", *life, f"connections to {where[0]}:{where[1]} wait")
            verdict = await self._wait(held, judge)
            while verdict.act is Act.TURN_AWAY:
                verdict = await self._turn_away(held, judge)
                if verdict.act is Act.HOLD:  # the successor has died in its turn
                    verdict = await self._wait(held, judge)
            await self._end_lease(held)
            if held.released is None:
                held.turn_away()
                count = held.turned_away
                self._report.emit("released", *life, f"given up: {verdict.why}", connections=count, moved=False)
            await self._tell(held, await counting)
        finally:
            counting.cancel()
            looking.cancel()
            standing.cancel()
            held.close()
            del self._held[life]

    async def _keep_up(self, held: _Held) -> None:
        """While requests wait, the frontends must know where: the dead engine renews nothing, and may have left."""
        while not held.ended:
            await self._keep(held.life)
            await asyncio.sleep(KEEP_EVERY)

    async def _end_lease(self, held: _Held) -> None:
        if not held.ended:
            held.ended = True
            await self._revoke(held.life)

    async def _count(self) -> tuple[float, float] | None:
        return await asyncio.get_running_loop().run_in_executor(None, self._count_now)

    async def _tell(self, held: _Held, before: tuple[float, float] | None) -> None:
        """Say what became of the requests, as far as the frontend knows; None where it does not, or was restarted."""
        now = await self._count()
        moved = None if now is None or self._moved is None or now[0] < self._moved else int(now[0] - self._moved)
        lost = None if now is None or before is None or now[1] < before[1] else int(now[1] - before[1])
        self._moved = None if now is None else now[0]
        text = (
            f"{numbered(held.turned_away, 'connection')} in all; moves: {_known(moved)}, requests lost: {_known(lost)}"
        )
        self._report.emit("hold_over", *held.life, text, connections=held.turned_away, moves=moved, lost=lost)

    def _judge(self, life: Life, begun: float, held: _Held | None = None, since: float = 0.0) -> hold.Verdict:
        around = replace(self._around(life), begun=begun, now=time.monotonic(), stopping=self._stopping)
        if held is not None:
            around = replace(around, successor_since=since, knocked=held.knocked, seen=held.all_seen)
        else:
            around = replace(around, successor_since=around.now)
        return hold.judge(around)

    async def _wait(self, held: _Held, judge: Callable[[], hold.Verdict]) -> hold.Verdict:
        """Hold until there is a successor, or there will be none."""
        loop = asyncio.get_running_loop()
        loop.add_reader(held.listening, held.take_in)
        try:
            while True:
                held.news.clear()
                verdict = judge()
                if verdict.act is not Act.HOLD:
                    return verdict
                left = None if verdict.look_at is None else max(0.0, verdict.look_at - time.monotonic())
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(held.news.wait(), left)
        finally:
            loop.remove_reader(held.listening)

    async def _turn_away(self, held: _Held, judge: Callable[..., hold.Verdict]) -> hold.Verdict:
        """Send everybody on, again and again until nobody comes back."""
        held.turn_away()
        count, since = held.turned_away, time.monotonic()
        if held.released is None:
            held.released = since
            took = since - held.begun
            text = f"{numbered(count, 'connection')} handed on after {took * 1000:.0f} ms"
            self._report.emit("released", *held.life, text, connections=count, seconds=round(took, 6), moved=True)
        turns: dict[tuple[Client | None, bool], int] = {}  # by who it is, and whether it knows the successor

        def may(client: Client | None, since: float) -> bool:
            """It has waited for long enough."""
            known = client in held.seen
            pause = TURN_PAUSE * 2.0 ** turns.get((client, known), 0)
            return time.monotonic() >= since + min(pause, TURN_PAUSE_KNOWN if known else TURN_PAUSE_MAX)

        held.all_seen = 0.0
        loop, step = asyncio.get_running_loop(), TURN_PAUSE
        loop.add_reader(held.listening, held.knocks)
        try:
            while True:
                held.news.clear()
                await self._look(held)
                gone = {(client, client in held.seen) for client in held.turn_away(may)}
                turns.update({which: turns.get(which, 0) + 1 for which in gone})
                step = TURN_PAUSE if gone or held.waiting else min(2 * step, LOOK_MAX)
                verdict = judge(held=held, since=since)
                if verdict.forget:
                    await self._end_lease(held)
                if verdict.act is not Act.TURN_AWAY:
                    return verdict
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(held.news.wait(), step)
        finally:
            loop.remove_reader(held.listening)

    async def _look(self, held: _Held) -> None:
        """See who has asked the dead one, and who of them has asked its successor."""
        port = held.listening.getsockname()[1]
        successors = [where[1] for where in self._where.values()]

        def look() -> tuple[dict[Address, Client], set[Client], Client | None]:
            here, *there = self._clients.of(port, *successors)
            return here, {client for one in there for client in one.values()}, self._clients.own()

        try:
            here, there, own = await asyncio.get_running_loop().run_in_executor(None, look)
        except OSError as exc:
            if not self._blind:  # once: it is looked many times a second
                log.warning("it cannot be seen who is connected to port %d: %s", port, exc)
            self._blind = True
            return
        self._blind = False
        held.whose = here
        held.known |= {*here.values(), *([own] if own is not None else [])}
        held.known = {client for client in held.known if client.alive}
        held.seen = held.known & there
        if held.all_seen == 0.0 and successors and held.seen == held.known:
            held.all_seen = time.monotonic()

    async def _bind(self, where: tuple[str, int]) -> socket.socket | None:
        """Listen where the dead one did, as soon as it lets go of its port; None if it does not."""
        deadline = time.monotonic() + BIND_TRIES
        while time.monotonic() < deadline:
            try:
                return listener.bind(*where)
            except OSError:
                await asyncio.sleep(0.002)
        log.warning("port %d of a dead engine could not be bound within %g s", where[1], BIND_TRIES)
        return None


def _room() -> int:
    """How many connections may be kept."""
    return min(KEPT, int(SHARE * resource.getrlimit(resource.RLIMIT_NOFILE)[0]))


def _known(count: int | None) -> str:
    return "not known" if count is None else str(count)
