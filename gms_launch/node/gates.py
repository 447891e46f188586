"""The lock files that an agent holds against its own cohorts (--activation agent): the leader's, or every node's where
each registers engines of its own (--dp-lb hybrid).

Each cohort waits for a file of its own, and letting go of it is what makes that cohort serve. The guard inherits the
descriptors: a flock belongs to the open file and not to a process, so when the agent is killed the guard goes on
holding the locks until everything of the node is dead, and no engine can become active by that death.
Whom to let go is decided in `activation`.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path

from gms_launch.errors import LaunchError
from gms_launch.process import proc


class Gates:
    """One gate a cohort, shut from the start on. `paths` is empty where the cohorts share one lock."""

    def __init__(self, paths: Mapping[int, Path]) -> None:
        self._paths = paths
        self._fds: dict[int, int] = {}

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What a guard is to inherit."""
        return tuple(self._fds.values())

    def take(self) -> None:
        """Make and shut all of them. Raises `LaunchError`."""
        for cohort_id, path in self._paths.items():
            try:
                self._fds[cohort_id] = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._fds[cohort_id], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holders = ", ".join(str(i.pid) for i in proc.lock_keepers([path])) or "nobody that can be seen"
                raise LaunchError(
                    f"the lock {path} is held by another process ({holders}); `gms-launch sweep`"
                ) from None
            except OSError as exc:
                raise LaunchError(f"the lock {path} cannot be made: {exc.strerror}") from None

    def shut(self, cohort_id: int) -> bool:
        """Hold the gate of a cohort before a life of it is started; False while something else has that lock."""
        if cohort_id not in self._fds:
            return True
        try:
            fcntl.flock(self._fds[cohort_id], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def open(self, cohort_id: int) -> None:
        """Let a cohort serve."""
        fcntl.flock(self._fds[cohort_id], fcntl.LOCK_UN)
