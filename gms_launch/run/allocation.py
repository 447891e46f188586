"""What the scheduler that gave us our nodes thinks of one of them."""

from __future__ import annotations

import os

from gms_launch.errors import UsageError
from gms_launch.run.topology import expand
from gms_launch.transport import slurm

#: What an answer may take (seconds).
ANSWER = 5.0


def is_ours() -> bool:
    """Whether there is one to be asked."""
    return "SLURM_JOB_ID" in os.environ


def has_lost(host: str) -> bool:
    """Whether it has given a node up, or taken it out of our job; False too when it does not say. Blocks."""
    if slurm.is_down(host, ANSWER):
        return True
    try:
        left = expand(slurm.nodes_of(os.environ["SLURM_JOB_ID"], ANSWER))
    except UsageError:
        return False
    return bool(left) and host not in left
