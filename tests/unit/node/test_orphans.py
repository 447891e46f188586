"""What the run's leader writes of a group whose leading node stays away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from types import SimpleNamespace
from typing import Any, Protocol, cast

import pytest

from gms_launch.cohort.dark import DarkRecord
from gms_launch.cohort.records import NodeRecord, RunRecord
from gms_launch.control.keys import Keys
from gms_launch.errors import NoContactError
from gms_launch.node.losses import Losses
from gms_launch.node.orphans import Orphans
from tests.support import PATIENCE

KEYS = Keys("r")
GROUP = RunRecord("r", "", "", "", 0.0, redundancy="full", leader=2)


class Looks(Protocol):
    """A part of the run's leader that looks at its groups."""

    def look(self, groups: Mapping[str, RunRecord]) -> None: ...


class Leader:
    """The run's leader, as far as that goes. `answers` are what comes of its writes, one after another."""

    node_rank = 0

    def __init__(self, *answers: bool | Exception) -> None:
        self.loop = asyncio.get_running_loop()
        self.mirror = SimpleNamespace(nodes={}, keys=KEYS, dark={})
        self.settings = SimpleNamespace(node_wait=0.05, dynamo_lease_ttl=20.0)
        self.dead_agents: dict[int, int] = {}
        self.ready, self.wake = asyncio.Event(), asyncio.Event()
        self.ready.set()
        self.written: list[tuple[Mapping[str, Any], Mapping[str, bytes]]] = []
        self.events: list[tuple[str, str]] = []
        self._answers = list(answers)
        self.report = SimpleNamespace(
            seen={2: NodeRecord(2, "node3", "10.0.0.3", "", 1, 1)},
            link=SimpleNamespace(write_if=self._write, revoke=self._revoke),
            emit=lambda kind, detail, group: self.events.append((kind, group)),
            say=self._say,
            unsay=self._unsay,
        )
        self.tasks: list[asyncio.Task[Any]] = []
        self.layout = SimpleNamespace(run="r")
        self.ended: list[int] = []
        self.unsaid: list[str] = []

    def _revoke(self, lease: int) -> bool:
        self.ended.append(lease)
        return True

    def _say(self, key: str, value: bytes) -> None:
        """Heard from etcd at once."""
        assert key.startswith(KEYS.dark)
        self.mirror.dark[key.removeprefix(KEYS.dark)] = DarkRecord.decode(value)

    def _unsay(self, key: str) -> None:
        self.unsaid.append(key)

    def _write(self, conditions: Mapping[str, Any], records: Mapping[str, bytes]) -> bool:
        self.written.append((conditions, records))
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def progress(self, text: str) -> None:
        pass

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        self.tasks.append(self.loop.create_task(work))

    async def looks(
        self,
        part: Looks,
        groups: Mapping[str, RunRecord],
        seconds: float,
        come: Callable[[], bool] = lambda: True,
    ) -> None:
        """Look again and again for so long, and on until what is waited for has `come`."""
        begun = self.loop.time()
        while (took := self.loop.time() - begun) < seconds or (took < PATIENCE and not come()):
            part.look(groups)
            await asyncio.sleep(0.01)
        await asyncio.gather(*self.tasks)


class Both:
    """In the order in which an agent has them look."""

    def __init__(self, me: Leader) -> None:
        losses = Losses(cast(Any, me))
        self._parts = (losses, Orphans(cast(Any, me), losses))

    def look(self, groups: Mapping[str, RunRecord]) -> None:
        for part in self._parts:
            part.look(groups)


def test_it_is_over_when_node_wait_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gms_launch.node.orphans.AGAIN", 0.05)

    async def scene() -> None:
        me = Leader(NoContactError("away"), False, True)
        orphans = Both(me)
        orphans.look({"b": GROUP})
        assert not me.tasks, "it may come back"
        await me.looks(orphans, {"b": GROUP}, 0.6, lambda: len(me.written) >= 3)
        assert len(me.written) == 3, "until it is written"
        assert [e for e in me.events if e[0] == "group_over"] == [("group_over", "b")], "once"
        conditions, records = me.written[-1]
        assert conditions == {KEYS.node(2): None, f"{KEYS.groups}b": GROUP.encode()}
        said = RunRecord.decode(records[f"{KEYS.groups}b"])
        assert said.failed == "node 2 (node3), which leads it, was lost and did not come back within 0.05 s (node_wait)"
        assert (said.exit_code, said.redundancy) == (4, "down")

    asyncio.run(scene())


def test_it_is_tried_again_whatever_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gms_launch.node.orphans.AGAIN", 0.05)

    async def scene() -> None:
        me = Leader(ValueError("etcd said something odd"), True)
        with pytest.raises(ValueError, match="odd"):
            await me.looks(Both(me), {"b": GROUP}, 0.6)
        assert len(me.written) == 2
        assert [e for e in me.events if e[0] == "group_over"] == [("group_over", "b")]

    asyncio.run(scene())


@pytest.mark.parametrize("why", ["back", "not up yet", "over"])
def test_nothing_is_written(why: str) -> None:
    async def scene() -> None:
        me, group = Leader(), GROUP
        if why == "back":
            me.mirror.nodes[2] = me.report.seen[2]
        elif why == "over":
            group = RunRecord("r", "", "", "", 0.0, failed="why", leader=2)
        else:
            me.ready.clear()
        await me.looks(Both(me), {"b": group}, 0.2)
        assert not me.written

    asyncio.run(scene())


def test_that_nobody_serves_there_is_told_once_for_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gms_launch.cohort.controller.NODE_GRACE", 0.05)

    async def scene() -> None:
        me = Leader()
        me.settings.node_wait = 60.0
        orphans = Both(me)
        orphans.look({"b": GROUP})
        assert not me.events, "not yet"
        await me.looks(orphans, {"b": GROUP}, 0.2, lambda: bool(me.events))
        assert me.events == [("redundancy", "b")]
        me.mirror.nodes[2] = me.report.seen[2]
        await me.looks(orphans, {"b": GROUP}, 0.1)
        del me.mirror.nodes[2]
        await me.looks(orphans, {"b": GROUP}, 0.2, lambda: len(me.events) >= 2)
        assert me.events == [("redundancy", "b")] * 2

    asyncio.run(scene())
