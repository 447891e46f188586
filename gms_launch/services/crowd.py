"""Other users of this machine at ports of a service's or an engine's where they have no business.

A port of the loopback is open to them all, and whoever may connect may hold connections, by the thousand and without a
word, until there is no place for the run's own processes. The kernel says whose each is: theirs are ended. Few are
nothing to act on, and are not looked for.
"""

from __future__ import annotations

import logging
import os
import time

from gms_launch.errors import LaunchError
from gms_launch.numbers import numbered
from gms_launch.process import listener

log = logging.getLogger("agent")

#: Who has fewer descriptors has no crowd.
CROWD = 128
#: How often the same is told, and the run's own many are gone through (seconds).
AGAIN = 30.0


class Crowd:
    """What is held at the `ports` of one process, looked at again and again."""

    def __init__(self, name: str, ports: tuple[int, ...]) -> None:
        self._name, self.ports = name, ports
        self._most, self._rests = CROWD, 0.0
        self._ended, self._told = 0, -AGAIN
        self._failed = -AGAIN

    def look(self, pid: int) -> str:
        """End what is others'; what has been ended, for people, and empty when that was told a moment ago. Blocks."""
        held, now = _descriptors(pid) if self.ports and pid else 0, time.monotonic()
        if held < CROWD or (held < self._most and now < self._rests):
            return ""
        try:
            ended = listener.turn_out(pid, self.ports)
        except (OSError, LaunchError) as exc:
            # Refused for good, or the service has just ended: at the next look we know.
            if now - self._failed >= AGAIN:
                self._failed = now
                log.warning("%s: connections of other users cannot be ended: %s", self._name, exc)
            return ""
        # One that has many, and all of them the run's own, is not gone through at every look. Nor is it never again:
        # it may have ended a crowd's at that very moment, and they come anew.
        self._most, self._rests = (CROWD, 0.0) if ended else (2 * held, now + AGAIN)
        self._ended += ended
        if not self._ended or now - self._told < AGAIN:
            return ""
        said = f"{numbered(self._ended, 'connection')} of other users of this machine to port "
        self._ended, self._told = 0, now
        return said + " and ".join(map(str, self.ports)) + " ended"


def _descriptors(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0
