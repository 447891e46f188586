"""How a run ends: standbys before the primary, the other nodes before the leader, etcd last; and the proof.

All of it fits into `kill_wait`: what the scheduler would end by force is better ended in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from gms_launch.cohort.model import ENDED, Phase
from gms_launch.cohort.records import RunState
from gms_launch.errors import LaunchError
from gms_launch.node.rank import Rank
from gms_launch.node.rankset import PARKED_GRACE
from gms_launch.process import lifecycle, proc, strays
from gms_launch.run.rundir import NodeEnd

if TYPE_CHECKING:
    from gms_launch.node.agent import Agent

#: What etcd, the last reports and the removal of files may take (seconds).
LAST_STEPS = 1.0
#: How long the leader waits for the other nodes' proof when nobody will kill it meanwhile (seconds).
CALM = 30.0


async def shut_down(agent: Agent) -> None:
    """Stop everything on this node and prove it; on the leader, wait for the others first."""
    begun = time.monotonic()
    agent.herald.retire()
    linked = agent.report.link is not None
    agent.ranks.holds.stop()
    if agent.is_leader and linked:
        failure = agent.failure
        agent.report.run(
            state=RunState.STOPPING, failed=str(failure or ""), exit_code=failure.exit_code if failure else 0
        )
    agent.publish_node()
    await _whatever_happens(agent, "stopping the ranks", _stop_ranks(agent))
    await agent.tasks.cancel()
    grace = min(3.0, agent.settings.engine_grace)
    others = [(n, s) for n, s in agent.services.items() if n != "etcd"]
    await asyncio.gather(*(_whatever_happens(agent, f"stopping {n}", s.stop(grace)) for n, s in others))
    wait = agent.settings.kill_wait if agent.hurry else max(agent.settings.kill_wait, CALM)
    deadline = begun + wait - LAST_STEPS
    if agent.is_leader and linked:
        if "etcd" in agent.services and agent.services["etcd"].state == "failed":
            deadline = begun  # nobody can say anything: they end when they read our end in run.json
        await _others(agent, deadline)
    left = await _leftovers(agent)
    if left and agent.failure is None:
        agent.failure = LaunchError(f"on {agent.layout.topology.host}: {left}")
    if not agent.is_leader:
        await _clear(agent, left)  # before this node says that nothing is left
    agent.report.emit("stopped", detail=left)
    agent.publish_node(stopped=True, left=left)
    await agent.loop.run_in_executor(None, agent.session.close)
    if "etcd" in agent.services:
        await agent.services["etcd"].stop()
    if agent.is_leader:
        await _clear(agent, left)
    agent.files.close()
    own = NodeEnd(agent.node_rank, agent.layout.topology.host, not left, left)
    agent.ends = tuple(sorted([*agent.ends, own], key=lambda e: e.node_rank))
    agent.progress("stopped")


async def _whatever_happens(agent: Agent, what: str, step: Coroutine[Any, Any, None]) -> None:
    """A step that must not keep the others from being taken: what it leaves is killed by its tag."""
    try:
        await step
    except Exception as exc:
        agent.report.unexpected(what, exc)


async def _stop_ranks(agent: Agent) -> None:
    """Standbys first, so that none is promoted on the way out.

    The leader's rank of the primary ends before the others': it is what requests are running on.
    """
    living = [r for r in agent.ranks if r.child is not None and r.phase is not Phase.FENCED]
    primary = [r for r in living if _is_primary(agent, r)]
    await asyncio.gather(*(agent.ranks.stop(r, PARKED_GRACE) for r in living if r not in primary))
    for rank in primary:
        if not agent.is_leader:
            await _leader_rank_ended(agent, rank)
        await agent.ranks.stop(rank, agent.settings.engine_grace if agent.is_leader else PARKED_GRACE)


def _is_primary(agent: Agent, rank: Rank) -> bool:
    if agent.is_leader:
        return rank.is_primary
    record = agent.mirror.ranks.get((rank.cohort_id, 0))
    return (
        record is not None and record.incarnation == rank.incarnation and record.phase in (Phase.WAKING, Phase.ACTIVE)
    )


async def _leader_rank_ended(agent: Agent, rank: Rank) -> None:
    """Wait until the leader's rank of that life has ended, no longer than an engine may take to end."""

    def ended() -> bool:
        record = agent.mirror.ranks.get((rank.cohort_id, 0))
        gone = record is None or record.incarnation != rank.incarnation or record.phase in ENDED
        return gone or agent.session.is_cut_off or rank.local().gone

    await _until(agent, ended, time.monotonic() + agent.settings.engine_grace)


async def _others(agent: Agent, deadline: float) -> None:
    """Wait until every other node has stopped, and note how it did."""
    others = [r for r in range(agent.layout.topology.nnodes) if r != agent.node_rank]
    hosts = {r: n.host for r, n in agent.report.seen.items()}

    def all_stopped() -> bool:
        return all(r not in agent.mirror.nodes or agent.mirror.nodes[r].stopped for r in others)

    await _until(agent, all_stopped, deadline)
    ends = []
    for rank in others:
        node = agent.mirror.nodes.get(rank) or agent.report.seen.get(rank)
        if node is not None and node.stopped:
            ends.append(NodeEnd(rank, node.host, not node.left, node.left))
        elif rank in hosts:
            ends.append(NodeEnd(rank, hosts[rank], False, "its agent did not report that it stopped"))
    agent.ends = tuple(ends)


async def _until(agent: Agent, done: Callable[[], bool], deadline: float) -> None:
    """Wait for the mirror to say something, until a deadline (monotonic seconds)."""
    while not done() and time.monotonic() < deadline:
        agent.wake.clear()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(agent.wake.wait(), deadline - time.monotonic())


async def _clear(agent: Agent, left: str) -> None:
    """The last process of ours, the guard, and the files, which tell of something to be swept while they are there."""
    await agent.dismiss_guard()
    await agent.ranks.cleared(LAST_STEPS)
    if not left:
        agent.layout.node_dir.remove()


async def _leftovers(agent: Agent) -> str:
    """Kill what is still on this node, etcd and the guard aside: by descent, tag and lock; says what would not die."""
    etcd = agent.services.get("etcd")
    spare = frozenset({os.getpid(), agent.guard_pid, *([etcd.pid] if etcd is not None else [])})
    run, locks = agent.layout.run, agent.layout.node_dir.locks

    def look() -> list[proc.Stat]:
        tagged = [info for info, _ in proc.tagged(run, node_rank=agent.node_rank) if info.pid not in spare]
        return strays.orphans() or tagged or strays.lock_keepers(run, locks)

    _, left = await agent.loop.run_in_executor(None, lifecycle.kill_all, look, 10.0)
    return f"these processes of the run could not be killed: {', '.join(left.values())}" if left else ""
