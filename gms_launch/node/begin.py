"""How a run begins: the leader's etcd, then all agents in their places, then everything else.

Nothing but etcd is started before all nodes have come and were found to fit together (`cohort.membership`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from functools import partial
from typing import TYPE_CHECKING

from gms_launch.cohort import membership
from gms_launch.cohort.records import RunState
from gms_launch.errors import DeadlineError, LaunchError, NoContactError, UsageError, by_code
from gms_launch.process import strays
from gms_launch.run import contents
from gms_launch.services import etcd, nats

if TYPE_CHECKING:
    from gms_launch.node.agent import Agent


#: How often is said which nodes are waited for (seconds).
TELL_AGAIN = 30.0


async def start(agent: Agent) -> None:
    """Bring this node up to the point where cohorts can be started. Raises `LaunchError`."""
    layout, leader = agent.layout, agent.is_leader
    nnodes = layout.topology.nnodes
    place = f"node {agent.node_rank} of {nnodes}, " if nnodes > 1 else ""
    agent.progress(f"run {layout.run} on {layout.topology.host}: {place}{layout.run_dir.path}")
    await clear_node(agent)
    if leader and layout.own_etcd:
        await agent.start_service(layout.etcd_service())
        if wanting := etcd.reserve(layout.node_dir.etcd_data):
            agent.progress(f"no room could be taken for etcd's records ({wanting}): a full /dev/shm will end the run")
    agent.report.model = await agent.loop.run_in_executor(None, contents.stamp, agent.settings.model)
    try:
        await agent.loop.run_in_executor(None, agent.session.open, agent.report.record())
    except NoContactError:
        # The leader answered a moment ago. If the run has ended meanwhile, its reason is the one to give.
        run = layout.run_dir.read()
        if leader or run is None or run.ended is None:
            raise
        raise by_code(run.exit_code or 1, run.reason or "the run was stopped") from None
    await agent.session.mirrored.wait()
    agent.report.lease_known()
    if leader:
        agent.report.run()
        await _everybody(agent)
        agent.report.ranks()
        agent.report.run(state=RunState.ADMITTED)
    else:
        agent.spawn(agent.session.watch_leader())
        if agent.mirror.run is not None and agent.mirror.run.state is RunState.ADMITTED:
            _take_over_place(agent)
        await _admission(agent)
    agent.gms_epoch = agent.mirror.run.gms_epoch if agent.mirror.run else 0
    for service in layout.gms_services():
        await agent.start_service(service)
    await agent.look_at_gms()
    if leader:
        if layout.own_nats:
            credentials = layout.credentials
            nats.configure(
                layout.nats_config,
                layout.topology.leader_address,
                layout.ports.nats,
                layout.node_dir.path / "nats",
                credentials.nats_user,
                credentials.nats_password,
            )
            await agent.start_service(layout.nats_service())
        await agent.start_service(layout.frontend_service())
        agent.progress(f"frontend: {layout.frontend_url}")
        agent.progress(f"starting {agent.settings.cohorts} cohorts of engine {agent.settings.engine}")


async def clear_node(agent: Agent) -> None:
    """Kill what an earlier agent of this run may have left here, and remove its files.

    What we report as dead must be dead, and what etcd knows must be of this attempt. Raises `LaunchError`.
    """
    spare = frozenset({os.getpid(), agent.guard_pid})
    run, locks = agent.layout.run, agent.layout.node_dir.locks
    clear = partial(strays.clear, run, 10.0, spare, agent.node_rank, locks)
    _, left = await agent.loop.run_in_executor(None, clear)
    if left:
        names = ", ".join(left.values())
        raise LaunchError(f"processes {names} that an earlier agent of run {run} left cannot be killed")
    agent.layout.node_dir.clear()


async def _everybody(agent: Agent) -> None:
    """Wait until every node has come.

    Raises `UsageError` when two do not fit together, `DeadlineError` when one does not come.
    """
    nnodes, wait = agent.layout.topology.nnodes, agent.settings.node_wait
    deadline = agent.loop.time() + wait
    told: list[int] = []
    again = 0.0
    while True:
        agent.wake.clear()
        nodes = agent.mirror.nodes
        if agent.mirror.refusals:
            raise UsageError(next(iter(agent.mirror.refusals.values())))
        for node in nodes.values():
            if node.failed:
                raise by_code(node.exit_code, f"{membership.name(node)}: {node.failed}")
        if found := membership.objections(nodes, nnodes):
            raise UsageError("; ".join(found))
        absent = membership.missing(nodes, nnodes)
        if not absent:
            return
        left = deadline - agent.loop.time()
        if absent != told or agent.loop.time() >= again:
            agent.progress(membership.waiting(absent, nnodes, left))
            told, again = absent, agent.loop.time() + TELL_AGAIN
        if left <= 0:
            names = ", ".join(map(str, absent))
            raise DeadlineError(
                f"{nnodes - len(absent)} of {nnodes} nodes came within {wait:g} s (node_wait); "
                f"missing node ranks: {names}"
            )
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(agent.wake.wait(), min(left, again - agent.loop.time()))


async def _admission(agent: Agent) -> None:
    """Wait for the leader's word on this run. Raises what it says."""
    while True:
        agent.wake.clear()
        run = agent.mirror.run
        if run is not None and run.failed:
            raise by_code(run.exit_code, run.failed)
        if run is not None and run.state is RunState.STOPPING:
            agent.stop("the run is being stopped")
        if run is not None and run.state is RunState.ADMITTED:
            return
        await agent.wake.wait()


def _take_over_place(agent: Agent) -> None:
    """This run went on without us, or with an agent that is dead: its lives have no rank here any more."""
    for cohort_id, desired in agent.mirror.desired.items():
        agent.ranks.skip(cohort_id, desired.incarnation, "its agent was lost")


def node_name(agent: Agent, node_rank: int) -> str:
    """A node for people, also when it is gone."""
    node = agent.mirror.nodes.get(node_rank) or agent.report.seen.get(node_rank)
    return membership.name(node) if node is not None else f"node {node_rank}"
