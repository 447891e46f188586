"""`gms-launch timeline`."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from gms_launch.cli import which
from gms_launch.cli.layout import document
from gms_launch.cohort.failover import Failover, fold
from gms_launch.cohort.records import EventRecord
from gms_launch.errors import NoContactError, UsageError
from gms_launch.observe import history
from gms_launch.observe.stamp import stamp
from gms_launch.run import rundir
from gms_launch.run.rundir import RunDir
from gms_launch.settings.rules import shortened


def main(run: str | None, group: str | None, form: str, html: Path | None, all_events: bool) -> None:
    if form and html is not None:
        raise UsageError("--json and --html are two ways to print the same; give one of them")
    found = directory(run)
    run_file = found.read()
    chosen = which.group(run_file, group)
    if html is not None:
        save(html, page(found, all_events, group=chosen))
        return
    events = history.events(found, run_file) if run_file is not None else history.written(found)
    failovers = of_group(fold(events, run_file.nnodes if run_file is not None else 1, which.sizes(run_file)), chosen)
    events = of_group(events, chosen)
    if form in ("json", "yaml"):
        data = [dataclasses.asdict(e) for e in events] if all_events else [f.to_json() for f in failovers]
        print(document({"schema": 1, "run": found.run, ("events" if all_events else "failovers"): data}, form))
        return
    from gms_launch.observe import views

    console = views.console(cut=form != "wide")
    if all_events:
        console.print(views.events(events))
    elif not failovers:
        whose = f"group {chosen} of run {found.run}" if chosen else f"run {found.run}"
        console.print(f"{whose} has had no failover")
    for each in [] if all_events else failovers:
        console.print(views.failover(each))
        console.print()


T = TypeVar("T", EventRecord, Failover)


def of_group(found: Sequence[T], group: str) -> list[T]:
    """What is of that group, or all of it without one."""
    return [one for one in found if not group or one.group == group]


def page(found: RunDir, all_events: bool, links: Sequence[tuple[str, str]] = (), group: str = "") -> str:
    """The page of a run's failovers, or of everything that happened, as it is known now; of one `group`, or of all."""
    from gms_launch.observe import pages

    run = found.read()
    events = history.events(found, run) if run is not None else history.written(found)
    nnodes, now = (run.nnodes if run is not None else 1), time.time()
    begin = run.created if run is not None else min((e.time for e in events), default=now)
    # Of an agent that died nobody knows when; the last that was told is the last that is known.
    last, over = max((e.time for e in events), default=begin), "Its agent is gone and has recorded no end."
    if run is not None and run.ended is not None:
        last, over = run.ended, f"It ended at {stamp(run.ended)}{f': {run.reason}' if run.reason else ''}."
    elif run is not None and run.live:
        last, over = max(last, now), ""
    story = pages.Story(
        run=found.run,
        nnodes=nnodes,
        begin=begin,
        end=last,
        over=over,
        events=of_group(events, group),
        failovers=of_group(fold(events, nnodes, which.sizes(run)), group),
        links=links,
        group=group,
        groups=run.groups if run is not None else {},
    )
    return pages.events(story, now) if all_events else pages.timeline(story, now)


def save(html: Path, text: str) -> None:
    """Write a page to the file that --html names; a new one is its owner's alone to read. Raises `UsageError`."""
    try:
        with open(html, "w", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(text)
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else exc
        raise UsageError(f"--html {shortened(str(html))} cannot be written: {why}") from None
    print(f"written to {html}")


def directory(run: str | None) -> RunDir:
    """The run meant; without a name and without a live run, the newest one."""
    try:
        return rundir.find(run)[0]
    except NoContactError:
        if run is None and (known := rundir.all_runs()):
            return known[0][0]
        raise
