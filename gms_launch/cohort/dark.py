"""Lost nodes on which nobody answers any more: which engines were there, and what is said of it. Pure.

The run's leader ends the registrations of these engines with Dynamo and says so, and every agent with a frontend ends
that one's connections with such a node.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from gms_launch.cohort.records import NodeRecord, Record, RunRecord


@dataclass(frozen=True)
class DarkRecord(Record):
    """`dark/<group>/<node rank>`: that node of the run is lost, and the registrations with Dynamo of the engines that a
    group had there (`leases`) have been ended. The run's leader writes it then, and takes it away when an agent has
    that node rank again.
    """

    host: str
    address: str
    leases: tuple[int, ...] = ()
    node_rank: int = 0
    group: str = ""


@dataclass(frozen=True)
class Loss:
    """Engines that a group had on a lost node, by the leases under which they are registered still."""

    group: str
    node: NodeRecord
    leases: tuple[int, ...]


def lost_of(group: RunRecord, gone: Collection[int], dead: Collection[int]) -> set[int]:
    """Which nodes of a group are lost, by their ranks in the run.

    Its leader decides that, and ends all cohorts with it. Where that is itself `gone` nobody else is left to say so.
    Of nodes whose agents are `dead` there is nothing to decide: everything there has ended with them.
    """
    nodes = range(group.leader, group.leader + group.nnodes)
    known = gone if group.leader in gone else {group.leader + rank for rank in group.lost}
    return {rank for rank in nodes if rank in known or rank in dead}


def losses(lost: Mapping[str, Collection[int]], nodes: Mapping[int, NodeRecord], ended: Collection[int]) -> list[Loss]:
    """The engines that are to be forgotten: what the agents of `lost` nodes told of last, by group, but for what was
    `ended` before. A lease is one engine's, of one life, and nobody else ever has it.
    """
    told = [(g, nodes[rank]) for g, ranks in sorted(lost.items()) for rank in sorted(ranks) if rank in nodes]
    fresh = [Loss(g, n, tuple(k for k in dict(n.leases).get(g, ()) if k not in ended)) for g, n in told]
    return [loss for loss in fresh if loss.leases]


def over(said: Mapping[str, DarkRecord], lost: Mapping[str, Collection[int]], here: Collection[int]) -> list[str]:
    """What was said of nodes that are not lost any more, by its keys: an agent has that node rank again."""
    return [k for k, d in said.items() if d.node_rank in here and d.node_rank not in lost.get(d.group, ())]


def news(known: Mapping[str, DarkRecord], said: Mapping[str, DarkRecord], here: str) -> list[str]:
    """What is new of that, by its keys, but for what was lost at the address of this very node."""
    return [key for key, lost in said.items() if known.get(key) != lost and lost.address not in ("", here)]


def is_back(lost: DarkRecord, node: NodeRecord | None) -> bool:
    """Whether whoever has that node rank now is at the lost node's address: what leads there is not to be ended."""
    return node is not None and node.address == lost.address
