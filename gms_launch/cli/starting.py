"""The verbs that take every setting: what starts a run, and what says beforehand how it would go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from gms_launch.cli.common import Json
from gms_launch.cli.options import WithEngineArgs, descriptor, duration, number, positive, with_settings
from gms_launch.settings.declared import Settings


def register(app: typer.Typer) -> None:
    """Make them verbs of `app`."""
    for name, verb in (("up", up), ("plan", plan), ("submit", submit), ("doctor", doctor)):
        app.command(name, cls=WithEngineArgs)(with_settings(verb))


def up(
    *,
    settings: Settings,
    detach: Annotated[
        bool, typer.Option("-d", "--detach", help="run in the background; return when redundancy is full")
    ] = False,
    notify_fd: Annotated[int, typer.Option(parser=descriptor, metavar="<int>", hidden=True)] = -1,
    until_eof: Annotated[bool, typer.Option("--until-eof", hidden=True)] = False,
) -> None:
    """Run this node's agent, with all that it keeps alive.

    GMS, services, the primary and its shadows.
    """
    from gms_launch.cli import up as verb

    verb.main(settings, detach, notify_fd, until_eof)


def plan(
    *,
    settings: Settings,
    gpu_gib: Annotated[
        int,
        typer.Option("--gpu-gib", parser=number, metavar="<int>", help="only say whether the engines fit on such GPUs"),
    ] = 0,
    gpus_per_node: Annotated[
        int, typer.Option(parser=number, metavar="<int>", help="where groups lie on nodes with so many GPUs")
    ] = 0,
    json: Json = False,
) -> None:
    """Print what `up` would run; start nothing.

    Every command, environment and port, of this node or of all, and whether the engines fit on the GPUs.
    """
    from gms_launch.cli import plan as verb

    verb.main(settings, gpu_gib, json, gpus_per_node)


def submit(
    *,
    settings: Settings,
    nodes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "-N", "--nodes", parser=positive, metavar="<int>", help="nodes of the job (of groups: as many as they take)"
        ),
    ] = None,
    gpus_per_node: Annotated[
        int, typer.Option(parser=number, metavar="<int>", help="GPUs of each; 0 asks for none, or for what groups take")
    ] = 0,
    time: Annotated[str, typer.Option("-t", "--time", help="time limit, as sbatch takes it")] = "",
    partition: Annotated[str, typer.Option("-p", "--partition", help="as of sbatch")] = "",
    account: Annotated[str, typer.Option("-A", "--account", help="as of sbatch")] = "",
    array: Annotated[str, typer.Option("-a", "--array", help="several runs, called RUN-<task>")] = "",
    sbatch: Annotated[Optional[list[str]], typer.Option(help="any other option of sbatch; again for more")] = None,  # noqa: UP045
    drain: Annotated[
        int, typer.Option(parser=number, metavar="<int>", help="stop in order so long before --time ends (seconds)")
    ] = 60,
    requeue: Annotated[
        int, typer.Option(parser=number, metavar="<int>", help="how often the job goes back to the queue at --time")
    ] = 0,
    successor: Annotated[
        int,
        typer.Option(parser=number, metavar="<int>", help="submit the next job so long before --time ends (minutes)"),
    ] = 0,
    container_image: Annotated[str, typer.Option(help="image for pyxis")] = "",
    apptainer: Annotated[str, typer.Option(help="image for apptainer")] = "",
    container_mounts: Annotated[str, typer.Option(help="SRC:DST[:FLAGS],... beside what gms-launch needs")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print script and settings; submit nothing")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="return when redundancy is full")] = False,
    timeout: Annotated[float, duration("--timeout", "how long --wait waits (seconds)")] = 3600.0,
) -> None:
    """Run as a batch job: sbatch, with script and settings saved."""
    from gms_launch.cli import submit as verb
    from gms_launch.transport.sbatch import Job

    named = {"gpus-per-node": str(gpus_per_node or ""), "time": time, "partition": partition, "account": account}
    job = Job(
        run="",
        nodes=nodes or 0,
        home=Path(),
        program="",
        options=(*(f"--{k}={v}" for k, v in named.items() if v), *(sbatch or ())),
        array=array,
        drain=drain,
        requeues=requeue,
        successor=successor,
        pyxis=container_image,
        apptainer=apptainer,
        mounts=tuple(m for m in container_mounts.split(",") if m),
    )
    verb.main(settings, job, dry_run, wait, timeout)


def doctor(*, settings: Settings, json: Json = False) -> None:
    """Check what would stop `up` on this node."""
    from gms_launch.cli import doctor as verb

    verb.main(settings, json)
