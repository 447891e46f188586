"""The `gms-launch` command: one verb a module, loaded when it is used."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from gms_launch import __version__
from gms_launch.cli import complete, starting
from gms_launch.cli.common import Group, Html, Json, Output, Run, typed_as_text
from gms_launch.cli.layout import chosen
from gms_launch.cli.options import WithEngineArgs, duration, number, positive, tcp_port
from gms_launch.errors import LaunchError
from gms_launch.printable import plain
from gms_launch.urls import public

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # keeps rich out of commands that do not draw
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Keep a multi-node LLM engine serving when one of its processes dies.",
)


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        print(f"gms-launch {__version__}")
        raise typer.Exit


starting.register(app)


@app.command("kill-primary")
def kill_primary(
    run: Run = None,
    group: Group = None,
    force: Annotated[bool, typer.Option("--force", help="also without a parked shadow: an outage follows")] = False,
    scope: Annotated[str, typer.Option("--scope", help="group, leader or rank:N (the last two for drills)")] = "group",
    timeout: Annotated[float, duration("--timeout", "deadline for the promotion (seconds)")] = 60.0,
    json: Json = False,
) -> None:
    """Kill the primary and follow the failover to a token."""
    from gms_launch.cli import kill_primary as verb

    verb.main(run, group, force, scope, timeout, json)


@app.command("switch-over")
def switch_over(
    run: Run = None,
    group: Group = None,
    to: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--to", autocompletion=complete.cohorts, help="the cohort that shall take over"),
    ] = None,
    when_idle: Annotated[
        Optional[float],  # noqa: UP045
        duration("--when-idle", "wait so long for a moment without requests (seconds); else do nothing"),
    ] = None,
    timeout: Annotated[float, duration("--timeout", "deadline for the promotion (seconds)")] = 60.0,
    json: Json = False,
) -> None:
    """Hand over to a parked shadow on purpose.

    Requests in flight go on there. Refused when none is parked.
    """
    from gms_launch.cli import switch_over as verb

    verb.main(run, group, to, when_idle, timeout, json)


@app.command("roll", cls=WithEngineArgs)
def roll(
    engine_args: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[-- ENGINE ARGS]", help="for every engine from now on; left out: as they are"),
    ] = None,
    run: Run = None,
    group: Group = None,
    shadow_only: Annotated[bool, typer.Option("--shadow-only", help="do not switch over to them")] = False,
    timeout: Annotated[
        Optional[float],  # noqa: UP045
        duration("--timeout", "deadline for each shadow and for the switch-over (default: start_timeout)"),
    ] = None,
    json: Json = False,
) -> None:
    """Change the engine arguments without an outage.

    Starts the shadows again, with other engine arguments if given, and switches over to them.
    """
    from gms_launch.cli import roll as verb

    verb.main(run, group, engine_args, shadow_only, timeout, json)


@app.command("status")
def status(
    run: Run = None,
    group: Group = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="of a run of groups every rank too")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="keep showing it")] = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="0: full, 1: degraded or none, 2: down")] = False,
    output: Output = "",
    json: Json = False,
    html: Html = None,
) -> None:
    """Show roles, phases, processes, GMS, services and redundancy."""
    from gms_launch.cli import status as verb

    verb.main(run, group, verbose, watch, chosen(output, json), exit_code, html)


@app.command("web")
def web(
    run: Run = None,
    group: Group = None,
    port: Annotated[
        int, typer.Option("--port", parser=tcp_port, metavar="<int>", help="on 127.0.0.1; 0: one that is free")
    ] = 0,
) -> None:
    """Serve status and timeline as pages that keep up to date.

    Read only, on this machine's loopback, at an address with a secret in it.
    """
    from gms_launch.cli import web as verb

    verb.main(run, group, port)


@app.command("down")
def down(
    run: Run = None,
    timeout: Annotated[float, duration("--timeout", "deadline for the orderly stop (seconds)")] = 60.0,
    here: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--here", parser=number, metavar="<int>", hidden=True),
    ] = None,
) -> None:
    """Stop a run and prove that nothing of it is left.

    From anywhere, and on every node.
    """
    from gms_launch.cli import down as verb

    if here is not None:
        verb.main_here(run or "", here, timeout)
    else:
        verb.main(run, timeout)


@app.command("wait")
def wait(
    run: Run = None,
    timeout: Annotated[
        Optional[float],  # noqa: UP045
        duration("--timeout", "give up after so many seconds"),
    ] = None,
) -> None:
    """Wait until a run has ended; the exit code is the run's.

    A run that is named and has not begun is waited for too.
    """
    from gms_launch.cli import wait as verb

    verb.main(run, timeout)


@app.command("kill-group", hidden=True)
def kill_group(
    pid: Annotated[int, typer.Argument(parser=positive, metavar="<int>")],
    start: Annotated[int, typer.Argument(parser=number, metavar="<int>")],
) -> None:
    """Kill one recorded process group of this node."""
    from gms_launch.cli import kill_primary as verb

    verb.kill_group(pid, start)


@app.command("logs")
def logs(
    component: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(
            help="agent, etcd, nats, frontend, gms-0, cohort-0 or cohort-0.3; all names when left out",
            autocompletion=complete.components,
        ),
    ] = None,
    run: Run = None,
    group: Group = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="keep printing what is added")] = False,
    tail: Annotated[
        int, typer.Option("-n", "--tail", parser=number, metavar="<int>", help="lines from the end; 0 for all")
    ] = 50,
    node: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--node",
            autocompletion=complete.nodes,
            parser=number,
            metavar="<int>",
            help="node rank in the run (default: 0; with --group the first that has the log)",
        ),
    ] = None,
) -> None:
    """Print the log of a component.

    The newest life unless one is named.
    """
    from gms_launch.cli import logs as verb

    verb.main(component, run, group, follow, tail, node)


@app.command("timeline")
def timeline(
    run: Run = None,
    group: Group = None,
    output: Output = "",
    json: Json = False,
    html: Html = None,
    events: Annotated[bool, typer.Option("--events", help="every event instead of failovers")] = False,
) -> None:
    """Show every failover, step by step.

    Works after the run has ended too.
    """
    from gms_launch.cli import timeline as verb

    verb.main(run, group, chosen(output, json), html, events)


@app.command("events")
def events(
    run: Run = None,
    group: Group = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="keep printing them until the run has ended")] = False,
    tail: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "-n", "--tail", parser=number, metavar="<int>", help="the newest so many; 0 for all (default: 10 with -f)"
        ),
    ] = None,
    since: Annotated[
        str, typer.Option("--since", metavar="TIME", help="not those before: 30s, 10m, 2h, 1d ago, or a moment in UTC")
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="print a JSON document a line, as in events.jsonl")] = False,
) -> None:
    """Print what happens, a line an event.

    The newest run's when none is up.
    """
    from gms_launch.cli import events as verb

    verb.main(run, group, follow, tail, since, json)


@app.command("sweep")
def sweep(
    run: Run = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what is there")] = False,
) -> None:
    """Clear this node of what dead runs left.

    Kills their processes and removes their files. Live runs are not touched.
    """
    from gms_launch.cli import sweep as verb

    verb.main(run, dry_run)


@app.command("demo-model")
def demo_model(
    directory: Annotated[Path, typer.Argument(help="where to put it")],
    size: Annotated[
        int, typer.Option("--mib", parser=positive, metavar="<int>", help="size of the weights (MiB)")
    ] = 64,
    seed: Annotated[
        int, typer.Option("--seed", parser=number, metavar="<int>", help="another seed, another model")
    ] = 1,
) -> None:
    """Make a small model for the reference engine."""
    from gms_launch.cli import demo_model as verb

    verb.main(directory, size, seed)


def main() -> None:
    """Run a verb; every error becomes one message and its exit code.

    A `LaunchError` has said what there is to say. What nobody has foreseen ends with code 1, and the message names the
    file with the traceback.
    """
    try:
        typed_as_text(sys.argv)
        app(prog_name="gms-launch")
    except LaunchError as exc:
        print(f"gms-launch: {plain(public(str(exc)))}", file=sys.stderr)
        sys.exit(exc.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as exc:
        from gms_launch.cli import unforeseen

        print(f"gms-launch: {plain(unforeseen.report(exc, sys.argv[1:2]))}", file=sys.stderr)
        sys.exit(1)
