"""What the scheduler that gave us our nodes thinks of one of them."""

from __future__ import annotations

import os

from gms_launch.transport import slurm

#: What an answer may take (seconds).
ANSWER = 5.0


def is_ours() -> bool:
    """Whether there is one to be asked."""
    return "SLURM_JOB_ID" in os.environ


def is_down(host: str) -> bool:
    """Whether it has given a node up; False too when it does not say. Blocks."""
    return slurm.is_down(host, ANSWER)
