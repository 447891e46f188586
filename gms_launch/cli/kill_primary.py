"""`gms-launch kill-primary`: ask the controller, then watch the failover through the run's journal."""

from __future__ import annotations

import json
import re
import time
import uuid

from gms_launch import rundir
from gms_launch.cohort.failover import Failover, fold
from gms_launch.control.records import CommandRecord, CommandResult
from gms_launch.errors import DeadlineError, NoContactError, RefusedError, UsageError
from gms_launch.observe import contact, journal
from gms_launch.rundir import RunDir

POLL = 0.02


def main(run: str | None, force: bool, scope: str, timeout: float, as_json: bool) -> None:
    if not re.fullmatch(r"group|leader|rank:\d+", scope):
        raise UsageError(f"--scope {scope!r}: expected group, leader or rank:N")
    directory, found = rundir.find(run)
    door = contact.gateway(directory, found)
    mirror, shot = contact.read(directory, door)
    if scope.startswith("rank:") and int(scope[5:]) >= shot.nnodes:
        raise UsageError(f"--scope {scope}: the run has {shot.nnodes} nodes, ranks count from 0")
    command = CommandRecord(uuid.uuid4().hex, "kill", time.time(), scope=scope, force=force)
    door.put(mirror.keys.command(command.uuid), command.encode())
    result = _result(door, mirror.keys.result(command.uuid), timeout)
    if not result.ok:
        raise RefusedError(result.detail)
    failover = _follow(directory, (result.cohort_id, result.incarnation), timeout)
    if as_json:
        print(json.dumps(failover.to_json(), indent=1))
        return
    from rich.console import Console

    from gms_launch.observe import views

    Console().print(views.failover(failover))


def _result(door: object, key: str, timeout: float) -> CommandResult:
    deadline = time.monotonic() + min(timeout, 10.0)
    while time.monotonic() < deadline:
        answer = door.get_prefix(key).get(key)  # type: ignore[attr-defined]
        if answer is not None:
            return CommandResult.decode(answer)
        time.sleep(POLL)  # etcd's JSON gateway has no watch that is worth its set-up here
    raise NoContactError("the leader's agent did not answer within 10 s; see `gms-launch status` and the agent's log")


def _follow(directory: RunDir, victim: tuple[int, int], timeout: float) -> Failover:
    """Wait until the failover of `victim` has ended in a token from somebody else."""
    deadline = time.monotonic() + timeout
    while True:
        for failover in fold(journal.read(directory.events)):
            if failover.victim == victim and "first_token" in failover.steps:
                return failover
        if time.monotonic() > deadline:
            raise DeadlineError(
                f"cohort {victim[0]} was killed, and no other cohort served a token within {timeout:g} s; "
                "see `gms-launch status` and `gms-launch timeline --events`"
            )
        time.sleep(POLL)  # the journal is a file on the shared home, possibly of another node: no event crosses that
