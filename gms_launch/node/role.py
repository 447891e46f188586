"""This agent and the run's leader role, where that moves: asks for it when it is due, and begins to lead.

When it is due is `cohort.leadership`'s word, and whether this agent leads `Session.leads`. What it says as the leader
goes through `Reporter.say`, which etcd refuses once the role is another's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gms_launch.cohort import leadership
from gms_launch.cohort.records import EventRecord, LeadRecord, RunState
from gms_launch.errors import LaunchError, NoContactError
from gms_launch.node import members
from gms_launch.node.node import Node
from gms_launch.process import clock
from gms_launch.run.rundir import RunFile
from gms_launch.spool.reading import PATIENCE, within

log = logging.getLogger("agent")


#: How far back the journal is made up for (seconds), and how much of its end is read for that (bytes).
BACK = 120.0
TAIL = 4 * 2**20
#: How often, and how many times, is looked whether another leader has written run.json (seconds).
AGAIN, TRIES = 1.0, 60


class Role:
    """One agent's. `begins()` is called when it begins to lead a run that goes on."""

    def __init__(self, me: Node, begins: Callable[[], None]) -> None:
        self._me, self._begins = me, begins
        self._had = me.layout.founds
        self._vacant: float | None = None
        self._asking = False
        self._known: LeadRecord | None = None

    def look(self, now: float) -> float | None:
        """See whether the role has come or gone, and ask for it when it is due; returns when to look again though
        nothing happened. `now` in monotonic seconds.
        """
        me = self._me
        if not me.layout.role_moves:
            return None
        leads, had = me.leads, self._had
        self._had = leads
        if leads and not had:
            self._begin()
        elif had and not leads:
            me.progress("this agent does not lead the run any more")
        if me.layout.founds and me.mirror.lead is not None and me.mirror.lead != self._known:
            self._known = me.mirror.lead
            if not leads:
                me.spawn(self._copy(me.mirror.lead.node_rank))
        self._vacant = leadership.vacant_since(me.mirror.lead, self._vacant, now)
        run = me.mirror.run
        if leads or self._asking or run is None or run.state is not RunState.ADMITTED:
            return None
        if not me.report.lease or (me.session.lease_left() or 0.0) <= 0:
            return None
        at = leadership.claim_at(me.node_rank, self._vacant, me.mirror.nodes, me.mirror.seats, me.layout.store.members)
        if at is None or at > now:
            return at
        self._asking = True
        me.spawn(self._ask())
        return None

    async def _ask(self) -> None:
        """What comes of it is heard from etcd, also when the answer is lost."""
        me = self._me
        try:
            await asyncio.to_thread(me.session.ask_to_lead)
        except NoContactError as exc:
            log.warning("the run's leader role cannot be asked for: %s", exc)
        except Exception as exc:
            me.report.unexpected("asking for the run's leader role", exc)
        finally:
            await asyncio.sleep(leadership.TURN)
            self._asking = False
            me.wake.set()

    def _begin(self) -> None:
        me = self._me
        me.report.hold_journal()
        me.session.lead()
        self._begins()
        me.members = self._told()
        place = me.layout.home
        me.report.run(leader=place.node_rank, leader_address=place.address)
        me.progress("this agent leads the run from now on: its leader was lost")
        me.report.emit("leads", detail=f"node {place.node_rank} ({place.host}) leads the run")
        me.spawn(self._catch_up())
        me.spawn(self._record())

    def _told(self) -> dict[int, str]:
        """Where the members are by the last leader's word, by node rank: the lost one's too, or all on every node would
        be led elsewhere, and again when it is back.
        """
        told = self._me.mirror.run.etcd if self._me.mirror.run is not None else ()
        return dict(enumerate(told)) if len(told) == self._me.layout.store.members else {}

    async def _catch_up(self) -> None:
        """What happened while nobody led is in etcd; what the last leader had not written yet, too."""
        me, missed = self._me, list[bytes]()
        try:
            missed = await asyncio.to_thread(_missed, me)
        except Exception as exc:
            me.report.unexpected("what the journal lacks", exc)
        finally:
            me.report.fill_journal(missed)

    async def _copy(self, leader: int) -> None:
        """The first node has a copy of run.json, which is to say who leads now too."""
        me = self._me
        run_json = me.layout.run_dir.run_json
        for _ in range(TRIES):
            text = await asyncio.to_thread(within, PATIENCE, run_json.read_text, "")
            with contextlib.suppress(ValueError):
                if json.loads(text).get("leader_rank") == leader:
                    me.writer.here(me.layout.node_dir.path / run_json.name, text)
                    return
            await asyncio.sleep(AGAIN)  # nothing announces a file on the shared home

    async def _record(self) -> None:
        """In run.json, for whoever comes later: what was there, and that this agent leads."""
        me = self._me
        own = me.record
        if own is None:
            return

        def look() -> RunFile | None:
            try:
                return within(PATIENCE, me.layout.run_dir.read, None)
            except LaunchError:
                return None

        found = await asyncio.to_thread(look)
        if found is None or found.attempt != own.attempt or not me.leads:
            found = own
        me.record = replace(
            own,
            created=found.created,
            etcd_endpoints=me.layout.store.where.known or found.etcd_endpoints,
            frontend_url=found.frontend_url,
            frontend_urls=found.frontend_urls,
            ports=found.ports,
            groups=found.groups,
            slurm=found.slurm,
        )
        members.record(me)


def _missed(me: Node) -> list[bytes]:
    """Lines that the journal lacks of what has happened lately. Blocks."""
    link = me.report.link
    assert link is not None
    known: frozenset[bytes] | None = within(PATIENCE, lambda: _tail(me.layout.run_dir.events), None)
    if known is None:
        return []  # nothing rather than all of it twice
    since = clock.now() - BACK
    events = [EventRecord.decode(value) for _, value in sorted(link.under(me.mirror.keys.events).items())]
    lines = [e.encode() + b"\n" for e in events if e.time >= since]
    return [line for line in lines if line not in known]


def _tail(path: Path) -> frozenset[bytes]:
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        return frozenset(file.readlines())
