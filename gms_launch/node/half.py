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
from gms_launch.node.confirm import NAME, TIMEOUT
from gms_launch.node.desk import Desk
from gms_launch.run.plan import Layout
from gms_launch.services.base import AwayError, NotReadyError


class Half:
    """One life of such an engine, with its counters on `port`. In threads.

    `asked_since`: it has been asked since then (monotonic seconds; infinite: nobody did yet). `why` no token came.
    """

    def __init__(self, desk: Desk, layout: Layout, port: int) -> None:
        self._desk, self._model, self._port = desk, layout.model_name, port
        self._timeout = layout.settings.health_timeout
        self.asked_since, self.why = math.inf, ""

    def a_token_came(self) -> bool:
        """Ask for one, and tell whether it came and this engine had a part in it."""
        try:
            before = self._work()
            if before.asked:
                self.asked_since = min(self.asked_since, time.monotonic())
            if not self._desk.listed(self._model):
                self.why = f"nobody can ask it: {self._model} is not served, which takes the other half too"
                return False
            self._desk.one_token(self._model, 0, TIMEOUT, NAME, fresh=True)
            self.why = "a token came, and it had no part in that"
            return self._work().answered > before.answered
        except NotReadyError as exc:
            self.why = str(exc)
            return False

    def signs(self) -> float:
        """What it has answered. Raises `AwayError`."""
        try:
            return self._work().answered
        except NotReadyError as exc:
            raise AwayError(str(exc)) from None

    def ask(self, timeout: float, name: str, fresh: bool = True) -> None:
        """Ask for a token within `timeout` seconds. Raises `NotReadyError` if that reached this engine and it said
        nothing, and `AwayError` if nobody could be asked.
        """
        before = self._work()
        try:
            self._desk.one_token(self._model, 0, timeout, name, fresh)
        except AwayError:
            raise
        except NotReadyError:
            after = self._work()
            if after.asked > before.asked and after.answered == before.answered:
                raise

    def _work(self) -> Work:
        found = signals.work(LOOPBACK, self._port, self._timeout)
        if found is None:
            raise NotReadyError(f"no answer on its system port {self._port}")
        return found
