"""How a run ends: standbys before the primary, the other nodes before the leader, etcd last; and the proof.

All of it fits into `kill_wait`: what the scheduler would end by force is better ended in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Coroutine
from typing import Any

from gms_launch.cohort.model import ENDED, Phase
from gms_launch.cohort.records import RunState
from gms_launch.errors import LaunchError
from gms_launch.node import members
from gms_launch.node.group import Group
from gms_launch.node.node import Node
from gms_launch.node.rank import Rank
from gms_launch.node.rankset import PARKED_GRACE
from gms_launch.process import lifecycle, proc, strays
from gms_launch.run.rundir import NodeEnd
from gms_launch.services import etcd_proxy

#: What etcd, the last reports and the removal of files may take (seconds).
LAST_STEPS = 1.0
#: What the user's hook may still take for events that wait for it (seconds).
HOOK = 2.0
#: How long the leader waits for the other nodes' proof when nobody will kill it meanwhile (seconds).
CALM = 30.0


async def shut_down(me: Node) -> None:
    """Stop everything on this node and prove it; on the leader, wait for the others first."""
    begun = time.monotonic()
    me.herald.retire()
    linked = me.report.link is not None
    me.ends_run = me.leads and not me.has_moved
    for group in me.groups:
        group.ranks.discovery.stop()
    if me.ends_run and linked:
        failure = me.failure
        me.report.run(state=RunState.STOPPING, failed=str(failure or ""), exit_code=failure.exit_code if failure else 0)
    me.publish_node()
    await asyncio.gather(
        *(
            [_whatever_happens(me, "forgetting lost members", members.forget_lost(me))]
            if me.ends_run and linked
            else []
        ),
        *(_whatever_happens(me, "stopping the ranks", _stop_ranks(me, g)) for g in me.groups),
        *(_whatever_happens(me, "stopping the warm slots", g.ranks.warm.stop()) for g in me.groups),
    )
    await me.tasks.cancel()
    grace = min(3.0, me.settings.engine_grace)
    others = [(n, s) for n, s in me.services.items() if not n.startswith("etcd")]
    hook = me.loop.run_in_executor(None, me.hook.close, min(HOOK, grace))
    await asyncio.gather(hook, *(_whatever_happens(me, f"stopping {n}", s.stop(grace)) for n, s in others))
    if (near := me.services.get(etcd_proxy.NAME)) is not None:
        await _whatever_happens(me, f"stopping {etcd_proxy.NAME}", near.stop(grace))
    wait = me.settings.kill_wait if me.hurry else max(me.settings.kill_wait, CALM)
    deadline = begun + wait - LAST_STEPS
    if me.ends_run and linked:
        if "etcd" in me.services and me.services["etcd"].state == "failed":
            deadline = begun  # nobody can say anything: they end when they read our end in run.json
        await _others(me, deadline)
    await _whatever_happens(me, "taking leave of etcd's members", members.leave(me))
    left = await _leftovers(me)
    if left and me.failure is None:
        me.failure = LaunchError(f"on {me.layout.topology.host}: {left}")
    if not me.ends_run:
        await _clear(me, left)  # before this node says that nothing is left
    me.report.emit("stopped", detail=left)
    me.publish_node(stopped=True, left=left)
    me.report.targets(ended=True)
    await me.loop.run_in_executor(None, me.exporter.stop)
    await me.loop.run_in_executor(None, me.session.close, members.farewell(me), me.has_moved)
    if "etcd" in me.services:
        await me.services["etcd"].stop()
    if me.ends_run:
        await _clear(me, left)
    me.files.close()
    own = NodeEnd(me.node_rank, me.layout.topology.host, not left, left)
    me.ends = tuple(sorted([*me.ends, own], key=lambda e: e.node_rank))
    me.progress("stopped")


async def _whatever_happens(me: Node, what: str, step: Coroutine[Any, Any, None]) -> None:
    """A step that must not keep the others from being taken: what it leaves is killed by its tag."""
    try:
        await step
    except Exception as exc:
        me.report.unexpected(what, exc)


async def _stop_ranks(me: Node, group: Group) -> None:
    """Standbys first, so that none is promoted on the way out.

    The leader's rank of the primary ends before the others': it is what requests are running on. With hybrid load
    balancing all are.
    """
    living = [r for r in group.ranks if r.child is not None and r.phase is not Phase.FENCED]
    primary = [r for r in living if _is_primary(group, r)]
    await asyncio.gather(*(group.ranks.stop(r, PARKED_GRACE) for r in living if r not in primary))
    for rank in primary:
        if not rank.speaks:
            await _leader_rank_ended(me, group, rank)
        await group.ranks.stop(rank, group.settings.engine_grace if rank.speaks else PARKED_GRACE)


def _is_primary(group: Group, rank: Rank) -> bool:
    if rank.speaks:
        return rank.is_primary
    record = group.mirror.ranks.get((rank.cohort_id, 0))
    return (
        record is not None and record.incarnation == rank.incarnation and record.phase in (Phase.WAKING, Phase.ACTIVE)
    )


async def _leader_rank_ended(me: Node, group: Group, rank: Rank) -> None:
    """Wait until the leader's rank of that life has ended, no longer than an engine may take to end."""

    def ended() -> bool:
        record = group.mirror.ranks.get((rank.cohort_id, 0))
        gone = record is None or record.incarnation != rank.incarnation or record.phase in ENDED
        return gone or me.session.is_cut_off or rank.local().gone

    await _until(me, ended, time.monotonic() + me.settings.engine_grace)


async def _others(me: Node, deadline: float) -> None:
    """Wait until every other node has stopped, and note how it did."""
    others = [r for r in range(me.settings.nnodes) if r != me.node_rank]
    seen = dict(me.report.seen)

    def all_stopped() -> bool:
        return all(r not in me.mirror.nodes or me.mirror.nodes[r].stopped for r in others)

    await _until(me, all_stopped, deadline)
    ends = []
    for rank in others:
        node = me.mirror.nodes.get(rank) or me.report.seen.get(rank)
        if node is not None and node.stopped:
            ends.append(NodeEnd(rank, node.host, not node.left, node.left))
        elif rank in seen:  # of one whose place a spare has, under the rank that it had: what it left carries that
            which = seen[rank].node_rank, seen[rank].host
            ends.append(NodeEnd(*which, False, "its agent did not report that it stopped"))
    me.ends = tuple(ends)


async def _until(me: Node, done: Callable[[], bool], deadline: float) -> None:
    """Wait for the mirror to say something, until a deadline (monotonic seconds)."""
    while not done() and time.monotonic() < deadline:
        me.wake.clear()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(me.wake.wait(), deadline - time.monotonic())


async def _clear(me: Node, left: str) -> None:
    """The last process of ours, the guard, and the files, which tell of something to be swept while they are there."""
    await me.guard.dismiss()
    for group in me.groups:
        await group.ranks.cleared(LAST_STEPS)
    if not left:
        me.layout.node_dir.remove()


async def _leftovers(me: Node) -> str:
    """Kill what is still on this node, etcd and the guard aside: by descent, tag and lock; says what would not die."""
    etcd = me.services.get("etcd")
    spare = frozenset({os.getpid(), *([etcd.pid] if etcd is not None else [])})
    run, locks = me.layout.run, me.layout.node_dir.locks

    def look() -> list[proc.Stat]:
        tagged = [
            info for info, _ in proc.tagged(run, node_rank=me.node_rank) if info.pid not in spare | {me.guard.pid}
        ]
        return strays.orphans() or tagged or strays.lock_keepers(run, locks)

    _, left = await me.loop.run_in_executor(None, lifecycle.kill_all, look, 10.0)
    return f"these processes of the run could not be killed: {', '.join(left.values())}" if left else ""
