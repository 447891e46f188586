"""Do these nodes make one run? Pure: the records that the agents wrote when they came, in; objections, out.

Judged before anything but etcd is started. Cohorts span all nodes, so what differs between two of them would only show
later, as a hang.
"""

from __future__ import annotations

from collections.abc import Mapping

from gms_launch.control.records import NodeRecord

#: Clocks further apart than this make timelines and leases hard to read (seconds).
CLOCK_TOLERANCE = 5.0


def name(node: NodeRecord) -> str:
    """A node for people."""
    return f"node {node.node_rank} ({node.host})"


def objections(nodes: Mapping[int, NodeRecord], nnodes: int) -> list[str]:
    """What keeps these nodes from being one run with node 0's settings; empty when nothing does."""
    leader = nodes.get(0)
    if leader is None:
        return []
    found = []
    for rank, node in sorted(nodes.items()):
        if rank >= nnodes:
            found.append(f"{name(node)} came to a run of {nnodes} nodes, whose ranks count from 0")
        if node.version != leader.version:
            found.append(
                f"{name(node)} has gms-launch {node.version or '(of an unknown version)'}, "
                f"{name(leader)} has {leader.version}"
            )
        elif node.settings_digest != leader.settings_digest:
            told = "; ".join(node.differences) or "compare `gms-launch plan --json` on both"
            found.append(f"{name(node)} has other settings than {name(leader)}: {told}")
        elif len(node.gpus) != len(leader.gpus):
            found.append(f"{name(node)} has {len(node.gpus)} GPUs, {name(leader)} has {len(leader.gpus)}")
        if abs(node.clock_skew) > CLOCK_TOLERANCE:
            ahead = "ahead of" if node.clock_skew > 0 else "behind"
            found.append(f"the clock of {name(node)} is at least {abs(node.clock_skew):.0f} s {ahead} {name(leader)}'s")
    return found


def missing(nodes: Mapping[int, NodeRecord], nnodes: int) -> list[int]:
    """The node ranks that have not come."""
    return [r for r in range(nnodes) if r not in nodes]


def clock_skew(before: float, server: float, after: float) -> float:
    """How far a clock is surely ahead (+) or behind (-) of a server's, in seconds; 0 when it need not be off at all.

    `server` is a time in whole seconds, as HTTP's Date has it, that the server wrote between our `before` and `after`.
    """
    if before - server - 1.0 > 0:
        return before - server - 1.0
    return min(0.0, after - server)
