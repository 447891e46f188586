"""How a run looks on a terminal: tables for status and timelines."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from gms_launch.cohort.failover import ZEROS, Failover
from gms_launch.cohort.model import Redundancy
from gms_launch.cohort.records import EventRecord
from gms_launch.observe import words
from gms_launch.observe.snapshot import Snapshot
from gms_launch.observe.stamp import stamp

#: No row is longer (characters).
PIPE_WIDTH = 10_000
#: What an alarm of etcd's comes to.
ALARMS = {
    "NOSPACE": "it refuses writes, so what is shown may be old, and no engine can register",
    "CORRUPT": "it takes its data for corrupt and refuses writes, so what is shown may be old",
}
_COLOURS = {
    Redundancy.FULL: "green",
    Redundancy.DEGRADED: "yellow",
    Redundancy.NONE: "red",
    Redundancy.DOWN: "bold red",
}


def console(stream: TextIO | None = None, cut: bool = True) -> Console:
    """Where tables are printed: as wide as the terminal, unless nothing is to be `cut`; a pipe has no edge, and wrapped
    rows are for nobody."""
    out = stream or sys.stdout
    edge = cut and (out.isatty() or "COLUMNS" in os.environ)
    return Console(file=out, width=None if edge else PIPE_WIDTH)


def status(shot: Snapshot, now: float | None = None) -> RenderableType:
    """The whole state of a run."""
    moment = words.now(shot) if now is None else now
    head = Text.assemble(
        ("run ", "dim"),
        (shot.run, "bold"),
        ("   redundancy ", "dim"),
        ("starting", "yellow") if shot.starting else (shot.redundancy.value, _COLOURS[shot.redundancy]),
        ("   up ", "dim"),
        words.age(shot.created, moment),
        ("   frontend ", "dim"),
        words.frontend(shot),
        ("   stopping" if shot.stopping else "", "yellow"),
    )
    cohorts = Table(box=None, pad_edge=False, header_style="dim")
    for name in words.COHORTS:
        cohorts.add_column(name)
    for row in words.cohorts(shot, moment):
        cohorts.add_row(*row)
    parts: list[RenderableType] = [head, groups(shot) if shot.groups else cohorts]
    if shot.leader_silent:
        parts.insert(0, Text(f"as of {shot.reported_ago:.0f} s ago: {shot.leader_silent}", "bold red"))
    for alarm in shot.alarms:
        parts.insert(0, Text(f"etcd has raised the alarm {alarm}: {ALARMS.get(alarm, 'see its manual')}", "bold red"))
    rest = Table(box=None, pad_edge=False, header_style="dim")
    for name in words.PARTS:
        rest.add_column(name)
    for node, name, state, *more in words.parts(shot):
        rest.add_row(node, name, Text(state, "bold red") if state == words.SILENT else state, *more)
    parts.append(rest)
    return Group(*parts)


def groups(shot: Snapshot) -> Table:
    """A line a group."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in words.GROUPS:
        table.add_column(name)
    colours = {r.value: colour for r, colour in _COLOURS.items()}
    for name, state, *more in words.groups(shot):
        table.add_row(name, Text(state, colours.get(state, "yellow")), *more)
    return table


def failover(found: Failover) -> RenderableType:
    """One failover, step by step."""

    victim, promoted = words.life(found.victim), words.life(found.promoted)
    head = Text.assemble(
        (stamp(found.time), "bold"), f"  {victim} -> {promoted}", ("  cause: ", "dim"), found.cause or "unknown"
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("STEP")
    table.add_column("AFTER", justify="right")
    table.add_column("MEANING")
    for row in words.steps(found):
        table.add_row(*row)
    foot = Text.assemble(("0 ms: ", "dim"), ZEROS[found.zero], ("\nclients: ", "dim"), words.silence(found))
    said = [Text(text) for text in (words.requests(found), words.stood_still(found)) if text]
    return Group(head, table, foot, *said)


def events(found: Sequence[EventRecord]) -> RenderableType:
    """Every event, one a line."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in words.EVENTS:
        table.add_column(name)
    for row in words.events(found):
        table.add_row(*row)
    return table
