"""What the run's leader writes of a group whose leading node stays away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gms_launch.cohort.dark import DarkRecord
from gms_launch.cohort.records import NodeRecord, RunRecord
from gms_launch.control.keys import Keys
from gms_launch.errors import NoContactError
from gms_launch.node.herald import agent_number
from gms_launch.node.orphans import Orphans
from tests.support import PATIENCE

KEYS = Keys("r")
GROUP = RunRecord("r", "", "", "", 0.0, redundancy="full", leader=2)


class Leader:
    """The run's leader, as far as that goes. `answers` are what comes of its writes, one after another."""

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
        orphans: Orphans,
        groups: Mapping[str, RunRecord],
        seconds: float,
        come: Callable[[], bool] = lambda: True,
    ) -> None:
        """Look again and again for so long, and on until what is waited for has `come`."""
        begun = self.loop.time()
        while (took := self.loop.time() - begun) < seconds or (took < PATIENCE and not come()):
            orphans.look(groups)
            await asyncio.sleep(0.01)
        await asyncio.gather(*self.tasks)


def test_it_is_over_when_node_wait_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gms_launch.node.orphans.AGAIN", 0.05)

    async def scene() -> None:
        me = Leader(NoContactError("away"), False, True)
        orphans = Orphans(cast(Any, me))
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
            await me.looks(Orphans(cast(Any, me)), {"b": GROUP}, 0.6)
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
        await me.looks(Orphans(cast(Any, me)), {"b": group}, 0.2)
        assert not me.written

    asyncio.run(scene())


def test_that_nobody_serves_there_is_told_once_for_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gms_launch.cohort.controller.NODE_GRACE", 0.05)

    async def scene() -> None:
        me = Leader()
        me.settings.node_wait = 60.0
        orphans = Orphans(cast(Any, me))
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


def lease_events(me: Leader) -> int:
    return sum(kind == "lease_revoked" for kind, _ in me.events)


def test_only_engines_from_before_the_loss_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that stood still tells of the life that took over, before it is seen to be back."""
    monkeypatch.setattr("gms_launch.cohort.controller.NODE_GRACE", 0.05)

    async def scene() -> None:
        me = Leader()
        me.settings.node_wait = 60.0
        orphans = Orphans(cast(Any, me))
        await me.looks(orphans, {"b": replace(GROUP, leases=(7,))}, 0.2, lambda: bool(me.ended))
        assert me.ended == [7]
        await me.looks(orphans, {"b": replace(GROUP, leases=(8,))}, 0.1)
        assert me.ended == [7] and lease_events(me) == 1, "its successor is not meant"
        me.mirror.nodes[2] = me.report.seen[2]
        await me.looks(orphans, {"b": replace(GROUP, leases=(8,))}, 0.1)
        assert me.ended == [7]
        del me.mirror.nodes[2]
        await me.looks(orphans, {"b": replace(GROUP, leases=(8,))}, 0.2, lambda: len(me.ended) > 1)
        assert me.ended == [7, 8], "lost again"

    asyncio.run(scene())


def test_what_a_dead_agent_had_said_is_forgotten_however_late_it_is_heard() -> None:
    """Its guard's word is quicker than etcd's, and it cannot wake up."""

    async def scene() -> None:
        me = Leader()
        node = me.mirror.nodes[2] = me.report.seen[2]
        me.dead_agents[2] = agent_number(node.agent_pid, node.agent_start)
        orphans = Orphans(cast(Any, me))
        orphans.look({"b": GROUP})
        orphans.look({"b": replace(GROUP, leases=(7,))})
        assert lease_events(me) == 1
        for task in me.tasks:
            task.cancel()

    asyncio.run(scene())


def test_what_is_lost_is_said_when_its_registration_has_ended_and_until_a_node_leads_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gms_launch.cohort.controller.NODE_GRACE", 0.05)

    async def scene() -> None:
        me = Leader()
        me.settings.node_wait = 60.0
        orphans, group = Orphans(cast(Any, me)), replace(GROUP, leases=(7,))
        orphans.look({"b": group})
        assert not me.mirror.dark, "it may be back at once"
        await me.looks(orphans, {"b": group}, 0.2)
        assert me.ended == [7] and me.mirror.dark == {"b": DarkRecord("node3", "10.0.0.3", (7,))} and not me.unsaid
        me.mirror.nodes[2] = replace(me.report.seen[2], address="10.0.0.5")
        await me.looks(orphans, {"b": group}, 0.1)
        assert not me.mirror.dark and me.unsaid == [f"{KEYS.dark}b"]

    asyncio.run(scene())
