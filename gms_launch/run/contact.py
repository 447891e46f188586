"""The door to a recorded run: its etcd, from what run.json and the credentials say."""

from __future__ import annotations

from gms_launch.control.gateway import Gateway
from gms_launch.errors import NoContactError
from gms_launch.run.rundir import RunDir, RunFile


def gateway(directory: RunDir, run: RunFile, timeout: float = 3.0) -> Gateway:
    """The run's etcd. Raises `NoContactError` when the run has ended or has none yet."""
    if not run.live:
        ended = "ended" if run.ended is not None else "died: its agent is gone"
        raise NoContactError(
            f"run {directory.run} has {ended}; its logs are in {directory.logs}"
            + ("" if run.ended is not None else f". `gms-launch down --run {directory.run}` cleans up")
        )
    if not run.etcd_endpoints:
        raise NoContactError(f"run {directory.run} is still starting its etcd; its agent's log: {directory.agent_log}")
    if not run.etcd_auth:
        return Gateway(run.etcd_endpoints, timeout=timeout)
    return Gateway(run.etcd_endpoints, "root", directory.credentials().admin_password, timeout)
