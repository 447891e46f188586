"""Which connections of its frontend's an agent ends, and when."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gms_launch.cohort.dark import DarkRecord
from gms_launch.cohort.records import NodeRecord
from gms_launch.control.keys import Keys
from gms_launch.errors import LaunchError, NoContactError
from gms_launch.node.severing import Severing

LOST = DarkRecord("node3", "10.0.0.3", (7,), 2, "b")
KEYS = Keys("r")


class Agent:
    """An agent with a frontend, as far as that goes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, heard: float) -> None:
        self.mirror = SimpleNamespace(dark={}, keys=KEYS)
        home = SimpleNamespace(address="10.0.0.2", leader_address="10.0.0.1")
        self.layout = SimpleNamespace(home=home, number_of_groups=2)
        self.loop = asyncio.get_running_loop()
        self.alone = False
        self.groups = [SimpleNamespace(leaderless=lambda now: self.alone)]
        self.pid = 1
        self.near = SimpleNamespace(pid=lambda: self.pid)
        self.events: list[tuple[str, str, str]] = []
        self.store: dict[str, bytes] | None = {}
        self.report = SimpleNamespace(
            emit=lambda kind, detail, group: self.events.append((kind, detail, group)),
            link=SimpleNamespace(get=self._get),
        )
        self.severed: list[tuple[float, str]] = []
        self.refused = ""
        self.tasks: list[asyncio.Task[None]] = []
        self.spawn = lambda work: self.tasks.append(asyncio.create_task(work))
        self.severing = Severing(cast(Any, self))
        monkeypatch.setattr("gms_launch.node.severing.HEARD", heard)
        monkeypatch.setattr("gms_launch.process.listener.sever", self._sever)

    def _get(self, key: str) -> bytes | None:
        if self.store is None:
            raise NoContactError("away")
        return self.store.get(key)

    def _sever(self, pid: int, host: str) -> int:
        assert pid == 1
        if self.refused:
            raise LaunchError(self.refused)
        self.severed.append((time.monotonic(), host))
        return 2

    async def looks(self, **dark: DarkRecord) -> list[str]:
        """To which hosts it ends connections, when it looks and the leader has said that."""
        before = len(self.severed)
        self.mirror.dark = dark
        self.severing.look()
        await asyncio.gather(*self.tasks)
        return [host for _, host in self.severed[before:]]


def test_once_for_each_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        me = Agent(monkeypatch, 0.0)
        assert await me.looks() == []
        assert await me.looks(b=LOST) == ["10.0.0.3"]
        assert me.events == [("severed", "2 connections of the frontend with node3 (10.0.0.3)", "b")]
        assert await me.looks(b=LOST) == [], "it is done"
        assert await me.looks(b=LOST, c=DarkRecord("node4", "10.0.0.4", (8,))) == ["10.0.0.4"]
        assert await me.looks() == [], "it is back"
        assert await me.looks(b=LOST) == ["10.0.0.3"], "and lost again"
        assert await me.looks(b=DarkRecord("node3", "10.0.0.3", (9,), 2, "b")) == ["10.0.0.3"], (
            "an engine more had ended"
        )
        assert await me.looks(b=DarkRecord("node2", "10.0.0.2", (9,))) == [], "on this very node"
        me.pid = 0
        assert await me.looks(b=LOST) == [], "there is no frontend here"

    asyncio.run(scene())


def test_the_frontend_hears_that_an_engine_is_gone_before_it_loses_the_way_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else it asks there again, over a connection that nobody takes."""

    async def scene() -> None:
        me = Agent(monkeypatch, 0.2)
        begun = time.monotonic()
        assert await me.looks(b=LOST) == ["10.0.0.3"]
        assert me.severed[0][0] - begun >= 0.2

    asyncio.run(scene())


def test_nothing_is_ended_of_a_node_that_is_back_by_then(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        me = Agent(monkeypatch, 0.05)
        me.mirror.dark = {"b": LOST}
        me.severing.look()
        assert await me.looks() == [] and not me.events

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("there", "ended"), [("10.0.0.3", []), ("10.0.0.9", ["10.0.0.3"]), ("", ["10.0.0.3"]), (None, ["10.0.0.3"])]
)
def test_nothing_is_ended_of_a_node_that_is_back_though_nobody_has_said_so_yet(
    monkeypatch: pytest.MonkeyPatch, there: str | None, ended: list[str]
) -> None:
    """The leader's word may be late, and the node's connections are new ones: etcd is asked who has that node rank."""

    async def scene() -> None:
        me = Agent(monkeypatch, 0.0)
        me.store = {KEYS.node(2): NodeRecord(2, "node3", there, "", 9, 9).encode()} if there else {}
        if there is None:
            me.store = None
        assert await me.looks(b=LOST) == ended

    asyncio.run(scene())


def test_what_cannot_be_ended_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        me = Agent(monkeypatch, 0.0)
        me.refused = "pidfd_getfd: no"
        assert await me.looks(b=LOST) == []
        assert me.events == [("not_severed", "pidfd_getfd: no; answers that node3 was giving hang", "b")]

    asyncio.run(scene())


def test_of_one_engine_alone_the_loss_of_its_leader_is_seen_by_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        me = Agent(monkeypatch, 0.0)
        me.alone = True
        assert await me.looks() == [], "of a group the run's leader tells"
        me.layout.number_of_groups = 0
        assert await me.looks() == ["10.0.0.1"] and me.events[0][::2] == ("severed", "")
        assert await me.looks() == []
        me.alone = False
        assert await me.looks() == []
        me.alone = True
        assert await me.looks() == ["10.0.0.1"], "lost again"

    asyncio.run(scene())
