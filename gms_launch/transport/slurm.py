"""Slurm's commands, as far as we use them: its KillWait, whether it has given a node up, `srun` into a running job."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Sequence

from gms_launch.errors import NoContactError
from gms_launch.transport.base import Done


def kill_wait(timeout: float = 5.0) -> float | None:
    """Seconds between SIGTERM and SIGKILL in this cluster; None when Slurm does not say."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "config"], capture_output=True, text=True, timeout=timeout, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^KillWait\s*=\s*([0-9]+)", done.stdout, re.MULTILINE)
    return float(found.group(1)) if found else None


def is_down(host: str, timeout: float = 5.0) -> bool:
    """Whether Slurm has given a node up (state DOWN or FAIL); False too when it does not say."""
    try:
        asked = ["scontrol", "--oneliner", "show", "node", host]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=timeout, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    found = re.search(r"\bState=([A-Z+*~#]+)", done.stdout)
    return found is not None and not {"DOWN", "FAIL"}.isdisjoint(re.split(r"[+*~#]", found.group(1)))


def nodes_of(job: str, timeout: float = 5.0) -> str:
    """The node list of a job, as Slurm writes it: without those that it has lost. Empty when Slurm does not say."""
    try:
        asked = ["squeue", "--noheader", "--jobs", job, "--format", "%N"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=timeout, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def run(job: str, host: str, argv: Sequence[str], timeout: float) -> Done:
    """A command on one node of a job, beside what runs there. Raises `NoContactError`."""
    # Without --overlap the step would wait for the one that the run is in.
    step = ["srun", f"--jobid={job}", "--overlap", "-N1", "-n1", "-w", host, "--gres=none", "--chdir=/", "--input=none"]
    # Inside a step SLURM_* names describe that step, and srun would take them as options.
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    try:
        done = subprocess.run([*step, *argv], capture_output=True, text=True, timeout=timeout, check=False, env=env)
    except subprocess.TimeoutExpired:
        raise NoContactError(f"srun into job {job} on {host} did not end within {timeout:g} s") from None
    if done.returncode and not done.stdout and "srun: error" in done.stderr:
        raise NoContactError(f"srun into job {job} on {host}: {done.stderr.strip()}")
    return Done(done.returncode, done.stdout, done.stderr, "srun")


def still_running(job: str, patience: float = 3.0) -> bool:
    """True when a job holds its nodes, and does so for `patience` seconds; False too when Slurm does not say.

    What started a run in its job ends a moment after the run, and the job with it.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            asked = ["squeue", "-h", "-j", job, "-o", "%T"]
            done = subprocess.run(asked, capture_output=True, text=True, timeout=patience, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return False
        if done.stdout.strip() != "RUNNING":
            return False
        if time.monotonic() > deadline:
            return True
        time.sleep(0.2)  # Slurm announces nothing to those who are not in the job
