"""The members of the run's etcd, where it has several: how this node's comes in and goes, who is told where they are.

The first is begun by the run's leader as a cluster of one. Every other comes empty and joins, when the run begins as
when its node comes back: what it had is gone, so its old place is given up and it takes a new one. When the run ends
they leave, one after the other, so that those who stay can decide to the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import replace

from gms_launch.cohort.membership import name, outvoted
from gms_launch.cohort.records import NodeRecord
from gms_launch.errors import DeadlineError, LaunchError, NoContactError
from gms_launch.node.node import Node
from gms_launch.numbers import numbered
from gms_launch.process import listener
from gms_launch.run import credentials
from gms_launch.run.store import Store
from gms_launch.services import etcd, etcd_proxy

log = logging.getLogger("agent")

#: Between two tries to join (seconds).
AGAIN = 2.0
#: How long the members may take to agree on one (seconds).
PATIENCE = 20.0
#: What leaving may take while the run ends (seconds), and which part of kill_wait: longer than etcd is without a
#: leader, should one be chosen meanwhile.
FAREWELL, SHARE = 5.0, 0.2


async def join(me: Node) -> None:
    """Bring this node's member in, again and again until it is."""
    told = ""
    while not me.stopping.is_set():
        try:
            await _join(me)
            return
        except Exception as exc:  # whatever it is, the run is one member short until this one is in
            why = str(exc) or type(exc).__name__
            if why != told:
                told = why
                me.report.emit("member_waits", detail=why.splitlines()[0])
                me.progress(f"this node's etcd is not a member yet, and is tried again: {why}")
            await asyncio.sleep(AGAIN)


async def _join(me: Node) -> None:
    layout, store = me.layout, me.layout.store
    if (before := me.services.pop("etcd", None)) is not None:
        await before.stop()
    leaf = await asyncio.to_thread(credentials.for_member, layout.credentials, (store.home.address,))
    store.files.write(layout.credentials.ca, leaf)
    layout.node_dir.forget_store()
    joins = await asyncio.to_thread(_take_place, store)
    await me.start_service(store.service(joins))
    await asyncio.to_thread(_promote, store)
    if wanting := etcd.reserve(layout.node_dir.etcd_data):
        log.warning("no room could be taken for etcd's records: %s", wanting)
    me.member = store.url
    me.report.emit("member_joined", detail=store.url)
    me.publish_node()
    me.wake.set()


def _others(store: Store) -> tuple[str, ...]:
    return tuple(url for url in store.endpoints if url != store.url) or store.endpoints


def _take_place(store: Store) -> str:
    from gms_launch.control import cluster
    from gms_launch.control.client import Etcd

    here = store.member()
    asked = Etcd(store.credentials.access(_others(store)), brisk=True)
    try:
        found = cluster.take_place(asked, here.name, here.peer_url, PATIENCE)
        return cluster.started_with(found, here.name, here.peer_url)
    finally:
        asked.close()


def _promote(store: Store) -> None:
    from gms_launch.control import cluster
    from gms_launch.control.client import Etcd

    here = store.member()
    asked = Etcd(store.credentials.access(_others(store)), brisk=True)
    try:
        mine = next((m for m in cluster.members(asked) if here.peer_url in m.peers), None)
        if mine is None:
            raise NoContactError(f"etcd's member at {here.peer_url} was removed before it had its vote")
        cluster.promote(asked, mine.id, PATIENCE)
    finally:
        asked.close()


async def leave(me: Node) -> None:
    """End this node's member, if it is not the last: those who stay need not count on it any more."""
    store, runner = me.layout.store, me.services.get("etcd")
    if not store.several or me.ends_run or runner is None:
        return
    runner.let_go()
    if me.report.link is not None:
        me.report.link.learn(_others(store))
    try:
        stays = store.name_of(me.mirror.lead.node_rank if me.mirror.lead is not None else 0)
        await asyncio.wait_for(asyncio.to_thread(_remove, store, stays, farewell(me)), farewell(me) + 1.0)
    except (LaunchError, asyncio.TimeoutError) as exc:
        log.warning("this node's member of etcd could not take leave: %s", exc or "no answer")
    await runner.stop()


def farewell(me: Node) -> float:
    """How long etcd may take for a last word of this node (seconds): a second, where members do not leave meanwhile."""
    return _patience(me) if me.layout.store.several and not me.ends_run else 1.0


def _patience(me: Node) -> float:
    return min(FAREWELL, SHARE * me.settings.kill_wait)


async def forget_lost(me: Node) -> None:
    """Take the members of lost nodes out, on the leader while the run ends.

    While their votes count, those who stay could decide nothing once another has ended: not even hear its last word.
    """
    store = me.layout.store
    lost = outvoted(store.members, me.mirror.nodes) if store.several else []
    if not lost:
        return
    try:
        await asyncio.to_thread(_take_out, store, {store.name_of(rank) for rank in lost}, _patience(me))
    except LaunchError as exc:
        log.warning("the members of etcd that were lost could not be taken out: %s", exc)


def _take_out(store: Store, names: set[str], patience: float) -> None:
    from gms_launch.control import client, cluster

    asked = client.Etcd(store.access, brisk=True)
    try:
        for member in cluster.members(asked, retry=patience):
            if member.name in names:
                with contextlib.suppress(client.RpcError):  # it is no member any more
                    cluster.remove(asked, member.id, retry=patience)
    finally:
        asked.close()


def _remove(store: Store, stays: str, patience: float) -> None:
    """Take this node's member out. If it leads etcd, the one called `stays` does from then on, without an election."""
    from gms_launch.control import client, cluster

    here = store.member()
    asked = client.Etcd(store.credentials.access(_others(store)), brisk=True)
    own = client.Etcd(store.credentials.access((store.url,)), brisk=True)
    try:
        found = cluster.members(asked, retry=patience)
        mine = next((m for m in found if here.peer_url in m.peers), None)
        heir = next((m for m in found if m.name == stays), None)
        if mine is None:
            return
        with contextlib.suppress(client.RpcError):  # it is no member any more
            if heir is not None:
                cluster.lead(own, heir.id, retry=patience)
            cluster.remove(asked, mine.id, retry=patience)
    finally:
        asked.close()
        own.close()


async def gathered(me: Node) -> None:
    """On the leader: wait until all members have their vote. Raises `DeadlineError`."""
    store, wait = me.layout.store, me.settings.service_timeout
    deadline = me.loop.time() + wait
    while me.layout.store.several:
        me.wake.clear()
        look(me)
        missing = [r for r in range(store.members) if r not in me.members]
        if not missing or me.stopping.is_set():
            return
        if me.loop.time() > deadline:
            nodes = me.mirror.nodes
            names = ", ".join(name(nodes[r]) if r in nodes else f"node {r}" for r in missing)
            raise DeadlineError(
                f"etcd has {len(me.members)} of {store.members} members after {wait:g} s (service_timeout); missing: "
                f"{names}: its agent's log says why, {me.layout.run_dir.logs}"
            )
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(me.wake.wait(), max(0.0, deadline - me.loop.time()) + 0.1)


def look_at_fronts(me: Node) -> None:
    """On the leader: put into run.json by which URLs clients come in, where there are several."""
    number = me.layout.front.number
    if not me.leads or me.record is None:
        return
    first = me.mirror.nodes[0].frontend if 0 in me.mirror.nodes else ""
    if first and first != me.record.frontend_url:  # another node is in the first one's place
        me.record = replace(me.record, frontend_url=first)
        me.report.run(frontend_url=first)
        record(me)
    if number == 1:
        return
    known = dict(enumerate(me.record.frontend_urls))
    known |= {r: n.frontend for r, n in sorted(me.mirror.nodes.items()) if n.frontend and r < number}
    found = tuple(known[r] for r in sorted(known))
    if len(found) == number and found != me.record.frontend_urls:
        me.record = replace(me.record, frontend_urls=found)
        record(me)


def look(me: Node) -> None:
    """Take over where the members are: the leader from the nodes' records, and the others from the leader's word."""
    store = me.layout.store
    if not store.several:
        return
    _let_go(me)
    before = store.endpoints
    if me.leads:
        me.members |= {r: n.etcd for r, n in me.mirror.nodes.items() if n.etcd and r < store.members}
        if store.learn(me.members):
            me.report.run(etcd=store.where.known)
            record(me)
            _learned(me, before)
        return
    if me.mirror.run is not None and me.mirror.run.etcd and store.learn(me.mirror.run.etcd):
        _learned(me, before)
    if me.session.mirrored.is_set():
        _follow_leader(me)


def _let_go(me: Node) -> None:
    """End what this node's member still sends to members on nodes that are lost.

    Etcd waits up to 5 s for room in such a connection, once it is full, and where that member is removed meanwhile, it
    does nothing else for as long: its leader then does not write anything down for anybody.
    """
    here = frozenset(r for r in me.mirror.nodes if r < me.layout.store.members)
    gone, me.members_seen = me.members_seen - here, here
    runner = me.services.get("etcd")
    for node in (me.report.seen.get(rank) for rank in gone):
        if runner is not None and runner.pid and node is not None and node.address != me.layout.home.address:
            me.spawn(_sever(runner.pid, node))


async def _sever(pid: int, node: NodeRecord) -> None:
    try:
        count = await asyncio.to_thread(listener.sever, pid, node.address)
        log.info("etcd: %s with %s, which is lost, ended", numbered(count, "connection"), name(node))
    except (LaunchError, OSError) as exc:
        log.warning("etcd's connections with %s, which is lost, cannot be ended: %s", name(node), exc)


def _follow_leader(me: Node) -> None:
    """Etcd outlives the run's leader here: without one the run is over in the end."""
    wait, moves = me.settings.node_wait, me.layout.role_moves
    if me.mirror.lead is not None if moves else 0 in me.mirror.nodes:
        me.alone_since = None
    elif me.alone_since is None:
        me.alone_since = me.loop.time()
        me.loop.call_later(wait + 0.1, me.wake.set)
    elif me.loop.time() - me.alone_since >= wait:
        lost = "the run's leader was lost, and nobody took over" if moves else "node 0, which leads the run, was lost"
        me.fail(DeadlineError(f"{lost}{'' if moves else ' and did not come back'} within {wait:g} s (node_wait)"))


async def bring_near(me: Node) -> None:
    """Start what leads Dynamo's processes of this node to a member that lives. Raises `LaunchError`."""
    store = me.layout.store
    if not store.several or me.layout.is_spare:
        return
    look(me)
    try:
        etcd_proxy.configure(store.near)
    except OSError as exc:
        raise LaunchError(f"the files of etcd's proxy cannot be written in {me.layout.node_dir.path}: {exc}") from None
    for service in store.near_services():
        await me.start_service(service)


async def _lead_elsewhere(me: Node, before: tuple[str, ...]) -> None:
    """A member is at another place now."""
    near, runner = me.layout.store.near, me.services.get(etcd_proxy.NAME)
    try:
        await asyncio.to_thread(etcd_proxy.move, near, before)
    except (OSError, ValueError) as exc:
        log.warning("etcd's proxy is started again, since it could not be told where the members are: %s", exc)
        if runner is not None:
            await runner.renew()


def _learned(me: Node, before: tuple[str, ...]) -> None:
    if me.report.link is not None:
        me.report.link.learn(me.layout.store.endpoints)
    if etcd_proxy.NAME in me.services and not me.stopping.is_set():
        me.spawn(_lead_elsewhere(me, before))


def record(me: Node) -> None:
    """In run.json, for whoever comes later."""
    if me.record is not None:
        if me.layout.store.several:
            me.record = replace(me.record, etcd_endpoints=me.layout.store.where.known)
        text = me.record.to_json()
        me.writer.replace(me.layout.run_dir.run_json, text)
        me.writer.here(me.layout.node_dir.path / me.layout.run_dir.run_json.name, text)
