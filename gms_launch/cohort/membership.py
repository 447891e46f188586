"""Do these nodes make one run? Pure: the records that the agents wrote when they came, in; objections, out.

Judged before anything but etcd is started, and again when a node comes back with a new agent. Cohorts span all nodes,
so what differs between two of them would only show later, as a hang or as another text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from gms_launch.cohort.records import ModelStamp, NodeRecord
from gms_launch.numbers import numbered

#: Clocks further apart than this make timelines and leases hard to read (seconds).
CLOCK_TOLERANCE = 5.0


def name(node: NodeRecord) -> str:
    """A node for people, by its number in the run."""
    return f"node {node.node_rank if node.number < 0 else node.number} ({node.host})"


def outvoted(members: int, here: Collection[int]) -> list[int]:
    """The node ranks of those of etcd's `members` whose nodes are lost, where the others decide without them."""
    lost = [rank for rank in range(members) if rank not in here]
    return lost if 2 * len(lost) < members else []


def objections(nodes: Mapping[int, NodeRecord], nnodes: int) -> list[str]:
    """What keeps these nodes from being one run with node 0's settings; empty when nothing does."""
    leader = nodes.get(0)
    if leader is None:
        return []
    return [text for _, node in sorted(nodes.items()) for text in objections_to(node, leader, nnodes)]


def objections_to(node: NodeRecord, leader: NodeRecord, nnodes: int) -> list[str]:
    """What keeps a node from the leader's run, when that begins or when the node comes back to it."""
    found = []
    if node.node_rank >= nnodes:
        found.append(f"{name(node)} came to a run of {numbered(nnodes, 'node')}, whose ranks count from 0")
    if node.version != leader.version:
        found.append(
            f"{name(node)} has gms-launch {node.version or '(of an unknown version)'}, "
            f"{name(leader)} has {leader.version}"
        )
    else:
        if node.settings_digest != leader.settings_digest:
            told = "; ".join(node.differences) or "compare `gms-launch plan --json` on both"
            found.append(f"{name(node)} has other settings than {name(leader)}: {told}")
        elif node.model != leader.model:
            found.append(
                f"{name(node)} has another model in the same place than {name(leader)}: "
                f"{_model(node.model)} there, {_model(leader.model)} here"
            )
        if len(node.gpus) != len(leader.gpus):
            found.append(f"{name(node)} has {numbered(len(node.gpus), 'GPU')}, {name(leader)} has {len(leader.gpus)}")
    if abs(node.clock_skew) > CLOCK_TOLERANCE:
        ahead = "ahead of" if node.clock_skew > 0 else "behind"
        found.append(f"the clock of {name(node)} is at least {abs(node.clock_skew):.0f} s {ahead} {name(leader)}'s")
    return found


def _model(stamp: ModelStamp) -> str:
    if not stamp.files:
        return "no model directory"
    return f"{numbered(stamp.files, 'file')} of {stamp.bytes} bytes, content {stamp.digest[:12]}"


def unfit(nodes: Mapping[int, NodeRecord], nnodes: int) -> list[int]:
    """The node ranks whose agents came to a run that they do not fit."""
    leader = nodes.get(0)
    if leader is None:
        return []
    return [r for r, n in sorted(nodes.items()) if r < nnodes and objections_to(n, leader, nnodes)]


def missing(nodes: Mapping[int, NodeRecord], nnodes: int) -> list[int]:
    """The node ranks that have not come."""
    return [r for r in range(nnodes) if r not in nodes]


def waiting(absent: Sequence[int], nnodes: int, left: float) -> str:
    """Whom the leader waits for, and how much longer it will (seconds), for people."""
    ranks = f"node rank {absent[0]}" if len(absent) == 1 else f"node ranks {', '.join(map(str, absent))}"
    here = f"{nnodes - len(absent)} of {nnodes} nodes are here"
    return f"{here}, waiting for {ranks}: {max(0.0, left):.0f} s of node_wait left"


def clock_skew(before: float, server: float, after: float) -> float:
    """How far a clock is surely ahead (+) or behind (-) of a server's, in seconds; 0 when it need not be off at all.

    `server` is a time in whole seconds, as HTTP's Date has it, that the server wrote between our `before` and `after`.
    """
    if before - server - 1.0 > 0:
        return before - server - 1.0
    return min(0.0, after - server)
