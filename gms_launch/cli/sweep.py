"""`gms-launch sweep`: clear this node of runs whose agent is dead. Also what a Slurm epilog calls.

As anybody else one's own; as root every user's, each by a child that has become that user (`process.become`), because
what is swept was named, linked and mounted by that user. Nobody's junk keeps another's run from being swept.
"""

from __future__ import annotations

import json
import os
import re
import sys
import syslog
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from gms_launch.errors import LaunchError, NoContactError, RefusedError, UsageError
from gms_launch.process import become, places, proc
from gms_launch.process.become import Owner
from gms_launch.run import dead, nodedir

#: For one owner, and as root for all of them, which are swept at the same time (seconds). The epilog gives it 60.
PATIENCE = 40.0
_ROOT = re.compile(r"gms-launch-([0-9]{1,10})(\..*)?")


@dataclass
class Report:
    """What one user's sweep found and did: names of dead and of living runs, lines for people, and what went wrong."""

    found: list[str] = field(default_factory=list)
    living: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def main(run: str | None, dry_run: bool) -> None:
    if run is not None and not dead.run_name(run):
        raise UsageError(f"{run!r} is not the name of a run")
    root = os.getuid() == 0
    report = everybody(run, dry_run) if root else own(run, dry_run)
    for line in report.said:
        print(printable(line))
    sys.stdout.flush()
    wrong = [printable(line) for line in report.wrong]
    if wrong and root:
        syslog.openlog("gms-launch", syslog.LOG_PID, syslog.LOG_DAEMON)
        for line in wrong:
            syslog.syslog(syslog.LOG_WARNING, f"sweep: {line}")
    if wrong:
        raise LaunchError("not everything could be swept: " + "; ".join(wrong))
    if report.found:
        return
    if run is None:
        print("nothing to sweep")
    elif any(run in (name, name.partition("+")[0]) for name in report.living):
        raise RefusedError(
            f"run {run} is up on this node, and only dead runs are swept; `gms-launch down --run {run}` stops it"
        )
    else:
        raise NoContactError(f"nothing of a run {run} is on this node")


def own(run: str | None, dry_run: bool) -> Report:
    """Sweep this user's dead runs, or the one that is meant."""
    report = Report()
    deadline = time.monotonic() + PATIENCE - 5.0
    with dead.look() as found:
        report.living, report.wrong = sorted(found.living), found.wrong
        for one in found.dead:
            if run is not None and run not in (one.run, one.name):
                continue
            report.found.append(one.name)
            pids = ", ".join(f"{i.pid} ({i.comm})" for i in one.processes) or "no process"
            user = os.getuid()
            report.said.append(f"run {one.run} of user {user}: {pids}" + (", files" if one.roots else ""))
            if dry_run:
                continue
            try:
                why = dead.clear(one, max(1.0, deadline - time.monotonic()))
            except BlockingIOError:
                report.said.append(f"run {one.run}: left to who has come to it meanwhile")
                continue
            if why:
                report.wrong.append(why)
            else:
                report.said.append(f"run {one.run}: swept")
    return report


def everybody(run: str | None, dry_run: bool) -> Report:
    """Sweep every user's, each as that user."""
    whole = Report()
    answers = become.each(owners(), lambda: json.dumps(asdict(own(run, dry_run))), PATIENCE)
    for owner, answer in sorted(answers.items(), key=lambda pair: pair[0].uid):
        one = Report(wrong=[answer.wrong] if answer.wrong else [])
        if not answer.wrong:
            one = Report(**json.loads(answer.text))
        whole.found += one.found
        whole.living += one.living
        whole.said += one.said
        whole.wrong += [f"{places.user(owner.uid)}: {line}" for line in one.wrong]
    return whole


def owners() -> list[Owner]:
    """Everybody who has a process here or a directory of runs. With each group of a user's processes, since the kernel
    shows a process's environment to its own group only."""
    found = {Owner(*who) for pid in proc.pids() if (who := proc.credentials(pid)) is not None}
    for name in _names():
        match = _ROOT.fullmatch(name)
        uid = int(match[1]) if match else -1
        path = nodedir.LOCAL_ROOT / name
        if match and places.own_directory(path, uid) and uid not in {owner.uid for owner in found}:
            found.add(Owner(uid, path.lstat().st_gid))
    found = {owner for owner in found if owner.uid not in (0, places.unmapped())} | {Owner(0, os.getgid())}
    return sorted(found, key=lambda owner: (owner.uid, owner.gid))


def _names() -> Iterable[str]:
    try:
        return os.listdir(nodedir.LOCAL_ROOT)
    except OSError:
        return ()


def printable(text: str) -> str:
    """One line without what a terminal or a log would take for more than text: users name their processes."""
    return "".join(c if c.isprintable() else "?" for c in text)
