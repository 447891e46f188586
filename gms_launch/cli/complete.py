"""What the shell offers behind an option when Tab is pressed: names of runs, cohorts, node ranks and components.

Read from the run directory alone, and no longer than `PATIENCE`: a home that hangs costs the person that, and offers
nothing. Nothing here is an error: who wants to know what is wrong runs the verb.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import typer

from gms_launch.errors import LaunchError, NoContactError

if TYPE_CHECKING:
    from gms_launch.run.rundir import RunDir, RunFile

#: How long somebody who pressed Tab is made to wait (seconds).
PATIENCE = 1.0


def _bounded(find: Callable[[], list[str]], incomplete: str) -> list[str]:
    from gms_launch.spool.reading import within

    def quiet() -> list[str]:
        with suppress(LaunchError, ValueError, IndexError):
            return [word for word in find() if word.startswith(incomplete)]
        return []

    return within(PATIENCE, quiet, [])


def _meant(ctx: typer.Context) -> tuple[RunDir, RunFile]:
    """The run that a verb would take: of some the newest, where none is live."""
    from gms_launch.run import rundir

    try:
        return rundir.find(ctx.params.get("run"))
    except NoContactError:
        return rundir.all_runs()[0]


def runs(incomplete: str) -> list[str]:
    """Every run that is recorded, the newest first."""
    from gms_launch.run import rundir

    return _bounded(lambda: [directory.run for directory, _ in rundir.all_runs()], incomplete)


def groups(ctx: typer.Context, incomplete: str) -> list[str]:
    """The groups of the run that is meant."""
    return _bounded(lambda: list(_meant(ctx)[1].groups), incomplete)


def nodes(ctx: typer.Context, incomplete: str) -> list[str]:
    """The node ranks of the run that is meant."""
    return _bounded(lambda: [str(k) for k in range(_meant(ctx)[1].nnodes)], incomplete)


def cohorts(ctx: typer.Context, incomplete: str) -> list[str]:
    """The cohorts of the run that is meant, or of its group."""

    def find() -> list[str]:
        run = _meant(ctx)[1]
        said = run.groups.get(ctx.params.get("group") or "", run.settings)
        return [str(k) for k in range(int(said.get("shadows", 0)) + 1)]

    return _bounded(find, incomplete)


def components(ctx: typer.Context, incomplete: str) -> list[str]:
    """What has a log on the node that is meant, and the newest life of a cohort by the cohort's name alone."""

    def find() -> list[str]:
        logs, node, group = _meant(ctx)[0].logs, ctx.params.get("node"), ctx.params.get("group")
        places = [logs, *logs.glob("node*")] if group and node is None else [logs, logs / f"node{node or 0}"]
        names = {log.stem for place in places for log in place.glob("*.log")}
        names |= {name.rpartition(".")[0] for name in names if name.rpartition(".")[2].isdigit()}
        return sorted(n.removeprefix(f"{group}.") for n in names if not group or n.startswith(f"{group}."))

    return _bounded(find, incomplete)
