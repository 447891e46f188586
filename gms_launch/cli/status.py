"""`gms-launch status`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gms_launch.cli import timeline, which
from gms_launch.cli.layout import document
from gms_launch.cohort.model import Redundancy
from gms_launch.errors import NoContactError, UsageError
from gms_launch.observe import look
from gms_launch.observe.snapshot import Snapshot
from gms_launch.observe.stamp import stamp
from gms_launch.run import contact, rundir
from gms_launch.run.rundir import RunDir

#: Between two looks of --watch (seconds).
PAUSE = 0.5


#: Of --exit-code. 2 is also what wrong settings end with; a message on stderr tells them apart.
CODES = {Redundancy.FULL: 0, Redundancy.DEGRADED: 1, Redundancy.NONE: 1, Redundancy.DOWN: 2}


def main(
    run: str | None,
    group: str | None,
    verbose: bool,
    watch: bool,
    form: str,
    exit_code: bool,
    html: Path | None,
) -> None:
    if watch and (exit_code or form == "yaml"):
        raise UsageError(f"--watch never ends: it goes with no {'--exit-code' if exit_code else '-o yaml'}")
    if html is not None and exit_code:
        raise UsageError("--html writes a page, and --exit-code asks a live run; give one of them")
    if html is not None and (form or watch):
        raise UsageError("--html writes one page; give it without --json and --watch (`gms-launch web` keeps one up)")
    directory, found = rundir.find(run)
    name = which.group(found, group)
    if html is not None:
        timeline.save(html, page(directory, group=name))
        return
    door = contact.door(directory, found)

    def look_again() -> Snapshot:
        return look.of(look.now(directory, found, door), name)

    shot = look_again()
    as_json = form == "json"
    if not watch:
        if form in ("json", "yaml"):
            print(document(shot.to_json(), form))
        else:
            from gms_launch.observe import views

            views.console(cut=form != "wide").print(views.status(shot, verbose=verbose))
        if exit_code:
            sys.exit(CODES[shot.redundancy])
        return
    from gms_launch.observe import views

    if sys.stdout.isatty() and not form:
        _live(look_again, shot, verbose)
    for now in _follow(look_again, shot):
        if as_json:
            print(json.dumps(now.to_json()), flush=True)
        else:
            shown = views.status(now, verbose=verbose)
            views.console(cut=form != "wide").print(stamp(time.time()), shown, sep="\n")
            sys.stdout.flush()


def page(directory: RunDir, links: Sequence[tuple[str, str]] = (), group: str = "") -> str:
    """The page of how a run is now, or one group of it. Raises `NoContactError`, also for one that is over."""
    from gms_launch.observe import pages, words

    run = directory.read()
    if run is None or not run.live:
        ended = f" at {stamp(run.ended)}" if run is not None and run.ended is not None else ""
        why = f": {run.reason}" if run is not None and run.reason else ""
        raise NoContactError(f"run {directory.run} is not up; it ended{ended}{why}")
    door = contact.door(directory, run)
    try:
        shot = look.of(look.now(directory, run, door), group)
    finally:
        door.close()
    return pages.status(shot, words.now(shot), time.time(), links)


def _follow(look_again: Callable[[], Snapshot], first: Snapshot) -> Iterator[Snapshot]:
    """The state, and again whenever it has changed."""
    yield first
    while True:
        time.sleep(PAUSE)  # a watch is not worth its set-up here
        shot = look_again()
        if shot != first or bool(shot.leader_silent) != bool(first.leader_silent):
            yield (first := shot)


def _live(look_again: Callable[[], Snapshot], shot: Snapshot, verbose: bool) -> None:
    """A view for people, whose ages move on."""
    from rich.live import Live

    from gms_launch.observe import views

    with Live(views.status(shot, verbose=verbose), refresh_per_second=4) as live:
        while True:
            time.sleep(PAUSE)
            live.update(views.status(look_again(), verbose=verbose))
