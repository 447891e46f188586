"""An agent takes a command before it carries it out, so that one that was withdrawn or has lapsed is not.

Taking and withdrawing are compares on one key in etcd: exactly one of them succeeds, whoever was stopped meanwhile,
and no clock is asked. A command is on the lease of whoever waits for it (see `errand`), and lapses with that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from gms_launch.cohort.records import CommandRecord
from gms_launch.errors import NoContactError

log = logging.getLogger("agent")


class Claims:
    """The commands that this agent has taken. `take(command)` asks etcd and blocks; `changed` is called afterwards."""

    def __init__(
        self,
        take: Callable[[CommandRecord], bool],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        changed: Callable[[], None],
    ) -> None:
        self._take, self._spawn, self._changed = take, spawn, changed
        self._asked: set[str] = set()
        self._taken: set[str] = set()

    def has(self, command: CommandRecord) -> bool:
        """True once a command is ours to carry out; asks for it when we have not yet."""
        if command.uuid not in self._asked:
            self._asked.add(command.uuid)
            self._spawn(self._ask(command))
        return command.uuid in self._taken

    def own(self, command: CommandRecord) -> None:
        """This agent gave the command itself: there is nobody to ask."""
        self._asked.add(command.uuid)
        self._taken.add(command.uuid)

    async def _ask(self, command: CommandRecord) -> None:
        try:
            taken = await asyncio.get_running_loop().run_in_executor(None, self._take, command)
        except NoContactError as exc:
            log.warning("command %s cannot be taken yet: %s", command.verb, exc)
            self._asked.discard(command.uuid)
        else:
            if taken:
                self._taken.add(command.uuid)
            else:
                log.info("command %s was withdrawn, has lapsed or is another agent's", command.verb)
        self._changed()
