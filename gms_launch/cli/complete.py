"""What the shell offers behind an option when Tab is pressed: names of runs, cohorts, node ranks and components.

Read from the run directory alone, and no longer than `PATIENCE`: a home that hangs costs the person that, and offers
nothing. Nothing here is an error: who wants to know what is wrong runs the verb.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import typer

from gms_launch.errors import LaunchError, NoContactError

#: How long somebody who pressed Tab is made to wait (seconds).
PATIENCE = 1.0


def _bounded(find: Callable[[], list[str]], incomplete: str) -> list[str]:
    from gms_launch.spool.reading import within

    def quiet() -> list[str]:
        with suppress(LaunchError, ValueError, IndexError):
            return [word for word in find() if word.startswith(incomplete)]
        return []

    return within(PATIENCE, quiet, [])


def runs(incomplete: str) -> list[str]:
    """Every run that is recorded, the newest first."""
    from gms_launch.run import rundir

    return _bounded(lambda: [directory.run for directory, _ in rundir.all_runs()], incomplete)


def nodes(ctx: typer.Context, incomplete: str) -> list[str]:
    """The node ranks of the run that is meant."""
    from gms_launch.run import rundir

    return _bounded(lambda: [str(k) for k in range(rundir.find(ctx.params.get("run"))[1].nnodes)], incomplete)


def cohorts(ctx: typer.Context, incomplete: str) -> list[str]:
    """The cohorts of the run that is meant."""
    from gms_launch.run import rundir

    def find() -> list[str]:
        return [str(k) for k in range(int(rundir.find(ctx.params.get("run"))[1].settings.get("shadows", 0)) + 1)]

    return _bounded(find, incomplete)


def components(ctx: typer.Context, incomplete: str) -> list[str]:
    """What has a log on the node that is meant, and the newest life of a cohort by the cohort's name alone."""
    from gms_launch.run import rundir

    def find() -> list[str]:
        try:
            directory = rundir.find(ctx.params.get("run"))[0]
        except NoContactError:
            directory = rundir.all_runs()[0][0]  # as `logs` does without a name
        logs = directory.logs
        node = logs / f"node{ctx.params.get('node') or 0}"
        names = {log.stem for place in (logs, node) for log in place.glob("*.log")}
        return sorted(names | {name.rpartition(".")[0] for name in names if "." in name})

    return _bounded(find, incomplete)
