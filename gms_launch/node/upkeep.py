"""What an agent does when nothing happens: look after what waits for the disk, ask GMS, kill what dead lives left."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from gms_launch.process import guard, strays

if TYPE_CHECKING:
    from gms_launch.node.agent import Agent
    from gms_launch.spool.writer import Place

#: How often what waits for the disk is kept within bounds, and what is wrong there is told (seconds).
WRITING = 1.0
#: How often GMS is asked, and what would not die is killed again (seconds).
HOUSEKEEPING = 10.0


async def keep_up(agent: Agent) -> None:
    """Goes on for as long as the agent does; an error of ours in one round is not the end of the rounds."""
    told: tuple[Place, ...] = ()
    due = agent.loop.time() + HOUSEKEEPING
    while True:
        await asyncio.sleep(WRITING)
        try:
            agent.writer.tick()
            if (places := agent.writer.places()) != told:
                told = places
                agent.wake.set()
            if not agent.ready.is_set():
                # Somebody waits and looks on: how much is loaded, and for how long.
                await agent.look_at_gms()
                agent.ranks.memory_seen()
            if agent.loop.time() >= due:
                due += HOUSEKEEPING
                await agent.look_at_gms()
                agent.strays = await agent.ranks.sweep()
                # What only descent shows as ours, for the day when we are killed and nobody can tell any more.
                untagged = await agent.loop.run_in_executor(None, strays.untagged, agent.layout.run)
                guard.tell(agent.guard_pipe, untagged)
                agent.ranks.fence_again()
        except Exception as exc:
            agent.report.unexpected("upkeep", exc)
