"""The door to a recorded run: its etcd, from what run.json and the credentials say."""

from __future__ import annotations

from gms_launch.control.door import Door
from gms_launch.errors import NoContactError
from gms_launch.run.rundir import RunDir, RunFile


def door(directory: RunDir, run: RunFile, timeout: float = 3.0) -> Door:
    """The run's etcd. Raises `NoContactError` when the run has ended, has none yet, or is another version's."""
    if not run.live:
        ended = "ended" if run.ended is not None else "died: its agent is gone"
        raise NoContactError(
            f"run {directory.run} has {ended}; its logs are in {directory.logs}"
            + ("" if run.ended is not None else f". `gms-launch down --run {directory.run}` cleans up")
        )
    if not run.etcd_endpoints:
        raise NoContactError(f"run {directory.run} is still starting its etcd; its agent's log: {directory.agent_log}")
    return Door(directory.credentials(run).access(run.etcd_endpoints), timeout)
