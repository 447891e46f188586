"""`gms-launch wait`: until the run has ended; the exit code is the run's.

For batch scripts: srun may hang for ever after a lost node, and its own exit code may be 0 for a run that failed.
"""

from __future__ import annotations

import os
import sys
import time

from gms_launch.errors import DeadlineError, by_code
from gms_launch.run import rundir
from gms_launch.run.rundir import RunDir, RunFile
from gms_launch.settings.rules import RUN_ID

POLL = 0.2


def main(run: str | None, timeout: float | None) -> None:
    deadline = None if timeout is None else time.monotonic() + timeout
    directory = _directory(run)
    found: RunFile | None = None
    told = False
    while True:
        # Its last record is what there is to go by when the home is not there any more.
        found = directory.read() or found
        if found is None and not told:
            told = True
            print(f"there is no run {directory.run} yet: waiting for it to begin and to end", file=sys.stderr)
        if found is not None and _over(found):
            if found.ended is None:
                raise by_code(
                    1,
                    f"run {directory.run}: its agent is gone and has not recorded an end in {directory.run_json}: it "
                    f"died, or could not write there; `gms-launch down --run {directory.run}` clears up",
                )
            if found.exit_code:
                raise by_code(found.exit_code, f"run {directory.run} failed: {found.reason}")
            print(f"run {directory.run} has ended")
            return
        if deadline is not None and time.monotonic() > deadline:
            raise DeadlineError(f"run {directory.run} has not ended within {timeout:g} s")
        time.sleep(POLL)  # the file is on the shared home: nothing announces a change there


def _directory(run: str | None) -> RunDir:
    """The run meant, which need not exist yet when it is named."""
    wanted = run or rundir.named(os.environ) or rundir.slurm_run_id(os.environ)
    return RunDir.of(wanted) if wanted and RUN_ID.match(wanted) else rundir.find(run)[0]


def _over(found: RunFile) -> bool:
    """True when this run has ended. Under Slurm the file may be that of the job's last attempt, before a requeue."""
    step = rundir.slurm_step(os.environ)
    earlier = found.slurm and step and found.slurm.split(".")[:2] != step.split(".")[:2]
    return not found.live and not earlier
