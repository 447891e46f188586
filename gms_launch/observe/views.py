"""How a run looks on a terminal: tables for status and timelines."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from gms_launch.cohort.failover import Failover
from gms_launch.cohort.model import Redundancy
from gms_launch.cohort.records import EventRecord
from gms_launch.observe import words
from gms_launch.observe.snapshot import Snapshot
from gms_launch.observe.stamp import stamp
from gms_launch.printable import plain

#: No row is longer (characters).
PIPE_WIDTH = 10_000
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


def status(shot: Snapshot, now: float | None = None, verbose: bool = False) -> RenderableType:
    """The whole state of a run, or of one group of it. `verbose`: of each group its ranks and its part of the nodes."""
    moment = words.now(shot) if now is None else now
    head = Text.assemble(
        ("run ", "dim"),
        (shot.run, "bold"),
        *((("   group ", "dim"), (shot.group, "bold")) if shot.group else ()),
        ("   redundancy ", "dim"),
        ("starting", "yellow") if shot.starting else (shot.redundancy.value, _COLOURS[shot.redundancy]),
        ("   up ", "dim"),
        words.age(shot.created, moment),
        ("   frontend ", "dim"),
        plain(words.frontend(shot)),
        ("   stopping" if shot.stopping else "", "yellow"),
    )
    for lack in words.short(shot) if not shot.starting else ():
        head.append(f"   {lack}", "bold yellow")
    if shot.over:
        head.append(f"   over: {plain(shot.over)}", "bold red")
    of_cohorts = _table(words.COHORTS, words.cohorts(shot, moment))
    parts: list[RenderableType] = [head, groups(shot, moment) if shot.groups else of_cohorts]
    if shot.leader_silent:
        parts.insert(0, Text(f"as of {shot.reported_ago:.0f} s ago: {shot.leader_silent}", "bold red"))
    for alarm in words.alarms(shot):
        parts.insert(0, Text(alarm, "bold red"))
    for group in shot.groups if verbose else ():
        parts.append(Text.assemble(("\ngroup ", "dim"), (group.group, "bold")))
        parts.append(_table(words.COHORTS, words.cohorts(group, moment)))
        parts.append(_parts(group))
    parts += ["", _parts(shot)] if verbose and shot.groups else [_parts(shot)]
    return Group(*parts)


def _table(head: Sequence[str], rows: Iterable[Sequence[RenderableType]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in head:
        table.add_column(name)
    for row in rows:
        table.add_row(*map(_cell, row))
    return table


def _cell(value: RenderableType) -> RenderableType:
    """What others have said is text: it is no markup, and tells the terminal nothing."""
    return Text(plain(value)) if isinstance(value, str) else value


def _parts(shot: Snapshot) -> Table:
    rows: list[Sequence[RenderableType]] = []
    for node, name, state, *more in words.parts(shot):
        rows.append((node, name, Text(state, "bold red") if state == words.SILENT else state, *more))
    return _table(words.PARTS, rows)


def groups(shot: Snapshot, moment: float) -> Table:
    """A line a group."""
    colours = {r.value: colour for r, colour in _COLOURS.items()} | {"over": "bold red"}
    rows: list[Sequence[RenderableType]] = []
    for name, state, *more in words.groups(shot, moment):
        rows.append((name, Text(state, colours.get(state, "yellow")), *more))
    return _table(words.GROUPS, rows)


def failover(found: Failover) -> RenderableType:
    """One failover, step by step."""

    victim, promoted = words.life(found.victim, found.group), words.life(found.promoted)
    head = Text.assemble(
        (stamp(found.time), "bold"), f"  {victim} -> {promoted}", ("  cause: ", "dim"), plain(found.cause or "unknown")
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("STEP")
    table.add_column("AFTER", justify="right")
    table.add_column("MEANING")
    for row in words.steps(found):
        table.add_row(*map(_cell, row))
    foot = Text.assemble(("0 ms: ", "dim"), words.zero(found), ("\nclients: ", "dim"), words.silence(found))
    said = [Text(text) for text in (words.requests(found), words.stood_still(found)) if text]
    return Group(head, table, foot, *said)


def events(found: Sequence[EventRecord]) -> RenderableType:
    """Every event, one a line."""
    return _table(words.EVENTS, words.events(found))
