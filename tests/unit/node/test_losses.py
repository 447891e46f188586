"""What the run's leader does for engines of lost nodes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, cast

import pytest

from gms_launch.cohort.dark import DarkRecord
from gms_launch.cohort.records import NodeRecord, RunRecord
from gms_launch.node.herald import agent_number
from gms_launch.node.losses import Losses
from tests.unit.node.test_orphans import KEYS, Leader

#: A group on nodes 2 and 3 of its run.
GROUP = RunRecord("r", "", "", "", 0.0, nnodes=2, redundancy="full", leader=2)
FIRST, SECOND = NodeRecord(2, "node3", "10.0.0.3", "", 1, 1), NodeRecord(3, "node4", "10.0.0.4", "", 1, 1)


def told(node: NodeRecord, *leases: int, group: str = "b") -> NodeRecord:
    return replace(node, leases=((group, leases),))


def lease_events(me: Leader) -> int:
    return sum(kind == "lease_revoked" for kind, _ in me.events)


class Scene:
    """The leader of a run, and what it sees: `here` are nodes that are there, `away` those that were."""

    def __init__(self, *away: NodeRecord) -> None:
        self.me = Leader()
        self.me.settings.node_wait = 60.0
        self.losses = Losses(cast(Any, self.me))
        self.me.report.seen = {n.node_rank: n for n in away}

    @property
    def dark(self) -> dict[str, DarkRecord]:
        found: dict[str, DarkRecord] = self.me.mirror.dark
        return found

    def comes(self, node: NodeRecord) -> None:
        self.me.mirror.nodes[node.node_rank] = self.me.report.seen[node.node_rank] = node

    def goes(self, node_rank: int) -> None:
        del self.me.mirror.nodes[node_rank]

    async def ends(self, *leases: int, group: RunRecord = GROUP, name: str = "b") -> None:
        """It ends these leases, in any order, and no others."""
        before = len(self.me.ended)

        def come() -> bool:
            return len(self.me.ended) - before >= len(leases)

        await self.me.looks(self.losses, {name: group}, 0.1 if leases else 0.2, come)
        assert sorted(self.me.ended[before:]) == sorted(leases)


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gms_launch.cohort.controller.NODE_GRACE", 0.05)


def test_only_engines_from_before_the_loss_are_forgotten() -> None:
    """An agent that stood still tells of the life that took over, when it is back."""

    async def scene() -> None:
        s = Scene(told(FIRST, 7))
        await s.ends(7)
        await s.ends()
        assert lease_events(s.me) == 1
        s.comes(told(FIRST, 8))
        await s.ends()
        s.goes(2)
        await s.ends(8)

    asyncio.run(scene())


def test_what_a_dead_agent_had_said_is_forgotten_however_late_it_is_heard() -> None:
    """Its guard's word is quicker than etcd's, and it cannot wake up."""

    async def scene() -> None:
        s = Scene()
        s.comes(FIRST)
        s.me.dead_agents[2] = agent_number(FIRST.agent_pid, FIRST.agent_start)
        await s.ends()
        s.me.mirror.nodes[2] = told(FIRST, 7)
        await s.ends(7)
        assert lease_events(s.me) == 1
        s.comes(told(replace(FIRST, agent_pid=2), 8))
        await s.ends()
        assert not s.dark, "another agent is there"

    asyncio.run(scene())


def test_what_is_lost_is_said_when_its_registration_has_ended_and_until_a_node_has_that_rank_again() -> None:
    async def scene() -> None:
        s = Scene(told(FIRST, 7))
        s.losses.look({"b": GROUP})
        assert not s.me.tasks and not s.dark, "it may be back at once"
        await s.ends(7)
        assert s.dark == {"b/2": DarkRecord("node3", "10.0.0.3", (7,), 2, "b")} and not s.me.unsaid
        s.comes(replace(FIRST, address="10.0.0.5"))
        await s.ends()
        assert not s.dark and s.me.unsaid == [f"{KEYS.dark}b/2"]

    asyncio.run(scene())


def test_of_a_node_that_does_not_lead_its_group_the_groups_leader_decides() -> None:
    """That one ends all cohorts with it. A node that is away for the leader of the run alone keeps its registration."""

    async def scene() -> None:
        s, lost = Scene(told(SECOND, 9)), replace(GROUP, lost=(1,))
        s.comes(told(FIRST, 7))
        await s.ends()
        assert not s.dark
        await s.ends(9, group=lost)
        assert s.dark == {"b/3": DarkRecord("node4", "10.0.0.4", (9,), 3, "b")}
        assert s.me.events == [("lease_revoked", "b")]
        s.comes(replace(SECOND, agent_pid=2))
        await s.ends(group=lost)
        assert s.dark, "its group has not taken it back yet"
        await s.ends()
        assert not s.dark and s.me.unsaid == [f"{KEYS.dark}b/3"]
        s.comes(told(SECOND, 10))
        await s.ends()
        s.goes(3)
        assert not s.losses.is_lost(3), "it has its time anew"
        await s.ends(10, group=lost)

    asyncio.run(scene())


def test_with_its_leader_lost_too_all_lost_nodes_of_a_group_are_seen_to() -> None:
    async def scene() -> None:
        s = Scene(told(FIRST, 7), told(SECOND, 9))
        await s.ends(7, 9)
        assert set(s.dark) == {"b/2", "b/3"}

    asyncio.run(scene())


def test_the_others_of_a_group_whose_leader_is_lost_end_their_own() -> None:
    async def scene() -> None:
        s = Scene(told(FIRST, 7))
        s.comes(told(SECOND, 9))
        await s.ends(7)
        assert set(s.dark) == {"b/2"}

    asyncio.run(scene())


def test_a_run_without_groups_has_one_that_is_led_by_its_leader() -> None:
    async def scene() -> None:
        s, run = Scene(told(FIRST, 7, group="")), RunRecord("r", "", "", "", 0.0, nnodes=3)
        s.comes(told(NodeRecord(0, "node1", "10.0.0.1", "", 1, 1), 5, group=""))
        await s.ends(group=run, name="")
        await s.ends(7, group=replace(run, lost=(2,)), name="")
        assert s.dark == {"/2": DarkRecord("node3", "10.0.0.3", (7,), 2)}

    asyncio.run(scene())
