"""Keeps an engine's registration standing that the engine itself does not keep any more.

A dead engine's requests can wait only for as long as the frontends know it: when its lease runs out, or it has taken
its keys away itself on its way out, they end what waits and refuse what comes. So its lease is renewed in its place,
and what is gone is put back under a lease of ours. `end` takes all of it away. Everything asks etcd, in a thread.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

from gms_launch.control.link import ControlLink
from gms_launch.errors import LaunchError

log = logging.getLogger("agent")

T = TypeVar("T")

#: When after its first key an engine's registration is read (seconds): it stores several, one after the other.
LEARN = (0.0, 1.0)


class Standing:
    """`link` gives the line to etcd; `ttl` is how long a lease of ours lasts without us (seconds)."""

    def __init__(self, link: Callable[[], ControlLink | None], ttl: float) -> None:
        self._link, self.ttl = link, ttl
        self._records: dict[int, dict[str, bytes]] = {}
        self._ours: dict[int, int] = {}
        self._over: set[int] = set()
        self._turn = asyncio.Lock()  # what was taken away must not be put back by a look that had begun before

    async def learn(self, lease: int) -> None:
        """Note what an engine has registered under its lease, for the day when it is gone."""
        for pause in LEARN:
            await asyncio.sleep(pause)
            if found := await self._ask(lambda link: link.registration(lease)):
                self._records.setdefault(lease, {}).update(found)

    async def keep(self, leases: Iterable[int]) -> None:
        """Renew the leases of an engine; what is not there is put back."""
        async with self._turn:
            for lease in leases:
                if lease not in self._over:
                    await self._ask(partial(self._keep, lease=lease))

    def _keep(self, link: ControlLink, lease: int) -> None:
        """In a thread."""
        alive = link.keep(lease)
        known = self._records.get(lease, {})
        missing = known if not alive else {k: v for k, v in known.items() if k not in link.registration(lease)}
        if missing:
            ours = self._ours.get(lease)
            self._ours[lease] = link.put_back(missing, self.ttl, ours if ours and link.keep(ours) else 0)

    async def lease(self) -> int | None:
        """A new lease of ours; None when etcd gives none."""
        return await self._ask(lambda link: link.grant(self.ttl))

    async def stand_in(self, lease: int, ours: int) -> None:
        """Register under `ours` what an engine has taken away, as one more engine at the same address.

        Under names of its own, so that the engine's are free: it may come back to them.
        """
        its, own, records = f"{lease:x}", f"{ours:x}", self._records.get(lease, {})
        found = {key.replace(its, own): _renamed(value, lease, ours) for key, value in records.items()}
        async with self._turn:
            if ours not in self._over:
                await self._ask(lambda link: link.put_back(found, self.ttl, ours))

    async def end(self, leases: Iterable[int]) -> list[int]:
        """Take an engine's registration away; returns the leases of its own that ended by this."""
        ended = []
        async with self._turn:
            for lease in leases:
                self._over.add(lease)
                ours = self._ours.pop(lease, None)
                self._records.pop(lease, None)
                if await self._ask(partial(_revoke, lease=lease)):
                    ended.append(lease)
                if ours is not None:
                    await self._ask(partial(_revoke, lease=ours))
        return ended

    async def _ask(self, question: Callable[[ControlLink], T]) -> T | None:
        link = self._link()
        if link is None:
            return None
        try:
            return await asyncio.get_running_loop().run_in_executor(None, question, link)
        except LaunchError as exc:
            log.warning("the registration of an engine could not be looked after: %s", exc)
            return None


def _renamed(record: bytes, lease: int, ours: int) -> bytes:
    """A record in Dynamo's discovery, for another instance."""
    try:
        found = json.loads(record)
    except ValueError:
        return record
    if isinstance(found, dict) and found.get("instance_id") == lease:
        found["instance_id"] = ours
    return json.dumps(found).encode()


def _revoke(link: ControlLink, lease: int) -> bool:
    return link.revoke(lease)
