"""`gms-launch timeline`."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

from gms_launch.cohort.failover import fold
from gms_launch.errors import NoContactError, UsageError
from gms_launch.observe import history
from gms_launch.run import rundir
from gms_launch.run.rundir import RunDir
from gms_launch.settings.rules import shortened

#: Of an HTML page (characters).
PAGE_WIDTH = 140


def main(run: str | None, as_json: bool, html: Path | None, all_events: bool) -> None:
    if as_json and html is not None:
        raise UsageError("--json and --html are two ways to print the same; give one of them")
    directory = _directory(run)
    run_file = directory.read()
    events = history.events(directory, run_file) if run_file is not None else history.written(directory)
    failovers = fold(events, run_file.nnodes if run_file is not None else 1)
    if as_json:
        data = [dataclasses.asdict(e) for e in events] if all_events else [f.to_json() for f in failovers]
        print(
            json.dumps({"schema": 1, "run": directory.run, ("events" if all_events else "failovers"): data}, indent=1)
        )
        return
    from rich.console import Console

    from gms_launch.observe import views

    console = views.console() if html is None else Console(record=True, width=PAGE_WIDTH, file=io.StringIO())
    if all_events:
        console.print(views.events(events))
    elif not failovers:
        console.print(f"run {directory.run} has had no failover")
    for found in [] if all_events else failovers:
        console.print(views.failover(found))
        console.print()
    if html is not None:
        try:
            console.save_html(str(html))
        except (OSError, ValueError) as exc:
            why = exc.strerror if isinstance(exc, OSError) else exc
            raise UsageError(f"--html {shortened(str(html))} cannot be written: {why}") from None
        print(f"written to {html}")


def _directory(run: str | None) -> RunDir:
    """The run meant; without a name and without a live run, the newest one."""
    try:
        return rundir.find(run)[0]
    except NoContactError:
        if run is None and (known := rundir.all_runs()):
            return known[0][0]
        raise
