"""`gms-launch kill-primary`: ask the controller, then watch the failover through the run's journal.

When etcd is away there is nobody to ask: the recorded process groups are then killed directly, on every node, here,
through Slurm or by SSH, each checked by its start time.
"""

from __future__ import annotations

import json
import re
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gms_launch.cli import which
from gms_launch.cohort.failover import Failover, fold
from gms_launch.cohort.model import CohortView, Phase, primary
from gms_launch.cohort.records import CommandRecord, CommandResult, EventRecord
from gms_launch.control.door import Door
from gms_launch.control.errand import Errand, Known, followed
from gms_launch.control.keys import Keys
from gms_launch.errors import DeadlineError, LaunchError, NoContactError, RefusedError, UsageError
from gms_launch.numbers import numbered
from gms_launch.observe import history, journal, look
from gms_launch.process import clock, lifecycle, proc
from gms_launch.run import contact, rundir
from gms_launch.run.rundir import RunDir, RunFile
from gms_launch.settings.rules import shortened
from gms_launch.transport import gms_launch, run_on
from gms_launch.transport.base import Target

POLL = 0.02
#: What is said of a recorded group that is not there any more.
GONE = "or it is gone"
#: A journal that does not tell by then may not be written: etcd is asked, and again after so long (seconds).
LATE = 1.0
#: Where to look for what goes on without us.
SEE = "see `gms-launch status` and `gms-launch timeline`"
#: How long after the first token what became of the requests is waited for (seconds).
COUNTED = 5.0


def main(run: str | None, group: str | None, force: bool, scope: str, timeout: float, as_json: bool) -> None:
    if not re.fullmatch(r"group|leader|rank:[0-9]{1,9}", scope):
        raise UsageError(f"--scope {shortened(scope)}: expected group, leader or rank:N")
    directory, found = rundir.find(run)
    name = which.one_group(found, group)
    whose, nnodes = (f"group {name}", len(found.groups[name]["nodes"])) if name else ("the run", found.nnodes)
    if scope.startswith("rank:") and int(scope[5:]) >= nnodes:
        raise UsageError(f"--scope {scope}: {whose} has {numbered(nnodes, 'node')}, ranks count from 0")
    news = journal.Tail(directory.events)
    killed: float | None = None
    with followed() as known:
        try:
            door = contact.door(directory, found)
            look.read(directory, door)
        except NoContactError as exc:
            if not found.live:
                raise
            # Only before anything was asked for: a request that is still to be carried out would kill twice.
            victim, killed = kill_directly(directory, found, name, scope, force, str(exc), known)
        else:
            command = CommandRecord(uuid.uuid4().hex, "kill", time.time(), scope=scope, force=force)
            answer = ask(directory, door, command, timeout, known, name)
            victim = answer.cohort_id, answer.incarnation
        failover = follow(news, directory, found, victim, timeout, known, name)
    show(failover if killed is None else failover.killed_at(killed), as_json)


def show(failover: Failover, as_json: bool) -> None:
    """Print what happened."""
    if as_json:
        print(json.dumps(failover.to_json(), indent=1))
        return
    from gms_launch.observe import views

    views.console().print(views.failover(failover))


def ask(
    directory: RunDir, door: Door, command: CommandRecord, timeout: float, known: Known, group: str = ""
) -> CommandResult:
    """Let the controller do it; returns its answer, which is `known` from then on.

    What is not answered in time is withdrawn.

    Raises `RefusedError`, `DeadlineError` and `NoContactError`.
    """
    somebody_decides(directory, door, group)
    result = answered(door, directory, command, min(timeout, 10.0), known, group)
    if not result.ok:
        raise RefusedError(result.detail)
    return result


def somebody_decides(directory: RunDir, door: Door, group: str) -> None:
    """Raise `RefusedError` for a group that is over, and `NoContactError` where the node that leads it is not here."""
    if not group:
        return
    shot = look.of(look.read(directory, door)[1], group)
    if shot.over:
        raise RefusedError(f"group {group} is over: {shot.over}")
    if 0 in shot.missing:
        raise NoContactError(
            f"node {shot.leader}, which leads group {group}, is not here: not come yet, stopped, cut off or gone. "
            "Nothing was asked for; `gms-launch status` says what is waited for"
        )


def answered(
    door: Door, directory: RunDir, command: CommandRecord, wait: float, known: Known | None = None, group: str = ""
) -> CommandResult:
    """What the leader's agent says to a command, within `wait` seconds. Raises `DeadlineError`, `NoContactError`."""
    deadline = time.monotonic() + wait
    with Errand(door, Keys(directory.run, group), command) as errand:
        try:
            while (result := errand.answer()) is None:
                if time.monotonic() > deadline:
                    whose, log = (f"group {group}'s", f"--group {group} agent") if group else ("the", "agent")
                    raise DeadlineError(
                        f"{whose} leader's agent did not answer within {wait:g} s: {errand.withdraw()}; "
                        f"its log may tell why (`gms-launch logs {log}`)"
                    )
                time.sleep(POLL)  # a watch is not worth its set-up here
            if result.ok and known is not None:
                known.text = f"the request was granted ({result.detail}) and is carried out; {SEE}"
        except NoContactError as exc:
            raise NoContactError(f"{exc}, after it was asked: {errand.withdraw()}") from None
    return result


def kill_directly(
    directory: RunDir, found: RunFile, group: str, scope: str, force: bool, why: str, known: Known
) -> tuple[tuple[int, int], float]:
    """Kill the recorded process groups of the primary of `group`; returns its life, and when (Unix seconds).

    Raises `RefusedError`, and `LaunchError` by host.
    """
    try:
        listed = json.loads(directory.text(directory.ranks_of(group)))
    except (OSError, ValueError) as exc:
        raise NoContactError(f"{why}; and {directory.ranks_of(group)} cannot be read: {exc}") from None
    leaders = [r for r in listed["ranks"] if r["node_rank"] == 0]
    views = [CohortView(r["cohort_id"], r["incarnation"], Phase(r["phase"])) for r in leaders]
    target = primary(views)
    if target is None:
        raise RefusedError(f"{why}; and by {directory.ranks_of(group)} no cohort is primary")
    if not force and not any(v.phase is Phase.PARKED for v in views):
        raise RefusedError(
            f"{why}; and by {directory.ranks_of(group)} no shadow is parked to take over: wait, or use --force"
        )
    wanted = None if scope == "group" else 0 if scope == "leader" else int(scope[5:])
    ranks = [
        r
        for r in listed["ranks"]
        if (r["cohort_id"], r["incarnation"]) == (target.cohort_id, target.incarnation)
        and (wanted is None or r["node_rank"] == wanted)
    ]
    hosts = {n["node_rank"]: Target(n["host"], n["address"], found.slurm_job) for n in listed["nodes"]}
    print(  # not where --json prints
        f"{why}; killing the recorded groups of cohort {target.cohort_id} on {numbered(len(ranks), 'node')}",
        file=sys.stderr,
        flush=True,
    )

    gone: list[str] = []

    def kill(rank: dict[str, Any]) -> str:
        host = hosts[rank["node_rank"]]
        try:
            done = run_on(host, gms_launch("kill-group", str(rank["pid"]), str(rank["start"])))
            failed = "" if done.code == 0 else f"{host.host}: {done.err.strip().removeprefix('gms-launch: ')}"
        except LaunchError as exc:
            failed = str(exc)
        if GONE in failed:
            gone.append(host.host)  # its peers' agents were quicker: a rank dies with the others
            return ""
        return failed

    known.text = f"cohort {target.cohort_id} may be killed on some nodes already, and on others not; {SEE}"
    killed = clock.now()
    with ThreadPoolExecutor(max(1, min(32, len(ranks)))) as pool:
        errors = [e for e in pool.map(kill, ranks) if e]
    if errors:
        raise LaunchError("not killed everywhere: " + "; ".join(errors))
    if len(gone) == len(ranks):
        raise RefusedError(
            f"{why}; and no recorded group of cohort {target.cohort_id} is there any more: nothing was killed"
        )
    return (target.cohort_id, target.incarnation), killed


def kill_group(pid: int, start: int) -> None:
    """`kill-group PID START`: SIGKILL the group of that very process on this node."""
    if pid <= 1:
        raise UsageError(f"kill-group {pid}: that is no process group of a run")
    if not lifecycle.kill_group(proc.ProcessId(pid, start)):
        raise RefusedError(f"process group {pid} is not the recorded one (start time {start}), {GONE}: not touched")


def follow(
    news: journal.Tail,
    directory: RunDir,
    found: RunFile,
    victim: tuple[int, int],
    timeout: float,
    known: Known,
    group: str = "",
) -> Failover:
    """Wait until the failover of `victim` has ended in a token from somebody else, and its requests were counted."""
    begun = time.monotonic()
    deadline, look = begun + timeout, begun + LATE
    events: list[EventRecord] = []
    served, served_at = None, 0.0
    known.text = f"cohort {victim[0]} (life {victim[1]}) is being killed or is dead, as asked; no token came yet; {SEE}"
    while True:
        fresh = news.new()
        events += fresh
        told = events
        if not fresh and time.monotonic() > look:
            told, look = history.events(directory, found), time.monotonic() + LATE
        for failover in fold(told, found.nnodes, which.sizes(found)) if fresh or told is not events else ():
            if (failover.group, failover.victim) == (group, victim) and "first_token" in failover.steps:
                served = failover
                served_at = served_at or time.monotonic()
                known.text = f"done: cohort {victim[0]} (life {victim[1]}) was killed, and another one serves; {SEE}"
        if served is not None and (served.over or time.monotonic() > served_at + COUNTED):
            return served
        if time.monotonic() > deadline:
            raise DeadlineError(
                f"cohort {victim[0]} was killed, and no other cohort served a token within {timeout:g} s; "
                "see `gms-launch status` and `gms-launch timeline --events`"
            )
        time.sleep(POLL)  # the journal is a file on the shared home, possibly of another node: no event crosses that
