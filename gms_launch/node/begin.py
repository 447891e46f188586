"""How a run begins: the leader's etcd, then all agents in their places, then everything else.

Nothing but etcd is started before all nodes have come and were found to fit together (`cohort.membership`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import replace
from functools import partial

from gms_launch.cohort import membership
from gms_launch.cohort.model import Redundancy
from gms_launch.cohort.records import RunState
from gms_launch.errors import DeadlineError, LaunchError, NoContactError, UsageError, by_code
from gms_launch.node import members, upkeep
from gms_launch.node.group import Group
from gms_launch.node.node import Node
from gms_launch.numbers import numbered
from gms_launch.process import strays
from gms_launch.run import contents
from gms_launch.run.credentials import ETCD
from gms_launch.services import etcd, nats

#: How often is said which nodes are waited for (seconds).
TELL_AGAIN = 30.0
#: An etcd that has not answered by then is named (seconds).
SOON = 2.0


async def start(me: Node) -> None:
    """Bring this node up to the point where cohorts can be started. Raises `LaunchError`."""
    layout, leader = me.layout, me.layout.founds
    nnodes = layout.topology.nnodes
    place = f"node {me.node_rank} of {nnodes}, " if nnodes > 1 else ""
    place = f"node {me.node_rank}, a spare, " if layout.is_spare else place
    me.progress(f"run {layout.run} on {layout.topology.host}: {place}{layout.run_dir.path}")
    await clear_node(me)
    me.hook.start(me.loop)
    if leader and layout.own_etcd:
        credentials, store = layout.credentials, layout.store
        store.files.write(credentials.ca, credentials.leaves[ETCD])
        await me.start_service(store.service())
        me.member = store.url if store.several else ""
        if wanting := etcd.reserve(layout.node_dir.etcd_data):
            me.progress(f"no room could be taken for etcd's records ({wanting}): a full /dev/shm will end the run")
    if not layout.number_of_groups:  # each has its own
        me.report.model = await me.loop.run_in_executor(None, contents.stamp, me.settings.model)
    opening = me.loop.run_in_executor(None, me.session.open, me.report.record())
    if not (await asyncio.wait({opening}, timeout=SOON))[0]:
        wait = f", for {me.settings.service_timeout:g} s at most" if leader else ""
        me.progress(f"waiting for etcd to answer at {', '.join(layout.etcd_endpoints)}{wait}")
    try:
        await opening
    except NoContactError:
        # The leader answered a moment ago. If the run has ended meanwhile, its reason is the one to give.
        run = layout.run_dir.read()
        if leader or run is None or run.ended is None:
            raise
        raise by_code(run.exit_code or 1, run.reason or "the run was stopped") from None
    await me.session.mirrored.wait()
    me.report.lease_known()
    if layout.store.several:
        me.spawn(me.session.watch_leader())
    if leader:
        me.report.run()
        me.publish_node()
        await _everybody(me)
        await members.gathered(me)
        me.report.ranks()
        me.report.run(state=RunState.ADMITTED)
    else:
        if not layout.store.several:
            me.spawn(me.session.watch_leader())
        if layout.store.is_member:
            joined = asyncio.Event()
            me.spawn(_join_etcd(me, joined))
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(joined.wait(), me.settings.service_timeout)
        members.look(me)
        if me.mirror.run is not None and me.mirror.run.state is RunState.ADMITTED:
            _take_over_place(me)
        await _admission(me)
    for group in me.groups:
        await _join(group)
        for service in group.layout.gms_services():
            await me.start_service(service)
    await me.look_at_gms()
    await members.bring_near(me)
    if layout.topology.is_leader and layout.own_nats:
        nats.configure(layout.nats_server)
        await me.start_service(layout.nats_service())
    if layout.front.here and not layout.is_spare:
        await _open_the_door(me)
    for group in me.groups:
        if group.is_leader:
            s = group.settings
            group.progress(f"starting {numbered(s.cohorts, 'cohort')} of engine {s.engine}")


async def _join_etcd(me: Node, joined: asyncio.Event) -> None:
    await members.join(me)
    joined.set()


async def _join(group: Group) -> None:
    """Take this node's place in a group, of which the run's admission is that of its nodes."""
    if group.layout.group:
        group.report.model = await group.loop.run_in_executor(None, contents.stamp, group.settings.model)
        group.report.lease_known()
        group.report.node(force=True)
        if group.is_leader:
            # It may go on where another agent in its place was lost, and all of its cohorts with that.
            began = group.mirror.run is not None and bool(group.mirror.run.redundancy)
            group.memory = replace(group.memory, initial=not began)
            group.report.run(state=RunState.ADMITTED, redundancy=Redundancy.DOWN.value if began else "")
    group.gms_epoch = group.mirror.run.gms_epoch if group.mirror.run else 0


async def _open_the_door(me: Node) -> None:
    front = me.layout.front
    try:
        keys = await me.loop.run_in_executor(None, front.configure)
    except OSError as exc:
        raise LaunchError(f"the proxy's files cannot be written in {me.layout.node_dir.path}: {exc}") from None
    for service in me.layout.front_services():
        await me.start_service(service)
    if front.proxied:
        me.spawn(upkeep.follow_keys(me, keys))
    me.progress(f"frontend: {front.url}{front.hint}")
    if front.number > 1 or me.layout.role_moves:
        me.front = front.url
        me.publish_node()


async def clear_node(me: Node) -> None:
    """Kill what an earlier agent of this run may have left here, and remove its files.

    What we report as dead must be dead, and what etcd knows must be of this attempt. Raises `LaunchError`.
    """
    spare = frozenset({os.getpid(), me.guard.pid})
    run, locks = me.layout.run, me.layout.node_dir.locks
    clear = partial(strays.clear, run, 10.0, spare, me.node_rank, locks)
    _, left = await me.loop.run_in_executor(None, clear)
    if left:
        names = ", ".join(left.values())
        raise LaunchError(f"processes {names} that an earlier agent of run {run} left cannot be killed")
    me.layout.node_dir.clear()


async def _everybody(me: Node) -> None:
    """Wait until every node has come.

    Raises `UsageError` when two do not fit together, `DeadlineError` when one does not come.
    """
    nnodes, wait = me.layout.topology.nnodes, me.settings.node_wait
    deadline = me.loop.time() + wait
    told: list[int] = []
    again = 0.0
    while True:
        me.wake.clear()
        nodes = me.mirror.nodes
        if me.mirror.refusals:
            raise UsageError(next(iter(me.mirror.refusals.values())))
        for node in nodes.values():
            if node.failed:
                raise by_code(node.exit_code, f"{membership.name(node)}: {node.failed}")
        if found := membership.objections(nodes, me.settings.nnodes):
            raise UsageError("; ".join(found))
        absent = membership.missing(nodes, nnodes)
        if not absent:
            return
        left = deadline - me.loop.time()
        if absent != told or me.loop.time() >= again:
            me.progress(membership.waiting(absent, nnodes, left))
            told, again = absent, me.loop.time() + TELL_AGAIN
        if left <= 0:
            names = ", ".join(map(str, absent))
            raise DeadlineError(
                f"{nnodes - len(absent)} of {nnodes} nodes came within {wait:g} s (node_wait); "
                f"missing node ranks: {names}"
            )
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(me.wake.wait(), min(left, again - me.loop.time()))


async def _admission(me: Node) -> None:
    """Wait for the leader's word on this run. Raises what it says."""
    while True:
        me.wake.clear()
        run = me.mirror.run
        if run is not None and run.failed:
            raise by_code(run.exit_code, run.failed)
        if run is not None and run.state is RunState.STOPPING:
            me.stop("the run is being stopped")
        if run is not None and run.state is RunState.ADMITTED:
            return
        await me.wake.wait()


def _take_over_place(me: Node) -> None:
    """This run went on without us, or with an agent that is dead: its lives have no rank here any more."""
    for group in me.groups:
        for cohort_id, desired in group.mirror.desired.items():
            group.ranks.skip(cohort_id, desired.incarnation, "its agent was lost")
