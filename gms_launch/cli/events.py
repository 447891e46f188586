"""`gms-launch events`: what happened and, with `-f`, what happens, until the run has ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable

from gms_launch.cli import which
from gms_launch.cli.timeline import directory as find_directory
from gms_launch.cli.timeline import of_group
from gms_launch.cohort.records import EventRecord
from gms_launch.errors import NoContactError, UsageError, by_code
from gms_launch.observe import history, words
from gms_launch.observe.journal import Follower
from gms_launch.observe.stamp import moment
from gms_launch.printable import plain
from gms_launch.run.rundir import RunDir
from gms_launch.settings.rules import shortened

#: The home announces no change of a file (seconds).
PAUSE = 0.2
#: Events that are shown before those that come, unless something else was asked for.
BEFORE = 10
#: How long an agent that has died may take to be started again before nobody waits for it any more (seconds).
AGAIN = 30.0


def main(run: str | None, group: str | None, follow: bool, tail: int | None, since: str, as_json: bool) -> None:
    try:
        earliest = moment(since, time.time()) if since else 0.0
    except ValueError as exc:
        raise UsageError(f"--since {shortened(since)}: {exc}") from None
    directory = find_directory(run)
    run_file = directory.read()
    chosen = which.group(run_file, group)
    known = history.events(directory, run_file) if run_file is not None else history.written(directory)
    if tail is None and follow and not since:
        tail = BEFORE
    wanted = [e for e in of_group(known, chosen) if e.time >= earliest]
    _print(wanted[-tail:] if tail else wanted, as_json)
    if follow:
        seen = {e.encode() for e in known}
        _follow(directory, chosen, seen, earliest, as_json)


def _follow(directory: RunDir, group: str, seen: set[bytes], earliest: float, as_json: bool) -> None:
    """Print what comes, of one group or of all, until the run has ended.

    Raises `LaunchError` when its agent is gone without a word.
    """
    journal = Follower(directory.events)
    gone_since: float | None = None
    while True:
        found = directory.read()  # before the journal: what is in it when the run has ended is all there is
        events = [e for e in journal.new() if e.time >= earliest and not (seen and e.encode() in seen)]
        _print(of_group(events, group), as_json)
        if found is not None and found.ended is not None:
            print(f"run {directory.run} has ended: {found.reason or 'stopped in order'}", file=sys.stderr)
            return
        if found is not None and found.live:
            gone_since = None
        elif gone_since is None:
            gone_since = time.monotonic()
        elif time.monotonic() - gone_since > AGAIN:
            if found is None:
                raise NoContactError(f"run {directory.run} is gone: {directory.run_json} does not exist any more")
            raise by_code(
                1,
                f"run {directory.run}: its agent is gone for {AGAIN:.0f} s and has recorded no end; `gms-launch down "
                f"--run {directory.run}` clears up",
            )
        time.sleep(PAUSE)


def _print(events: Iterable[EventRecord], as_json: bool) -> None:
    for event in events:
        if as_json:
            print(event.encode().decode(), flush=True)
        else:
            when, node, kind, cohort, detail = words.events([event])[0]
            line = f"{when}  node {node:<3} {kind:<18} {cohort:<{11 if event.group else 5}} {detail}"
            print(plain(line).rstrip(), flush=True)
