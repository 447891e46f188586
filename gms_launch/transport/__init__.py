"""Run a command of ours on a node of a run: here, through Slurm, or by SSH. `run_on` picks the way."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence

from gms_launch.interpreter import module
from gms_launch.transport.base import Done, Target


def gms_launch(*args: str) -> list[str]:
    """Our own command line, as it runs here; a run's nodes share the installation."""
    return [*module(sys.executable, "gms_launch", *args)]


def run_on(target: Target, argv: Sequence[str], timeout: float = 30.0) -> Done:
    """Run a command on a node. Raises `NoContactError` when no way leads there."""
    if target.host == socket.gethostname().partition(".")[0]:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False)
        return Done(done.returncode, done.stdout, done.stderr, "local")
    if target.slurm_job and shutil.which("srun"):
        import gms_launch.transport.slurm as slurm

        return slurm.run(target.slurm_job, target.host, argv, timeout)
    import gms_launch.transport.ssh as ssh

    with ssh.connect(target.address or target.host, timeout=min(timeout, 10.0)) as connection:
        return connection.run(argv, timeout)
