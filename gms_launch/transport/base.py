"""A node to reach, and what a command on it came to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A node as its run recorded it. `slurm_job` is empty outside of Slurm."""

    host: str
    address: str
    slurm_job: str = ""


@dataclass(frozen=True)
class Done:
    """What a command on a node came to. `by` is the way it was reached: local, srun or ssh."""

    code: int
    out: str
    err: str
    by: str
