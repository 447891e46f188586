"""The proof of a promotion, and the watch on what is served.

A promotion is confirmed by a token, and tokens must go on coming for as long as a rank serves. How one is looked for is
in `confirm` and `half`, what is to happen when none comes is the controller's to decide.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from gms_launch.cohort.model import Phase
from gms_launch.node.confirm import TokenWatch
from gms_launch.node.group import Group
from gms_launch.node.half import Half
from gms_launch.node.rank import Rank
from gms_launch.node.tokens import Asked
from gms_launch.process import clock

#: Pause between two looks for a first token (seconds); the frontend announces nothing.
PAUSE = 0.005


async def confirm(me: Group, rank: Rank) -> None:
    """A promotion is done when that engine gives a token: to a user, or to us if nobody asks for one.

    Ours costs a prefill, and users wait at that very moment.
    """
    begun = time.monotonic()
    half = Half(me.desk, me.layout, rank.port) if me.layout.role != "agg" else None
    tokens: Asked = half or me.tokens(rank)
    seen = half or TokenWatch(me.tokens(rank))
    me.no_token, me.asked_since = "", seen.asked_since
    while rank.phase is Phase.ACTIVE and not me.stopping.is_set():
        if not await me.loop.run_in_executor(None, seen.a_token_came):
            me.no_token, me.asked_since = seen.why, seen.asked_since
            # Quickly while it is about to come, then without getting in anybody's way.
            await asyncio.sleep(PAUSE if time.monotonic() - begun < 2.0 else 0.2)
            continue
        if rank.phase is Phase.ACTIVE:
            if rank.hybrid:
                rank.token = True
                me.report.emit("token", *rank.life)
                me.ranks.publish(rank)
            else:
                confirmed(me, rank.life)
            me.wake.set()
            if me.canary is not None and me.settings.group_kill:
                me.spawn(_watch_tokens(me, rank, tokens))
        return


def confirmed(me: Group, life: tuple[int, int]) -> None:
    """A promotion is done."""
    me.confirmed = life
    before = me.canary.token_after if me.canary is not None else None
    data: dict[str, Any] = {} if before is None else {"token_after": before + clock.OFFSET}
    me.report.emit("first_token", *life, **data)


def look_at_tokens(me: Group) -> None:
    """With hybrid load balancing a promotion is done when a token has come from every node's engine."""
    for cohort_id, desired in me.mirror.desired.items():
        life, nodes = (cohort_id, desired.incarnation), range(me.layout.topology.nnodes)
        ranks = [r for n in nodes if (r := me.mirror.ranks.get((cohort_id, n))) and r.incarnation == life[1]]
        serving = [r for r in ranks if r.phase is Phase.ACTIVE and r.token]
        if life != me.confirmed and len(serving) == len(nodes):
            confirmed(me, life)


async def _watch_tokens(me: Group, rank: Rank, tokens: Asked) -> None:
    """For as long as a rank serves, see that tokens come."""
    assert me.canary is not None
    watching = me.loop.create_task(me.canary.watch(rank.life, tokens))
    ended = me.loop.create_task(rank.ended.wait())
    try:
        await asyncio.wait({watching, ended}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            watching.result()
            if not me.is_leader and rank.phase is Phase.ACTIVE:
                me.ranks.hung(rank, me.canary.hung[rank.life])
        me.wake.set()
    finally:
        watching.cancel()
        ended.cancel()
