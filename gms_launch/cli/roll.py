"""`gms-launch roll -- ENGINE ARGS`: other engine arguments without an outage.

The leader's agent restarts the shadows, one at a time, and goes back by itself when they do not start
(`cohort.roll`); this command asks for it, follows it and then switches over. When it is interrupted the run is as safe
as before: the roll goes on or goes back, and only the switch-over is left to be asked for.
"""

from __future__ import annotations

import json
import time
import uuid

from gms_launch.cli import kill_primary, switch_over, which
from gms_launch.cohort.model import Phase, Redundancy
from gms_launch.cohort.records import CommandRecord
from gms_launch.control.door import Door
from gms_launch.control.errand import Known, followed
from gms_launch.errors import DeadlineError, LaunchError, UsageError
from gms_launch.observe import history, look
from gms_launch.observe.snapshot import Snapshot
from gms_launch.run import contact, rundir
from gms_launch.run.rundir import RunDir
from gms_launch.settings import arguments

#: Pause between two looks at the run (seconds): engines take seconds to start.
POLL = 0.2
#: What etcd says of a roll may be heard so long before its note is in the journal (seconds).
NOTED = 3.0


def main(
    run: str | None,
    group: str | None,
    engine_args: list[str] | None,
    shadow_only: bool,
    timeout: float | None,
    as_json: bool,
) -> None:
    directory, found = rundir.find(run)
    name = which.one_group(found, group)
    engine = (found.groups[name] if name else found.settings).get("engine")
    if engine != "command" and (problem := arguments.problem(engine_args or ())):
        raise UsageError(problem)
    patience = timeout if timeout is not None else float(found.settings.get("start_timeout", 1800.0))
    door = contact.door(directory, found)
    begun = time.time()
    args = tuple(engine_args) if engine_args else None
    command = CommandRecord(uuid.uuid4().hex, "roll", begun, engine_args=args)
    with followed() as known:
        kill_primary.ask(directory, door, command, patience, known, name)
        shot = _until_restarted(directory, door, name, patience, as_json, known)
        if shadow_only:
            if as_json:
                print(json.dumps({"generation": shot.generation, "switched": False}))
            return
        failover = switch_over.hand_over(directory, found, -1, patience, known, "roll", name)
        known.text = f"done: generation {shot.generation} serves; the old primary's slot is started again with it"
        kill_primary.show(failover, as_json)
        _until_full(directory, door, name, patience)


def _until_restarted(directory: RunDir, door: Door, group: str, patience: float, quiet: bool, known: Known) -> Snapshot:
    """Wait until every shadow is parked with the new arguments; `patience` is for each of them.

    Raises `LaunchError` when the run went back to the old ones, and `DeadlineError`.
    """
    wanted, done, last = 0, -1, time.monotonic()
    whose = f" --group {group}" if group else ""
    while True:
        shot = look.of(look.read(directory, door)[1], group)
        if not wanted:
            wanted = shot.generation
            known.text = (
                f"generation {wanted} is under way, and goes on or back without this command: shadows are started "
                "again with the new arguments, the primary serves with the old ones; the next failover or "
                f"`gms-launch switch-over{whose}` goes to a shadow that is parked, with the new ones if it has them by "
                "then; see `gms-launch status`"
            )
        if shot.generation < wanted:
            raise LaunchError(_why_back(directory, group))
        shadows = [c for c in shot.cohorts if c.phase is not Phase.ACTIVE and not c.given_up]
        new = [c for c in shadows if c.generation >= wanted and c.phase is Phase.PARKED]
        if len(new) != done:
            done, last = len(new), time.monotonic()
            if not quiet:
                print(f"{done} of {len(shadows)} shadows are parked with the new arguments", flush=True)
        if len(new) == len(shadows) and new and not shot.rolling:
            known.text = (
                f"generation {wanted} is parked in every shadow, and the primary serves with the old arguments: the "
                f"next failover or `gms-launch switch-over{whose}` uses the new ones"
            )
            return shot
        if time.monotonic() - last > patience:
            raise DeadlineError(
                f"{done} of {len(shadows)} shadows were parked with the new arguments, and none more within "
                f"{patience:g} s; the primary still serves with the old ones; see `gms-launch status`"
            )
        time.sleep(POLL)


def _why_back(directory: RunDir, group: str) -> str:
    """What the leader's agent noted when it went back."""
    deadline = time.monotonic() + NOTED
    while not (backs := [e for e in history.written(directory) if (e.kind, e.group) == ("rolled_back", group)]):
        if time.monotonic() > deadline:
            return (
                "the engine did not start with the new arguments; the run went back to the old ones; "
                f"`gms-launch logs --run {directory.run}` lists the logs, and the newest cohort's says why"
            )
        time.sleep(POLL)
    last = backs[-1]
    whose = f"--group {group} " if group else ""
    log = f"gms-launch logs --run {directory.run} {whose}cohort-{last.cohort_id}.{last.incarnation}"
    return (
        f"cohort {last.cohort_id} did not start with the new arguments ({last.detail}); the run went back to the old "
        f"ones and nobody was disturbed; `{log}` says why"
    )


def _until_full(directory: RunDir, door: Door, group: str, patience: float) -> None:
    """Wait until the old primary's slot is parked again, with the new arguments."""
    deadline = time.monotonic() + patience
    while look.of(look.read(directory, door)[1], group).redundancy is not Redundancy.FULL:
        if time.monotonic() > deadline:
            raise DeadlineError(
                f"the new arguments serve, and redundancy was not full again within {patience:g} s; "
                "see `gms-launch status`"
            )
        time.sleep(POLL)
