"""Has a prefill or a decode engine done its part of a request? Its own counters say so.

It is asked through the frontend, as users do, and so the other half is too. A token shows that both did their part, and
no token does not show whose fault that is: what has not reached an engine is not held against it.
"""

from __future__ import annotations

import math
import time

from gms_launch.engines import signals
from gms_launch.engines.base import LOOPBACK
from gms_launch.engines.signals import Work
from gms_launch.run.plan import Layout
from gms_launch.services import frontend
from gms_launch.services.base import NotReadyError


class Half:
    """One life of such an engine, with its counters on `port`. In threads.

    `asked_since`: it has been asked since then (monotonic seconds; infinite: nobody did yet). `why` no token came.
    """

    def __init__(self, layout: Layout, port: int) -> None:
        self._where, self._model, self._port = layout.front.where, layout.model_name, port
        self._timeout = layout.settings.health_timeout
        self.asked_since, self.why = math.inf, ""

    def a_token_came(self) -> bool:
        """Ask for one, and tell whether it came and this engine had a part in it."""
        try:
            before = self._work()
            if before.asked:
                self.asked_since = min(self.asked_since, time.monotonic())
            if not frontend.listed(self._where, self._model):
                self.why = f"nobody can ask it: {self._model} is not served, which takes the other half too"
                return False
            frontend.one_token(self._where, self._model)
            self.why = "a token came, and it had no part in that"
            return self._work().answered > before.answered
        except NotReadyError as exc:
            self.why = str(exc)
            return False

    def count(self) -> tuple[float, float]:
        """What it has answered, and been asked. Raises `NotReadyError`."""
        done = self._work()
        return done.answered, done.asked

    def silent(self, patience: float, name: str) -> str:
        """Ask for a token within `patience` seconds; why, if that reached this engine and it said nothing."""
        before = self._work()
        try:
            frontend.one_token(self._where, self._model, patience, name)
        except NotReadyError as exc:
            after = self._work()
            return str(exc) if after.asked > before.asked and after.answered == before.answered else ""
        return ""

    def _work(self) -> Work:
        found = signals.work(LOOPBACK, self._port, self._timeout)
        if found is None:
            raise NotReadyError(f"no answer on its system port {self._port}")
        return found
