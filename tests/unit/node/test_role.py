"""An agent and the run's leader role: when it asks, what it begins with, and what it puts into the journal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gms_launch.cohort.leadership import TURN
from gms_launch.cohort.records import EventRecord, LeadRecord, NodeRecord, RunRecord, RunState
from gms_launch.control.mirror import Mirror
from gms_launch.node import members
from gms_launch.node.role import Role
from gms_launch.process import clock

RUN = RunRecord("r", "", "", "", 0.0, state=RunState.ADMITTED)


class Agent:
    """Node 1 of three, as far as its role goes. `asked` counts how often it asked for that."""

    def __init__(self, tmp_path: Path) -> None:
        self.mirror = Mirror("r")
        self.mirror.run = RUN
        self.mirror.nodes = {r: NodeRecord(r, "", "", "", 1, 1, etcd="there", origin=r) for r in (1, 2)}
        place = SimpleNamespace(node_rank=1, host="node2", address="10.0.0.2")
        store = SimpleNamespace(members=3)
        self.layout = SimpleNamespace(
            role_moves=True, founds=False, store=store, home=place, run_dir=SimpleNamespace(events=tmp_path / "e.jsonl")
        )
        self.node_rank, self.leads, self.left = 1, False, 3.0
        self.members = {0: "gone", 1: "gone"}
        self.record = None
        self.asked = self.led = self.begun = 0
        self.said: list[Any] = []
        self.events: dict[str, bytes] = {}
        self.missed: list[list[bytes]] = []
        self.wake = asyncio.Event()
        self.session = SimpleNamespace(lease_left=lambda: self.left, ask_to_lead=self._ask, lead=self._lead)
        self.report = SimpleNamespace(
            lease=7,
            run=lambda **changes: self.said.append(changes),
            emit=lambda kind, **_: self.said.append(kind),
            unexpected=lambda what, error: self.said.append(error),
            hold_journal=lambda: None,
            fill_journal=self.missed.append,
            link=SimpleNamespace(under=lambda _: self.events),
        )
        self.tasks: list[asyncio.Task[Any]] = []

    def _ask(self) -> None:
        self.asked += 1

    def _lead(self) -> None:
        self.led += 1

    def progress(self, text: str) -> None:
        self.said.append(text)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(work))

    async def settle(self) -> None:
        await asyncio.gather(*self.tasks)

    def begins(self) -> None:
        self.begun += 1


def made(tmp_path: Path) -> tuple[Agent, Role]:
    agent = Agent(tmp_path)
    return agent, Role(cast(Any, agent), agent.begins)


def played(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scene())


def test_it_asks_once_when_nobody_has_the_role(tmp_path: Path) -> None:
    async def scene() -> None:
        agent, role = made(tmp_path)
        agent.mirror.lead = LeadRecord(0, 0, "node1", 3)
        assert role.look(1.0) is None and not agent.tasks, "somebody has it"
        agent.mirror.lead = None
        role.look(2.0)
        role.look(2.1)
        await agent.settle()
        assert agent.asked == 1
        role.look(3.0)
        await agent.settle()
        assert agent.asked == 2, "nothing came of it"

    played(scene)


def test_the_next_but_one_looks_again_in_its_turn(tmp_path: Path) -> None:
    async def scene() -> None:
        agent, role = made(tmp_path)
        agent.mirror.nodes[0] = replace(agent.mirror.nodes[1], node_rank=0, origin=0)
        assert role.look(5.0) == 5.0 + TURN and not agent.tasks

    played(scene)


@pytest.mark.parametrize("what", ["lease", "gathering", "stopping", "one member"])
def test_it_does_not_ask_while_it_may_not(tmp_path: Path, what: str) -> None:
    async def scene() -> None:
        agent, role = made(tmp_path)
        if what == "lease":
            agent.left = -0.1
        elif what == "gathering":
            agent.mirror.run = replace(RUN, state=RunState.GATHERING)
        elif what == "stopping":
            agent.mirror.run = replace(RUN, state=RunState.STOPPING)
        else:
            agent.layout.role_moves = False
        assert role.look(1.0) is None and role.look(9.0) is None and not agent.tasks

    played(scene)


def test_the_first_node_has_it_in_its_copy_of_the_run_file_who_leads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gms_launch.node.role.AGAIN", 0.0)
    monkeypatch.setattr("gms_launch.node.role.TRIES", 10**6)
    run_json = tmp_path / "run.json"
    run_json.write_text('{"leader_rank": 0}')
    copies: list[tuple[Path, str]] = []

    def here(path: Path, text: str) -> None:
        copies.append((path, text))

    async def scene() -> None:
        agent = Agent(tmp_path)
        agent.layout.founds, agent.layout.node_dir = True, SimpleNamespace(path=tmp_path / "node")
        agent.layout.run_dir.run_json, agent.writer = run_json, SimpleNamespace(here=here)  # type: ignore[attr-defined]
        role = Role(cast(Any, agent), agent.begins)
        agent.mirror.lead = LeadRecord(1, 1, "node2", 9)
        role.look(1.0)
        await asyncio.sleep(0.05)
        assert not copies, "the new leader has not written it yet"
        run_json.write_text('{"leader_rank": 1}')
        await agent.settle()
        role.look(2.0)
        await agent.settle()
        assert copies == [(tmp_path / "node" / "run.json", '{"leader_rank": 1}')]

    played(scene)


def test_it_begins_to_lead_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "record", lambda _: None)

    async def scene() -> None:
        agent, role = made(tmp_path)
        lost, kept, old = (
            EventRecord(clock.now() - ago, 0, kind).encode() for ago, kind in ((5, "exit"), (9, "start"), (1e6, "long"))
        )
        agent.events = {"a": old, "b": kept, "c": lost}
        (tmp_path / "e.jsonl").write_bytes(kept + b"\n")
        agent.mirror.lead, agent.leads = LeadRecord(1, 1, "node2", 7), True
        agent.mirror.run = replace(RUN, etcd=("lost", "there", "there"))
        role.look(1.0)
        role.look(2.0)
        await agent.settle()
        assert agent.members == {0: "lost", 1: "there", 2: "there"}, "as it was told, the lost one too"
        assert (agent.led, agent.begun, agent.asked) == (1, 1, 0)
        assert {"leader": 1, "leader_address": "10.0.0.2"} in agent.said and "leads" in agent.said
        assert agent.missed == [[lost + b"\n"]], "what the journal has not, of late"
        agent.leads, agent.mirror.lead = False, LeadRecord(2, 2, "node3", 9)
        role.look(3.0)
        assert agent.said[-1] == "this agent does not lead the run any more"

    played(scene)
