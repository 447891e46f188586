"""`gms-launch switch-over`: a planned hand-over.

The primary is killed and its requests are held until a shadow serves them, as at a failover: of all ways to end an
engine that is the one that loses nothing. Unlike `kill-primary` it is never done without a parked shadow.
"""

from __future__ import annotations

import time
import uuid

from gms_launch.cli import kill_primary, which
from gms_launch.cohort.failover import Failover
from gms_launch.cohort.records import CommandRecord
from gms_launch.control.errand import Known, followed
from gms_launch.errors import DeadlineError, UsageError
from gms_launch.numbers import count
from gms_launch.observe import journal
from gms_launch.run import contact, rundir
from gms_launch.run.rundir import RunDir, RunFile
from gms_launch.settings.rules import shortened


def main(
    run: str | None, group: str | None, to: str | None, when_idle: float | None, timeout: float, as_json: bool
) -> None:
    directory, found = rundir.find(run)
    name = which.one_group(found, group)
    cohort = _cohort(to, found, name)
    if when_idle is not None:
        wait_idle(directory, found, when_idle)
    with followed() as known:
        failover = hand_over(directory, found, cohort, timeout, known, "switch-over", name)
    kill_primary.show(failover, as_json)


def _cohort(text: str | None, found: RunFile, group: str) -> int:
    """The cohort of a group that was named; -1 for none. Raises `UsageError`."""
    if text is None:
        return -1
    whose, said = (f"group {group}", found.groups[group]) if group else ("the run", found.settings)
    cohorts = int(said.get("shadows", 1)) + 1
    if (cohort := count(text)) is None or cohort >= cohorts:
        raise UsageError(f"--to {shortened(text)}: {whose} has cohorts 0 to {cohorts - 1}")
    return cohort


def hand_over(
    directory: RunDir, found: RunFile, to: int, timeout: float, known: Known, cause: str, group: str = ""
) -> Failover:
    """Ask for it in the name of the verb `cause`, of a run without groups or of one `group`, and follow it.

    Raises `RefusedError`, `NoContactError` and `DeadlineError`.
    """
    command = CommandRecord(uuid.uuid4().hex, "kill", time.time(), to=to, cause=cause)
    news = journal.Tail(directory.events)
    door = contact.door(directory, found)
    answer = kill_primary.ask(directory, door, command, timeout, known, group)
    victim = answer.cohort_id, answer.incarnation
    return kill_primary.follow(news, directory, found, victim, timeout, known, group)


def wait_idle(directory: RunDir, found: RunFile, seconds: float) -> None:
    """Wait for a moment in which the frontend has no request. Raises `DeadlineError` when none came.

    The leader's agent looks: the frontend may be on its node's loopback, and may ask for a key.
    """
    command = CommandRecord(uuid.uuid4().hex, "idle", time.time(), wait=seconds, cause="switch-over")
    result = kill_primary.answered(contact.door(directory, found), directory, command, seconds + 10.0)
    if not result.ok:
        raise DeadlineError(
            f"no quiet moment within {seconds:g} s (--when-idle): {found.frontend_url}: {result.detail}; "
            "nothing was done"
        )
