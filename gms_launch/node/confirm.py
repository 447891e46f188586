"""Has a token come through the frontend? A promotion is confirmed by one.

A user's token will do; one of our own is asked for only if nobody else asks. Does not judge how long that may take.
"""

from __future__ import annotations

import time

from gms_launch.run.plan import Layout
from gms_launch.services import frontend
from gms_launch.services.base import NotReadyError

#: How long users' requests are waited for before the agent sends one of its own (seconds).
QUIET = 0.05
#: How long a request in flight is trusted to bring a token; it may be one that the dead engine left hanging (seconds).
PATIENCE = 2.0


class TokenWatch:
    """Looks for a token that came through the frontend after this was made. In a thread. `why` says why none came."""

    def __init__(self, layout: Layout) -> None:
        self._where = layout.front.where
        self._model = layout.model_name
        self._before: float | None = None
        self._listed_at: float | None = None
        self._quiet_since = 0.0
        self.why = ""
        #: Since when it can be held against the engine that no token comes (monotonic seconds): from the first.
        self.asked_since = 0.0

    def a_token_came(self) -> bool:
        """True once one did. Sends a request for one if the model is there and nobody else asks."""
        try:
            if self._listed_at is None:
                counted = frontend.traffic(self._where)
                self._before = counted[0] if counted else self._before
                if not frontend.listed(self._where, self._model):
                    self.why = f"nothing serves {self._model}: the frontend lists no engine for it"
                    return False
                self._listed_at = self._quiet_since = time.monotonic()
            now, counted = time.monotonic(), frontend.traffic(self._where)
            if counted is not None:
                tokens, in_flight = counted
                if tokens > (self._before or 0.0):
                    return True
                if in_flight and now - self._listed_at < PATIENCE:
                    self._quiet_since = now  # that one's token will do
                if now - self._quiet_since < QUIET:
                    return False
            frontend.one_token(self._where, self._model)
        except NotReadyError as exc:
            self.why = str(exc)
            return False
        return True
