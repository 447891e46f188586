"""Has an engine given a token? A promotion is confirmed by one.

A user's token will do; one of our own is asked for only if nobody else asks. Does not judge how long that may take.
"""

from __future__ import annotations

import math
import time

from gms_launch.node.tokens import Tokens
from gms_launch.services.base import AwayError, NotReadyError

#: How long users' requests are waited for before the agent sends one of its own (seconds).
QUIET = 0.05
#: How long a request in flight is trusted to bring a token; it may be one that the dead engine left hanging (seconds).
PATIENCE = 2.0
#: What one of our own may take (seconds), and its name.
TIMEOUT, NAME = 5.0, "gms-launch-confirm"


class TokenWatch:
    """Looks for a token that came after this was made. In a thread. `why` says why none came."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._before: float | None = None
        self._listed_at: float | None = None
        self._quiet_since = 0.0
        self.why = ""
        #: Since when it can be held against the engine that no token comes (monotonic seconds): from the first, and
        #: never while who is to be asked is away.
        self.asked_since = 0.0

    def a_token_came(self) -> bool:
        """True once one did. Sends a request for one if it is there and nobody else asks."""
        try:
            came = self._look()
        except AwayError as exc:
            self.why, self.asked_since = str(exc), math.inf
            return False
        except NotReadyError as exc:
            self.why, came = str(exc), False
        if self.asked_since == math.inf:
            self.asked_since = time.monotonic()
        return came

    def _look(self) -> bool:
        if self._listed_at is None:
            counted = self._tokens.users()
            self._before = counted[0] if counted else self._before
            self.why = self._tokens.missing()
            if self.why:
                return False
            self._listed_at = self._quiet_since = time.monotonic()
        now, counted = time.monotonic(), self._tokens.users()
        if counted is not None:
            tokens, in_flight = counted
            if tokens > (self._before or 0.0):
                return True
            if in_flight and now - self._listed_at < PATIENCE:
                self._quiet_since = now  # that one's token will do
            if now - self._quiet_since < QUIET:
                return False
        self._tokens.ask(TIMEOUT, NAME, fresh=False)
        return True
