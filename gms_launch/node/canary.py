"""Is the primary still giving tokens? A request for one token, when nobody else asks, and how long none may come.

An engine can hang with every process alive and its health answering: a collective that waits for ever. Only tokens show
it. Users' tokens do as well as ours, so an engine under load is never asked, and one that is slow and gives tokens is
never taken for dead. `TokenClock` is pure; `Canary` asks.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass

from gms_launch.node.tokens import Asked
from gms_launch.services.base import AwayError, NotReadyError
from gms_launch.settings.declared import Settings

#: Longest pause between two looks at the counters (seconds).
LOOK_EVERY = 5.0


@dataclass
class TokenClock:
    """When tokens last came. Times are seconds of one clock.

    `interval`: without a token for so long, one is asked for. `timeout`: without one for so long, although asked for,
    the engine hangs. `after`: the last token came after that moment, the last look but one that saw tokens.
    """

    interval: float
    timeout: float
    since: float
    count: float | None = None
    failed: int = 0
    looked: float | None = None
    after: float | None = None

    def counted(self, tokens: float | None, now: float) -> None:
        """So much has been answered in all; None when nobody counts."""
        if tokens is not None and tokens != self.count:
            self.token(now)
            self.after = self.looked
        self.count, self.looked = tokens, now

    def token(self, now: float) -> None:
        self.since, self.failed = now, 0

    def due(self, now: float) -> bool:
        """Time to ask for one."""
        return now - self.since >= self.interval

    def hung(self, now: float) -> bool:
        """One was asked for and did not come, and none has come for as long as may be."""
        return self.failed > 0 and now - self.since >= self.timeout


class Canary:
    """Watches one primary at a time. `hung` is what the controller is shown: the life, and why.

    `token_after`: the last token that was seen came after that moment (monotonic seconds).
    """

    def __init__(self, settings: Settings) -> None:
        self._interval, self._timeout = settings.canary_interval, settings.canary_timeout
        self._names = (f"gms-launch-canary-{k}" for k in itertools.count())
        self.hung: dict[tuple[int, int], str] = {}
        self.token_after: float | None = None

    async def watch(self, life: tuple[int, int], tokens: Asked) -> None:
        """Return when the life hangs, having said so in `hung`. Cancelled when it ends or another serves."""
        loop = asyncio.get_running_loop()
        clock = TokenClock(self._interval, self._timeout, time.monotonic())
        asking: asyncio.Future[str | None] | None = None
        reason: str | None = ""
        while True:
            try:
                counted = await loop.run_in_executor(None, tokens.signs)
            except AwayError:
                clock.token(time.monotonic())  # that says nothing of the engine
            else:
                clock.counted(counted, time.monotonic())
                self.token_after = clock.after or self.token_after
            if asking is not None and asking.done():
                reason, asking = asking.result(), None
                if reason:
                    clock.failed += 1
                else:
                    clock.token(time.monotonic())
            if clock.hung(time.monotonic()):
                self.hung = {life: f"hung: no token for {self._timeout:g} s (canary_timeout): {reason}"}
                return
            if asking is None and clock.due(time.monotonic()):
                asking = loop.run_in_executor(None, self._ask, tokens)
            await asyncio.sleep(min(LOOK_EVERY, self._interval / 2))  # nobody announces a token

    def _ask(self, tokens: Asked) -> str | None:
        """Ask for one token; why none came, nothing when one did, None when nobody could be asked."""
        try:
            # Half of what is left after the interval: two requests fail before the engine is taken for dead.
            patience = max(1.0, (self._timeout - self._interval) / 2)
            tokens.ask(patience, next(self._names))
        except AwayError:
            return None
        except NotReadyError as exc:
            return str(exc)
        return ""
