"""Before a deliberate kill: is there a GMS for the shadow to take over with? The leader's.

A server that is frozen is taken for gone only after a few looks, and a kill in that time would end in an outage. So the
servers of this node are asked anew for every request, and of the other nodes the last look counts.
"""

from __future__ import annotations

from gms_launch.cohort import membership
from gms_launch.cohort.records import CommandRecord, CommandResult
from gms_launch.node.gms_watch import DOWN
from gms_launch.node.group import Group
from gms_launch.process import clock


def given(me: Group, command: CommandRecord) -> bool:
    """True once nothing here speaks against a request that was taken. One that is refused has been answered."""
    if command.force:
        return True
    if command.uuid not in me.gms_asked:
        me.gms_asked[command.uuid] = None
        me.spawn(_ask(me, command.uuid))
    silent = me.gms_asked[command.uuid]
    if silent:
        me.answered.add(command.uuid)
        result = CommandResult(False, refusal(silent, me.layout.group), -1, 0, clock.now())
        me.report.put(me.mirror.keys.result(command.uuid), result.encode())
    return silent == ()


def refusal(silent: tuple[str, ...], group: str) -> str:
    """`silent` names the nodes whose GMS does not answer, `group` is this one, where there are several."""
    whose = f" --group {group}" if group else ""
    return (
        f"GMS on {', '.join(silent)} does not answer now, and without it no shadow can take over; it is taken for gone "
        "when it misses a few looks more (see `gms-launch status`); to kill the primary all the same, and accept an "
        f"outage until a cold start: `gms-launch kill-primary --force{whose}`"
    )


async def _ask(me: Group, uuid: str) -> None:
    here = not await me.loop.run_in_executor(None, me.gms.answers)
    me.gms_asked[uuid] = tuple(
        membership.name(n)
        for rank, n in sorted(me.mirror.nodes.items())
        if all(g.state != DOWN for g in n.gms)  # else the controller knows, and says so
        and (here if rank == me.node_rank else any(g.missed for g in n.gms))
    )
    me.wake.set()
