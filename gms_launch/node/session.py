"""An agent's membership in its run: the line to etcd, the lease, the mirror, and whether the leader is within reach.

Turns what the control plane's threads report into a mirror and a few calls on the agent's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from gms_launch.cohort import arrival, census
from gms_launch.cohort.records import EventRecord, LeadRecord, NodeRecord
from gms_launch.cohort.seats import Exchange
from gms_launch.control import terms
from gms_launch.control.keys import DYNAMO_ROOT, Range, Share, followed, prefix
from gms_launch.control.mirror import Mirror
from gms_launch.control.sounding import reach
from gms_launch.errors import DeadlineError, LaunchError, NoContactError, UsageError, by_code
from gms_launch.node import returning
from gms_launch.node.reporter import Reporter
from gms_launch.run.credentials import DYNAMO, USES
from gms_launch.run.plan import Layout
from gms_launch.run.rundir import RunFile
from gms_launch.spool.reading import PATIENCE, within

if TYPE_CHECKING:
    from gms_launch.control.link import ControlLink

log = logging.getLogger("agent")

#: Who may what in the run's own etcd, besides its agents, which may all.
ROLES = {USES[DYNAMO].cn: (DYNAMO_ROOT,)}
#: How long before the lease ends a silent leader is looked for (seconds).
LOOK_AHEAD = 1.0
#: A leader whose machine answers and whose etcd does not: how long that may be a restart (seconds).
REFUSED_WAIT = 30.0
#: How often a node that is cut off looks whether the run has ended (seconds).
END_LOOK = 3.0


class Member(Protocol):
    """What the session tells its agent, always on its loop."""

    def control_changed(self) -> None:
        """The mirror says something new."""

    def control_resynced(self) -> None:
        """The mirror was made anew: what runs here must be reported again."""

    def instances(self, found: dict[str, bytes]) -> None:
        """What is registered in Dynamo's discovery now, all of it: instance keys and what they hold."""

    def cut_off(self, why: str) -> None:
        """The leader cannot be reached and this node's lease is over: others go on without it."""

    def lease_until(self, moment: float) -> None:
        """This node has its place until then (monotonic seconds), as far as is known."""

    def moved(self) -> None:
        """Another agent has this node's rank."""

    def give_up(self, error: LaunchError) -> None:
        """The leader has stayed away for too long, or has ended the run."""


@dataclass(frozen=True)
class Part:
    """What an agent is part of: a group, or the run. `layout` says at which place there."""

    layout: Layout
    mirror: Mirror
    report: Reporter


class Session:
    """One agent's session. Everything but `open` and `close` belongs on the loop.

    `groups` are the agent's own, in a run of groups; otherwise there are none beside the run.
    """

    def __init__(
        self, layout: Layout, mirror: Mirror, report: Reporter, member: Member, groups: Sequence[Part] = ()
    ) -> None:
        self._layout, self.mirror, self._report, self._member = layout, mirror, report, member
        self._groups = tuple(groups)
        self._parts = (Part(layout, mirror, report), *groups)
        self._settings = layout.settings
        self._loop = asyncio.get_running_loop()
        self._link: ControlLink | None = None
        self._renewed = asyncio.Event()
        self._sent = self.heard_since = 0.0
        self.mirrored = asyncio.Event()
        self.is_cut_off = False
        self._seated = True

    @property
    def may_act(self) -> bool:
        """Whether this node surely has its rank still. Where spares take lost nodes' places nothing is begun else."""
        return not self._settings.spares or (self._seated and (self.lease_left() or 0.0) > 0)

    def lease_left(self) -> float | None:
        """Seconds until this node takes itself for cut off, below 0 when it has; None before it has a lease."""
        if not self.mirrored.is_set():
            return None
        return self._sent + terms.silence(self._settings.lease_ttl) - time.monotonic()

    # -- opening and closing, in a thread ------------------------------------------------------------------------

    def open(self, record: NodeRecord) -> None:
        """Connect to etcd, have it ask who everybody is if it is ours, and take this node's place. Blocks.

        Raises `NoContactError`, `RefusedError` when somebody else has been at our etcd, `UsageError` when another
        agent has this node rank, and `MovedError` when a spare has been given it.
        """
        from gms_launch.control.link import ControlLink

        layout, keys = self._layout, self.mirror.keys
        link = ControlLink(layout.etcd_access, self._post, brisk=layout.store.several)
        self._link = self._report.link = link
        # A leader's etcd is young; the others have just heard from it.
        long = self._settings.service_timeout
        link.connect(keys, long if layout.founds else arrival.patience(layout.topology.nnodes, long))
        if layout.founds:
            if layout.own_etcd:
                link.establish(ROLES)
            link.forget(keys)
        else:
            returning.check(link, keys, record, self._settings.lease_ttl, layout.role_moves)
        key = keys.node(layout.topology.node_rank)
        if self._settings.spares:
            seat = layout.seat
            told = None if seat is None else seat.encode()
            link.only_while(keys.seat(layout.topology.node_rank), told, self._member.moved)
        self._sent = time.monotonic()
        holder = link.claim(key, record.encode(), self._settings.lease_ttl)
        if holder is not None:
            other = NodeRecord.decode(holder)
            text = (
                f"node rank {record.node_rank} is taken by {other.host} (agent {other.agent_pid}); "
                f"{record.host} was given the same rank"
            )
            link.put_now(keys.refusal(f"{record.boot_id}-{record.agent_pid}"), text.encode())
            raise UsageError(text)
        if layout.founds and layout.role_moves:
            lead = self.lead_record(link.lease).encode()
            link.take_lead(keys.lead, lead)
            link.lead_while(keys.lead, lead)
        speaks = any(p.layout.speaks for p in (self._groups or self._parts))
        link.listen(self._followed(), self._settings.lease_ttl, self, self._settings.namespace if speaks else None)

    def _followed(self) -> list[Range]:
        """What this agent has to know."""
        keys, spares = self.mirror.keys, self._settings.spares
        layout = self._layout
        run = Share(keys, layout.may_lead, self._settings.cohorts, layout.speaks)
        groups = [
            Share(p.mirror.keys, p.layout.topology.is_leader, p.layout.settings.cohorts, p.layout.speaks)
            for p in self._groups
        ]
        found = keys.everywhere() if layout.is_spare else followed(run, groups)
        found = [*found, prefix(keys.seats)] if spares and not run.leads else found
        if layout.role_moves:
            found = [*found, Range(keys.lead)]
        elif layout.store.several and not run.leads:
            # Where etcd has one member, that is with the leader, and tells of it by its own end.
            found = list(dict.fromkeys([*found, Range(keys.node(0))]))
        return found

    @property
    def leads(self) -> bool:
        """Whether this agent leads the run, as far as it knows: until its lease may be over, where the role moves."""
        if not self._layout.role_moves or not self.mirrored.is_set():
            return self._layout.founds
        lead = self.mirror.lead
        return lead is not None and lead.lease == self._report.lease and (self.lease_left() or 0.0) > 0

    def lead_record(self, lease: int) -> LeadRecord:
        place = self._layout.home
        return LeadRecord(place.node_rank, self._layout.origin, place.host, lease)

    def _establish_again(self) -> None:
        """Our etcd may have lost its data, and knows nobody then. Blocks."""
        assert self._link is not None
        try:
            self._link.establish(ROLES, again=True)
        except NoContactError as exc:
            log.warning("whether etcd asks who everybody is cannot be told: %s", exc)
        except LaunchError as exc:
            self._post(self._member.give_up, exc)

    def close(self, timeout: float, leave: bool = False) -> None:
        """Write what is left and end; `leave` this node's place to others. Blocks for `timeout` seconds at most."""
        if self._link is not None:
            self._link.close(timeout, leave)

    def ask_to_lead(self) -> None:
        """Ask for the run's leader role. Blocks. Raises `NoContactError`."""
        assert self._link is not None
        lease = self._report.lease
        self._link.take_lead(self.mirror.keys.lead, self.lead_record(lease).encode(), lease)

    def lead(self) -> None:
        """The role is ours: what the leader says is written from now on as long as that is so."""
        assert self._link is not None and self.mirror.lead is not None
        self._link.lead_while(self.mirror.keys.lead, self.mirror.lead.encode())

    def exchange(self, x: Exchange) -> bool:
        """Exchange seats if all is as it was when that was decided; says whether. Blocks. Raises `NoContactError`."""
        assert self._link is not None
        keys = self.mirror.keys
        places = [keys.seat(seat.node_rank) for seat in x.seats]
        before = {key: None if seat is None else seat.encode() for key, seat in zip(places, x.before, strict=True)}
        records = {key: seat.encode() for key, seat in zip(places, x.seats, strict=True)}
        return self._link.write_if({**before, keys.node(x.node_rank): None}, records)

    def _post(self, call: Callable[..., None], *arguments: Any) -> None:
        """Run `call` on the loop; from any thread, also while the loop is closing."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *arguments)

    # -- what etcd says ------------------------------------------------------------------------------------------

    def control_snapshot(self, found: dict[str, bytes]) -> None:
        for part in self._parts:
            self._renew(part, found)
        if self.mirrored.is_set():
            self._member.control_resynced()
        self.mirrored.set()
        self._member.control_changed()

    def _renew(self, part: Part, found: dict[str, bytes]) -> None:
        """Take over what is there. A leader's own memory is newer than a store that lost it."""
        mirror = part.mirror
        known, run, known_by_us = dict(mirror.desired), mirror.run, self.mirrored.is_set()
        seats = dict(mirror.seats)
        mirror.replace(found)
        leads = self.leads if part is self._parts[0] else part.layout.topology.is_leader
        if not known_by_us or not leads:
            return
        if part is self._parts[0] and mirror.run is None and self._layout.own_etcd:
            self._loop.run_in_executor(None, self._establish_again)
        for rank, seat in seats.items():
            if rank not in mirror.seats:
                mirror.seats[rank] = seat
                part.report.put(mirror.keys.seat(rank), seat.encode())
        mirror.desired = {**mirror.desired, **known}
        for cohort_id, record in known.items():
            part.report.put(mirror.keys.cohort(cohort_id), record.encode())
        if part is self._parts[0] or mirror.run is None or not mirror.run.failed:
            mirror.run = run
        part.report.run()

    def control_change(self, key: str, value: bytes | None) -> None:
        if key.startswith(self.mirror.keys.events):
            if value is not None:
                self._report.take_event(EventRecord.decode(value))
            return
        concerned = [p for p in self._parts if not self._says(p, key, value)]
        for part in concerned:
            part.mirror.apply(key, value)
            if problem := part.mirror.problems.get(key):
                log.warning("record %s is not readable: %s", key, problem)
        if concerned:
            self._member.control_changed()

    def _says(self, part: Part, key: str, value: bytes | None) -> bool:
        """Whether we say that ourselves: it is known here before etcd says it, and may be newer than its echo."""
        keys, topology = part.mirror.keys, part.layout.topology
        if part is not self._parts[0] and key == part.mirror.keys.run and census.says_over(value):
            return False  # the run's leader says so of a group that nobody leads
        own_rank = key.startswith(keys.ranks) and key.endswith(f"/{topology.node_rank}")
        of_all = part is self._parts[0]
        leads = self.leads if of_all else topology.is_leader
        return own_rank or (
            leads and (key.startswith(keys.desired) or key == keys.run or (of_all and key == keys.peers))
        )

    def control_state(self, reason: str | None) -> None:
        if reason is not None:
            log.warning("etcd: %s", reason)

    def instances(self, found: dict[str, bytes]) -> None:
        self._member.instances(found)

    def lease_granted(self, lease: int) -> None:
        self._report.lease = lease
        if self.mirrored.is_set() and self._settings.spares:
            self._seated = False
            self._loop.run_in_executor(None, self._sit_down, lease, self._report.record().encode())
        elif self.mirrored.is_set():
            self._member.control_resynced()

    def _sit_down(self, lease: int, record: bytes) -> None:
        """Take this node's place again under a new lease, unless it is another's. Blocks."""
        assert self._link is not None
        try:
            held = self._link.hold(self.mirror.keys.node(self._layout.topology.node_rank), record, lease)
        except Exception as exc:
            log.warning("this node's place could not be taken again: %s", exc)
            time.sleep(0.5)
            self._post(self._sit_down_again, lease)
            return
        self._post(self._sits if held else self._member.moved)

    def _sit_down_again(self, lease: int) -> None:
        if self._report.lease == lease and not self._seated:
            self._loop.run_in_executor(None, self._sit_down, lease, self._report.record().encode())

    def _sits(self) -> None:
        self._seated = True
        self._member.control_resynced()
        self._member.control_changed()

    def lease_renewed(self, sent: float) -> None:
        stale = not self.may_act
        if sent > self._sent + terms.silence(self._settings.lease_ttl):
            self.heard_since = time.monotonic()
        self._sent = max(self._sent, sent)
        self._renewed.set()
        if self._settings.spares:
            self._member.lease_until(self._sent + terms.silence(self._settings.lease_ttl))
            if stale and self.may_act:
                self._member.control_changed()
        if self.is_cut_off:
            self.is_cut_off = False
            log.warning("the leader answers again")
            self._member.control_changed()

    def lease_lost(self, reason: str) -> None:
        log.warning("node lease lost: %s", reason)
        self._seated = False
        self._report.emit("lease_lost", detail=reason)

    # -- is the leader still there -------------------------------------------------------------------------------

    async def watch_leader(self) -> None:
        """Notice in time that this node is cut off: its lease is over and its leader cannot be reached.

        A leader that refuses connections is on its feet and may be restarting etcd; one that accepts them and says
        nothing is frozen. Both get longer, unless etcd has several members.
        """
        ttl, wait = terms.silence(self._settings.lease_ttl), self._settings.node_wait
        while True:
            sent = self._sent
            await asyncio.sleep(max(0.0, sent + ttl - LOOK_AHEAD - time.monotonic()))  # and not upon each renewal
            if self._sent > sent:
                continue
            answer = await self._loop.run_in_executor(None, reach, self._layout.etcd_endpoints, LOOK_AHEAD * 0.9)
            if await self._has_ended(f"the leader does not answer ({answer})"):
                return
            limit = {"refused": max(2 * ttl, REFUSED_WAIT), "silent": wait}.get(answer, ttl)
            if self._layout.store.several:
                limit = ttl  # there are others who decide without us, and by then they may have
            if time.monotonic() - self._sent < limit:
                await self._silence(self._sent, min(limit, time.monotonic() - self._sent + LOOK_AHEAD))
                if time.monotonic() - self._sent < limit:
                    continue
            where = ", ".join(self._layout.etcd_endpoints)
            whom = "those who decide" if self._layout.store.several else "the leader"
            why = f"no contact with {whom} ({where}: {answer}) for {limit:g} s"
            if not self.is_cut_off:
                self.is_cut_off = True
                self._member.cut_off(why)
            while self.is_cut_off and time.monotonic() < self._sent + wait:
                await self._silence(self._sent, min(wait, time.monotonic() - self._sent + END_LOOK))
                if self.is_cut_off and await self._has_ended(why):
                    return
            if self.is_cut_off:
                self._member.give_up(DeadlineError(f"{why}, and not for {wait:g} s (node_wait) either"))
                return

    async def _has_ended(self, why: str) -> bool:
        """Give up when run.json says that this very run has ended: the leader could tell nobody through etcd."""

        def look() -> RunFile | None:
            with contextlib.suppress(NoContactError):
                return within(PATIENCE, self._layout.run_dir.read, None)
            return None

        run = await self._loop.run_in_executor(None, look)
        if run is None or run.attempt != self._layout.attempt or run.ended is None:
            return False
        reason = f": {run.reason}" if run.reason else ""
        self._member.give_up(by_code(run.exit_code or 1, f"{why}, and by run.json the run has ended{reason}"))
        return True

    async def _silence(self, since: float, seconds: float) -> None:
        """Wait until `seconds` after the renewal sent at `since`, or until a newer one."""
        self._renewed.clear()
        if self._sent > since:
            return
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._renewed.wait(), max(0.0, since + seconds - time.monotonic()))
