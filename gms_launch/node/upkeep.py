"""What an agent does when nothing happens: look after what waits for the disk, ask GMS, kill what dead lives left."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from gms_launch.cohort.model import Redundancy
from gms_launch.errors import NoContactError, UsageError
from gms_launch.node.node import Node
from gms_launch.numbers import numbered
from gms_launch.process import strays
from gms_launch.run.front import Front
from gms_launch.services import etcd, proxy
from gms_launch.spool.reading import PATIENCE, within
from gms_launch.spool.writer import Place

log = logging.getLogger("agent")

#: How often etcd is asked for its alarms, and between two tries to make room in it (seconds).
ALARMS = 2.0
RELIEF = 30.0
#: How often what waits for the disk is kept within bounds, and what is wrong there is told (seconds).
WRITING = 1.0
#: How often GMS is asked, and what would not die is killed again (seconds).
HOUSEKEEPING = 10.0
#: How often the file of the clients' keys is read (seconds).
KEYS = 2.0
#: Between two ticks of a second: an agent that is that late stood still, and was not merely busy (seconds).
STALL = 5.0


async def follow_keys(me: Node, known: tuple[str, ...]) -> None:
    """Take other keys when the file has others: for requests from then on, and no stream is cut.

    The file may be on a home that hangs. One that is wrong changes nothing, and is told once.
    """
    front, told = me.layout.front, ""
    while True:
        await asyncio.sleep(KEYS)
        try:
            found = await asyncio.to_thread(within, PATIENCE, partial(_keys, front), known)
            if found == known:
                told = ""
                continue
            wrong = found if isinstance(found, str) else await asyncio.to_thread(_renew, front, found)
            if not wrong and not isinstance(found, str):
                known, told = found, ""
                me.report.emit("keys", detail=f"{numbered(len(found), 'key')} from now on")
            elif wrong != told:
                told = wrong
                me.report.emit("keys_refused", detail=wrong)
                me.progress(f"clients' keys stay as they were: {wrong}")
        except Exception as exc:
            me.report.unexpected("the clients' keys", exc)


def _keys(front: Front) -> tuple[str, ...] | str:
    """The keys, or what is wrong with their file."""
    try:
        return front.keys()
    except UsageError as exc:
        return str(exc)


def _renew(front: Front, hashes: tuple[str, ...]) -> str:
    """Give the proxy other keys; why that failed, or nothing."""
    try:
        proxy.renew(front.proxy, hashes)
    except OSError as exc:
        return str(exc)
    return ""


async def watch_alarms(me: Node) -> None:
    """Tell of etcd's alarms, and of their end. Of our own etcd, make room when it has run out of it.

    It is not started again for one: an alarm is in its data, and it answers.
    """
    link = me.report.link
    assert link is not None
    tried = 0.0
    while True:
        await asyncio.sleep(ALARMS)
        if not me.leads:
            continue
        try:
            found = await asyncio.to_thread(link.alarms)
        except NoContactError:
            continue  # its keeper sees to that
        except Exception as exc:
            if not me.layout.own_etcd:
                return  # who may not ask is not told
            me.report.unexpected("etcd's alarms", exc)
            continue
        if found != me.alarms:
            for alarm in sorted(set(found) - set(me.alarms)):
                me.report.emit("etcd_alarm", detail=alarm)
                me.progress(f"etcd has raised the alarm {alarm}: it refuses writes, and no engine can register")
            for alarm in sorted(set(me.alarms) - set(found)):
                me.report.emit("etcd_alarm_over", detail=alarm)
                me.progress(f"etcd's alarm {alarm} is over")
            me.alarms = found
            me.wake.set()
        if "NOSPACE" in found and me.layout.own_etcd and me.loop.time() - tried > RELIEF:
            tried = me.loop.time()
            await asyncio.to_thread(_relieve, me)


def _relieve(me: Node) -> None:
    """Make room in the run's own etcd. Blocks."""
    assert me.report.link is not None
    try:
        store = me.layout.store
        whom = [store.credentials.access((url,)) for url in store.endpoints] if store.several else []
        enough = me.report.link.relieve(etcd.RESERVED, whom)
        log.warning("etcd: history was forgotten to make room: %s", "enough" if enough else "not enough")
        if wanting := etcd.reserve(me.layout.node_dir.etcd_data):
            log.warning("no room could be taken for etcd's records: %s", wanting)
    except Exception as exc:
        log.warning("no room could be made in etcd: %s", exc)


async def notice_stalls(me: Node) -> None:
    """Tell of a time in which the agent did nothing: it was stopped, paused with its machine, or hung on a disk.

    What happened meanwhile has the moment at which it was seen.
    """
    last = me.loop.time()
    while True:
        await asyncio.sleep(WRITING)  # and nothing else, so that it is late when the loop is
        now = me.loop.time()
        if now - last > STALL:
            me.report.emit("stood_still", detail=f"this agent did nothing for {now - last:.1f} s", seconds=now - last)
        last = now


async def keep_up(me: Node) -> None:
    """Goes on for as long as the agent does; an error of ours in one round is not the end of the rounds."""
    told: tuple[Place, ...] = ()
    due = me.loop.time() + HOUSEKEEPING
    while True:
        await asyncio.sleep(WRITING)
        try:
            me.writer.tick()
            if (places := me.writer.places()) != told:
                told = places
                me.wake.set()
            for group in me.groups:
                if group.redundancy is Redundancy.FULL:
                    group.ranks.warm.keep()
            if not me.ready.is_set():
                # Somebody waits and looks on: how much is loaded, and for how long.
                await me.look_at_gms()
                for group in me.groups:
                    group.ranks.memory_seen()
            elif any(g.gms.missed for g in me.groups):
                await me.look_at_gms()  # whether it is gone is to be known soon
            if me.loop.time() >= due:
                due += HOUSEKEEPING
                await me.look_at_gms()
                swept = [await g.ranks.sweep() for g in me.groups]
                me.strays = tuple(s for found in swept for s in found)
                me.reap()
                # What only descent shows as ours, for the day when we are killed and nobody can tell any more.
                untagged = await me.loop.run_in_executor(None, strays.untagged, me.layout.run)
                me.guard.tell(untagged)
                for group in me.groups:
                    group.ranks.fence_again()
        except Exception as exc:
            me.report.unexpected("upkeep", exc)
