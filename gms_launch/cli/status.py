"""`gms-launch status`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from gms_launch.cli import timeline
from gms_launch.cli.layout import document
from gms_launch.cohort.model import Redundancy
from gms_launch.control.door import Door
from gms_launch.errors import NoContactError, UsageError
from gms_launch.observe import look
from gms_launch.observe.snapshot import Snapshot
from gms_launch.observe.stamp import stamp
from gms_launch.run import contact, rundir
from gms_launch.run.rundir import RunDir, RunFile

#: Between two looks of --watch (seconds).
PAUSE = 0.5


#: Of --exit-code. 2 is also what wrong settings end with; a message on stderr tells them apart.
CODES = {Redundancy.FULL: 0, Redundancy.DEGRADED: 1, Redundancy.NONE: 1, Redundancy.DOWN: 2}


def main(run: str | None, group: str | None, watch: bool, form: str, exit_code: bool, html: Path | None) -> None:
    if watch and (exit_code or form == "yaml"):
        raise UsageError(f"--watch never ends: it goes with no {'--exit-code' if exit_code else '-o yaml'}")
    if html is not None and exit_code:
        raise UsageError("--html writes a page, and --exit-code asks a live run; give one of them")
    if html is not None and (form or watch):
        raise UsageError("--html writes one page; give it without --json and --watch (`gms-launch web` keeps one up)")
    directory, found = rundir.find(run)
    if html is not None:
        timeline.save(html, page(directory))
        return
    door = contact.door(directory, found)
    if group is not None:
        _show_group(look.now(directory, found, door), group, form)
        return
    shot = look.now(directory, found, door)
    as_json = form == "json"
    if not watch:
        if form in ("json", "yaml"):
            print(document(shot.to_json(), form))
        else:
            from gms_launch.observe import views

            views.console(cut=form != "wide").print(views.status(shot))
        if exit_code:
            sys.exit(CODES[shot.redundancy])
        return
    from gms_launch.observe import views

    if sys.stdout.isatty() and not form:
        _live(directory, found, door, shot)
    for now in _follow(directory, found, door, shot):
        if as_json:
            print(json.dumps(now.to_json()), flush=True)
        else:
            views.console(cut=form != "wide").print(stamp(time.time()), views.status(now), sep="\n")
            sys.stdout.flush()


def _show_group(shot: Snapshot, name: str, form: str) -> None:
    """One group of a run, with its ranks. Raises `UsageError`."""
    wanted = look.the_group(shot, name)
    group = next(g for g in shot.groups if g.group == wanted)
    if form in ("json", "yaml"):
        print(document(group.group_json(), form))
        return
    from gms_launch.observe import views

    views.console(cut=form != "wide").print(views.status(group))


def page(directory: RunDir, links: Sequence[tuple[str, str]] = ()) -> str:
    """The page of how a run is now. Raises `NoContactError`, also for one that is over."""
    from gms_launch.observe import pages, words

    run = directory.read()
    if run is None or not run.live:
        ended = f" at {stamp(run.ended)}" if run is not None and run.ended is not None else ""
        why = f": {run.reason}" if run is not None and run.reason else ""
        raise NoContactError(f"run {directory.run} is not up; it ended{ended}{why}")
    door = contact.door(directory, run)
    try:
        shot = look.now(directory, run, door)
    finally:
        door.close()
    return pages.status(shot, words.now(shot), time.time(), links)


def _follow(directory: RunDir, found: RunFile, door: Door, first: Snapshot) -> Iterator[Snapshot]:
    """The state, and again whenever it has changed."""
    yield first
    while True:
        time.sleep(PAUSE)  # a watch is not worth its set-up here
        shot = look.now(directory, found, door)
        if shot != first or bool(shot.leader_silent) != bool(first.leader_silent):
            yield (first := shot)


def _live(directory: RunDir, found: RunFile, door: Door, shot: Snapshot) -> None:
    """A view for people, whose ages move on."""
    from rich.live import Live

    from gms_launch.observe import views

    with Live(views.status(shot), refresh_per_second=4) as live:
        while True:
            time.sleep(PAUSE)
            shot = look.now(directory, found, door)
            live.update(views.status(shot))
