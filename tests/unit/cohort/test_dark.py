"""Which engines of lost nodes are forgotten, and until when that is said."""

from __future__ import annotations

import pytest

from gms_launch.cohort import dark
from gms_launch.cohort.dark import DarkRecord, Loss
from gms_launch.cohort.records import NodeRecord, RunRecord

#: A group on nodes 2, 3 and 4 of its run.
GROUP = RunRecord("r", "", "", "", 0.0, nnodes=3, leader=2)


def node(rank: int, **leases: tuple[int, ...]) -> NodeRecord:
    return NodeRecord(rank, f"node{rank}", f"10.0.0.{rank}", "", 1, 1, leases=tuple(leases.items()))


@pytest.mark.parametrize(
    ("said", "gone", "dead", "found", "why"),
    [
        ((), (), (), set(), "nothing is lost"),
        ((1,), (), (), {3}, "its leader says so, by the group's own ranks"),
        ((), (3,), (), set(), "its leader has not decided that: the node may be back"),
        ((1,), (4,), (), {3}, "the same of another"),
        ((), (2,), (), {2}, "nobody else says so of the leader"),
        ((1,), (2,), (), {2}, "what that had said may be over"),
        ((), (2, 4, 5), (), {2, 4}, "nor of the others, when it is lost"),
        ((), (1, 5, 6), (), set(), "another group's"),
        ((), (3,), (3,), {3}, "its agent is dead, and everything there"),
        ((2,), (1,), (1,), {4}, "another group's"),
    ],
)
def test_a_groups_leader_says_which_nodes_are_lost(
    said: tuple[int, ...], gone: tuple[int, ...], dead: tuple[int, ...], found: set[int], why: str
) -> None:
    group = RunRecord("r", "", "", "", 0.0, nnodes=3, leader=2, lost=said)
    assert dark.lost_of(group, gone, dead) == found, why


def test_what_is_forgotten_is_what_a_lost_nodes_agent_told_and_each_once() -> None:
    nodes = {2: node(2, b=(7,), c=(8, 9)), 3: node(3, b=(10,)), 4: node(4)}
    assert dark.losses({"b": ()}, nodes, ()) == []
    assert dark.losses({"b": {2}}, nodes, ()) == [Loss("b", nodes[2], (7,))], "what it had of another group stays"
    both = [Loss("b", nodes[2], (7,)), Loss("b", nodes[3], (10,)), Loss("c", nodes[2], (8, 9))]
    assert dark.losses({"c": {2, 4}, "b": {3, 2, 9}}, nodes, ()) == both
    assert dark.losses({"c": {2}}, nodes, {8}) == [Loss("c", nodes[2], (9,))]
    assert dark.losses({"c": {2}}, nodes, {8, 9}) == []


def test_it_is_said_until_an_agent_has_that_node_rank_again() -> None:
    said = {"b/3": DarkRecord("node3", "10.0.0.3", (7,), 3, "b"), "c/3": DarkRecord("node3", "10.0.0.3", (8,), 3, "c")}
    assert dark.over(said, {"b": {3}, "c": {3}}, {2}) == []
    assert dark.over(said, {"b": set(), "c": set()}, {2}) == [], "it is away still"
    assert dark.over(said, {"b": {3}, "c": set()}, {2, 3}) == ["c/3"], "group b's leader has not taken it back"
    assert dark.over(said, {}, {2, 3}) == ["b/3", "c/3"]


def test_whoever_is_back_at_a_lost_nodes_address_keeps_its_connections() -> None:
    lost = DarkRecord("node3", "10.0.0.3", (7,), 3, "b")
    assert dark.is_back(lost, node(3))
    assert not dark.is_back(lost, None)
    assert not dark.is_back(lost, node(5)), "a spare has its place, on another machine"
