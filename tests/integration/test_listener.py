"""A socket that outlives its owner: real processes, real connections, no engine."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from gms_launch.cohort.hold import Around
from gms_launch.node import holds
from gms_launch.node.holds import Holds
from gms_launch.process import listener, proc
from tests.support import eventually

LISTEN = """
import os, socket, sys
s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("127.0.0.1", 0)); s.listen(int(sys.argv[1])); s.setblocking(False)
print(s.getsockname()[1], flush=True)
sys.stdin.read()
"""
#: The group's leader starts another process, and that one listens.
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {LISTEN!r}, sys.argv[1]])"


class Nobody:
    """A frontend that is not there."""

    def host(self) -> str:
        return ""

    def pid(self) -> int:
        return 0

    def moves(self) -> None:
        return None


class Owner:
    """A process that leads a group in which somebody listens."""

    def __init__(self, program: str, backlog: int = 64) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(backlog)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def take(self) -> socket.socket:
        return listener.take(listener.pids_of(self.process.pid), self.port)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        eventually(lambda: all(i.dead for i in proc.group(self.process.pid)), what="its child is gone, too")


@pytest.fixture(params=[LISTEN, PARENT], ids=["leader", "child"])
def owner(request: pytest.FixtureRequest) -> Iterator[Owner]:
    made = Owner(request.param)
    yield made
    made.kill()


def closed(connection: socket.socket) -> bool:
    """True once the other side has closed it."""
    if not select.select([connection], [], [], 60)[0]:
        return False
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_nobody_is_refused_when_the_owner_dies(owner: Owner) -> None:
    with owner.take() as taken:
        assert fcntl.fcntl(taken.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert taken.fileno() >= 3 and not os.get_inheritable(taken.fileno())
        owner.kill()
        with socket.create_connection(("127.0.0.1", owner.port), 60) as waiting:
            assert not select.select([waiting], [], [], 0.05)[0], "it waits"
            ((got,), more) = eventually(lambda: found if (found := listener.accept_all(taken, 10))[0] else None)
            assert not more
            got.close()
            assert closed(waiting)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", owner.port), 60)


def test_a_port_on_which_nobody_of_the_group_listens_is_not_taken(owner: Owner) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(listener.TakeError, match="listens on port"):
            listener.take(listener.pids_of(owner.process.pid), other.getsockname()[1])


def test_a_dead_owners_port_can_be_bound_and_a_living_ones_not(owner: Owner) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
        listener.bind("127.0.0.1", owner.port)
    owner.kill()
    with listener.bind("127.0.0.1", owner.port), socket.create_connection(("127.0.0.1", owner.port), 60):
        pass


def test_doctors_question_has_an_answer_here() -> None:
    assert listener.refused() == ""


class Stage:
    """A hold on a real socket, with what it is judged by in our hand."""

    def __init__(self) -> None:
        self.around = Around(0.0, 0.0, candidate=True)
        self.events: list[tuple[str, str]] = []
        self.kept: list[tuple[int, int]] = []
        self.revoked: list[tuple[int, int]] = []
        self.tasks: list[asyncio.Task[None]] = []

    def emit(self, kind: str, cohort_id: int, incarnation: int, detail: str = "", **data: Any) -> None:
        self.events.append((kind, detail))

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(work))

    async def keep(self, life: tuple[int, int]) -> None:
        self.kept.append(life)

    async def revoke(self, life: tuple[int, int]) -> None:
        self.revoked.append(life)

    def make(self) -> Holds:
        return Holds(True, self, self.spawn, lambda _: self.around, self.keep, self.revoke, Nobody())  # type: ignore[arg-type]

    async def hold(self, owner: Owner) -> Holds:
        """Life 0.1 takes requests where `owner` listened, and has died."""
        made = self.make()
        made.arm((0, 1), owner.process.pid, ("127.0.0.1", owner.port))
        await self.until(lambda: self.kinds() == ["hold_armed"])
        owner.kill()
        made.ended((0, 1))
        return made

    async def until(self, look: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not look():
            assert time.monotonic() < deadline, self.events
            await asyncio.sleep(0.005)

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """As a frontend: the request is sent at once. By that alone one notices that a full backlog forgot about it."""
    reader, writer = await asyncio.wait_for(asyncio.open_connection("127.0.0.1", port), 60)
    writer.write(b"a request")
    return reader, writer


async def ends(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionResetError):
        # What a full backlog forgot about comes in when its request is sent again, after 1, 3, 7, 15 s.
        assert await asyncio.wait_for(reader.read(1), 60) == b""


def test_more_than_a_backlog_waits_and_all_are_sent_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holds, "KEPT", 100)
    owner, heir = Owner(LISTEN, backlog=32), Owner(LISTEN)

    async def play() -> None:
        stage = Stage()
        made = await stage.hold(owner)
        waiting = await asyncio.gather(*(connect(owner.port) for _ in range(100)))
        waiting += [await connect(owner.port) for _ in range(5)]  # in the backlog: there is room for them again
        await stage.until(lambda: stage.kinds() == ["hold_armed", "held"] and bool(stage.kept))
        assert not stage.revoked
        assert set(stage.kept) == {(0, 1)}, "the frontends know it as long as somebody waits"
        stage.around = Around(0.0, 0.0, candidate=True, successor=True)
        made.news()
        await stage.until(lambda: "released" in stage.kinds())
        late = await connect(owner.port)  # a frontend that has not heard of the successor
        await asyncio.gather(*(ends(reader) for reader, _ in [late, *waiting]))
        made.arm((1, 1), heir.process.pid, ("127.0.0.1", heir.port))
        for _ in range(3):
            again = await connect(owner.port)
            await ends(again[0])
            assert not stage.revoked, "it has not asked the successor"
        there = await connect(heir.port)
        await stage.until(lambda: stage.revoked == [(0, 1)])
        await stage.until(lambda: "hold_over" in stage.kinds())
        assert [k for k in stage.kinds() if k != "hold_armed"] == ["held", "released", "hold_over"]
        there[1].close()
        made.stop()
        heir.kill()
        with pytest.raises(ConnectionRefusedError):
            await connect(owner.port)

    asyncio.run(play())


def test_a_connection_that_nothing_was_asked_over_is_not_closed_before_those_that_ask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A frontend that gets no processor finds it gone when it would use it, and has few to try."""
    monkeypatch.setattr(holds, "UNASKED", 600.0)
    owner = Owner(LISTEN)

    async def play() -> None:
        stage = Stage()
        made = await stage.hold(owner)
        stage.around = Around(0.0, 0.0, candidate=True, successor=True)
        made.news()
        await stage.until(lambda: "released" in stage.kinds())
        silent = await asyncio.open_connection("127.0.0.1", owner.port)
        for _ in range(4):
            await ends((await connect(owner.port))[0])
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(silent[0].read(1), 0.05)
        silent[1].write(b"a request")
        await ends(silent[0])
        made.stop()

    asyncio.run(play())


def test_what_is_held_goes_when_nobody_can_come_any_more_and_when_the_run_stops() -> None:
    async def play(end: Callable[[Stage, Holds], None]) -> Stage:
        owner, stage = Owner(LISTEN), Stage()
        made = stage.make()
        made.arm((0, 1), owner.process.pid, ("127.0.0.1", owner.port))
        await stage.until(lambda: stage.kinds() == ["hold_armed"])
        owner.kill()
        made.ended((0, 1))
        reader, _ = await connect(owner.port)
        end(stage, made)
        await ends(reader)
        await asyncio.gather(*stage.tasks)
        return stage

    def nobody(stage: Stage, made: Holds) -> None:
        stage.around = Around(0.0, 0.0)
        made.news()

    given_up = asyncio.run(play(nobody))
    assert given_up.revoked and "given up: no shadow is parked" in dict(given_up.events)["released"]
    stopped = asyncio.run(play(lambda _, made: made.stop()))
    assert "the run is being stopped" in dict(stopped.events)["released"]
