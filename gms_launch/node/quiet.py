"""A moment in which the frontend has no request, waited for by the leader: only its node reaches the frontend for sure.

Says when there is one, and keeps nobody from coming in afterwards.
"""

from __future__ import annotations

import asyncio
import time

from gms_launch.cohort.records import CommandRecord, CommandResult
from gms_launch.node.node import Node
from gms_launch.numbers import numbered
from gms_launch.process import clock
from gms_launch.services.base import NotReadyError

#: Pause between two looks (seconds); the frontend announces nothing.
POLL = 0.05


def answer(me: Node) -> None:
    """Begin with every command that asks for such a moment. It changes nothing, so nobody has to take it."""
    for command in me.mirror.commands.values():
        if command.verb == "idle" and command.uuid not in me.answered:
            me.answered.add(command.uuid)
            me.spawn(_wait(me, command))


async def _wait(me: Node, command: CommandRecord) -> None:
    """Whoever asked may be gone: then nothing comes of it."""
    deadline = time.monotonic() + command.wait
    seen = "nothing was heard from it"
    while True:
        try:
            counted = await asyncio.to_thread(me.near.traffic)
        except NotReadyError as exc:
            seen = str(exc)
        else:
            if counted is None:
                seen = "its metrics do not tell how many requests it has"
            elif counted[1] == 0:
                return _say(me, command, True, "")
            else:
                inside = int(counted[1])
                seen = f"{numbered(inside, 'request')} {'was' if inside == 1 else 'were'} in flight at the last look"
        if time.monotonic() > deadline or command.uuid not in me.mirror.commands:
            return _say(me, command, False, seen)
        await asyncio.sleep(POLL)


def _say(me: Node, command: CommandRecord, idle: bool, seen: str) -> None:
    result = CommandResult(idle, seen, -1, 0, clock.now())
    me.report.put(me.mirror.keys.result(command.uuid), result.encode())
