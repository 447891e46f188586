"""Which of this node's lives is registered with Dynamo, and what follows from it.

A life that is registered serves; its socket is then ready to be held (`holds`) when it ends, and its lease to be ended
at the right moment. One that serves and is registered no more is dead, whatever its processes do.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from gms_launch.cohort.hold import Around
from gms_launch.cohort.model import ALIVE, Phase
from gms_launch.cohort.registrations import Candidate, Registrations, owner
from gms_launch.control.keys import dynamo_lease
from gms_launch.node.desk import Desk
from gms_launch.node.holds import Holds, Life
from gms_launch.node.rank import Rank
from gms_launch.node.reporter import Reporter
from gms_launch.node.standing import Standing
from gms_launch.process.listener import advertised
from gms_launch.run.plan import Layout

#: How long an engine that serves may be missing in discovery (seconds); to register anew takes it a moment.
UNREGISTERED_GRACE = 2.0


class Discovery:
    """`ranks` gives this node's newest lives; `dead(rank, why)` takes one for dead that lives; `desk` is the way to the
    frontend.
    """

    def __init__(
        self,
        layout: Layout,
        report: Reporter,
        spawn: Callable[[Coroutine[Any, Any, Any]], None],
        ranks: Callable[[], Iterable[Rank]],
        dead: Callable[[Rank, str], None],
        desk: Desk,
    ) -> None:
        self._layout, self._report, self._spawn, self._ranks, self._dead = layout, report, spawn, ranks, dead
        self._registered = Registrations()
        self._missing: set[Life] = set()
        self._ended: set[Life] = set()
        self._waking: dict[Life, float] = {}
        self._standing = Standing(lambda: report.link, layout.settings.dynamo_lease_ttl)
        on = bool(layout.settings.migration_limit)
        self._holds = Holds(on, report, spawn, self._around, self._keep, self._revoke, desk)

    def ended(self, life: Life) -> None:
        """A life has ended: hold what it was asked, and end its leases in time. Once said is enough."""
        if life not in self._ended:
            self._ended.add(life)
            self._holds.ended(life)
            self._holds.news()  # to those that waited for this one

    @property
    def leases(self) -> tuple[int, ...]:
        """Under which the engines of this node's are registered now."""
        return self._registered.owned()

    def instance(self, life: Life) -> int:
        """The lease under which a life is registered now; 0 when it is not."""
        return next((lease for lease in self._registered.of(life) if self._registered.here([lease])), 0)

    def stop(self) -> None:
        """The run is being stopped: nothing is held any more."""
        self._holds.stop()

    def _find(self, life: Life) -> Rank | None:
        return next((r for r in self._ranks() if r.life == life), None)

    def doubted(self, life: Life) -> None:
        """A life may hang, and nobody renews its lease then: its requests wait until that is decided."""
        if life not in self._missing:  # that is decided there, by whether it comes back itself
            self._spawn(self._keep(life))

    def seen(self, found: dict[str, bytes]) -> None:
        """What is registered in Dynamo's discovery now: each instance belongs to exactly one life.

        The kernel names the lock's holder, also of a lock that nothing has told of yet: a log may be silent.
        """
        for lease in self._registered.seen([n for key in found if (n := dynamo_lease(key)) is not None]):
            life = owner(
                Candidate(r.life, r.phase, r.holds(self._layout.lock_of(r.cohort_id)))
                for r in self._ranks()
                if r.speaks and r.phase in ALIVE
            )
            self._registered.belongs(lease, life)
            self._spawn(self._standing.learn(lease))
            if life is not None and (rank := self._find(life)) is not None:
                rank.read_log()  # discovery may be quicker than the log
                rank.reached(Phase.ACTIVE)
        for key, record in found.items():
            self._arm(dynamo_lease(key), record)
        self._holds.news()
        for rank in self._ranks():
            if self._is_missing(rank) and rank.life not in self._missing:
                self._missing.add(rank.life)
                self._spawn(self._miss(rank))

    def _arm(self, lease: int | None, record: bytes) -> None:
        """Be ready to hold the requests of the engine that an instance belongs to."""
        life = self._registered.owner(lease) if lease is not None else None
        rank = self._find(life) if life is not None else None
        where = advertised(record)
        if rank is not None and rank.child is not None and rank.phase is Phase.ACTIVE and where is not None:
            rank.requests = where[1]
            self._holds.arm(rank.life, rank.child.pgid, where)

    def _serves(self, rank: Rank) -> bool:
        return rank.phase is Phase.ACTIVE and not rank.stopping

    def _is_missing(self, rank: Rank) -> bool:
        """True for a rank that served, and that no frontend can find any more."""
        return self._serves(rank) and self._registered.lost(rank.life)

    async def _miss(self, rank: Rank) -> None:
        """Take an engine for dead whose registration stays away: it may live on, and nobody asks it anything.

        Until then it is registered by us, so that what is new waits if it does not answer any more.
        """
        own, settings, ours = self._registered.of(rank.life), self._layout.settings, None
        try:
            if settings.migration_limit and settings.group_kill and (ours := await self._standing.lease()) is not None:
                self._registered.belongs(ours, rank.life)
                await self._standing.stand_in(own[0], ours)
            self._report.emit("unregistered", *rank.life, "it serves, and its registration with Dynamo is gone")
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(rank.ended.wait(), UNREGISTERED_GRACE)
            if not self._serves(rank):
                return  # what is held ends all its leases
            if self._registered.here(own):
                await self._standing.end([ours] if ours is not None else [])
            elif settings.group_kill:
                why = f"hung: it lives, and has not been registered with Dynamo for {UNREGISTERED_GRACE:g} s"
                self._dead(rank, why)
        finally:
            self._missing.discard(rank.life)

    def _around(self, life: Life) -> Around:
        """How things stand for the requests of a dead life: is there somebody to go to, or will there be?"""
        now, settings = time.monotonic(), self._layout.settings
        others = [r for r in self._ranks() if r.life != life and r.speaks]
        for rank in others:
            if rank.phase in (Phase.WAKING, Phase.ACTIVE):
                self._waking.setdefault(rank.life, now)
        candidates = [r for r in others if r.phase in (Phase.PARKED, Phase.WAKING, Phase.ACTIVE)]
        return Around(
            begun=now,
            now=now,
            successor=any(r.phase is Phase.ACTIVE and self._registered.present(r.life) for r in others),
            candidate=bool(candidates),
            candidate_since=max((self._waking.get(r.life, 0.0) for r in candidates), default=0.0),
            promotion_timeout=settings.promotion_timeout,
            cold_start=settings.hold_cold_start,
        )

    async def _keep(self, life: Life) -> None:
        """Let the frontends go on knowing a life that is dead or hangs."""
        await self._standing.keep(self._registered.of(life))

    async def _revoke(self, life: Life) -> None:
        """End a dead life's leases, so that the router forgets it now and not when they run out."""
        for lease in await self._standing.end(self._registered.of(life)):
            self._report.emit("lease_revoked", *life, f"{lease:x}")
