"""What an agent does when nothing happens: look after what waits for the disk, ask GMS, kill what dead lives left."""

from __future__ import annotations

import asyncio

from gms_launch.node.node import Node
from gms_launch.process import strays
from gms_launch.spool.writer import Place

#: How often what waits for the disk is kept within bounds, and what is wrong there is told (seconds).
WRITING = 1.0
#: How often GMS is asked, and what would not die is killed again (seconds).
HOUSEKEEPING = 10.0
#: Between two ticks of a second: an agent that is that late stood still, and was not merely busy (seconds).
STALL = 5.0


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
            if not me.ready.is_set():
                # Somebody waits and looks on: how much is loaded, and for how long.
                await me.look_at_gms()
                me.ranks.memory_seen()
            elif me.gms.missed:
                await me.look_at_gms()  # whether it is gone is to be known soon
            if me.loop.time() >= due:
                due += HOUSEKEEPING
                await me.look_at_gms()
                me.strays = await me.ranks.sweep()
                # What only descent shows as ours, for the day when we are killed and nobody can tell any more.
                untagged = await me.loop.run_in_executor(None, strays.untagged, me.layout.run)
                me.guard.tell(untagged)
                me.ranks.fence_again()
        except Exception as exc:
            me.report.unexpected("upkeep", exc)
