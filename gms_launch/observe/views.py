"""How a run looks on a terminal: tables for status and timelines."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from gms_launch.cohort.failover import STEPS, ZEROS, Failover
from gms_launch.cohort.model import Phase, Redundancy
from gms_launch.cohort.records import EventRecord
from gms_launch.numbers import numbered
from gms_launch.observe import progress
from gms_launch.observe.snapshot import CohortStatus, Snapshot
from gms_launch.observe.stamp import stamp
from gms_launch.process import proc

#: No row is longer (characters).
PIPE_WIDTH = 10_000
#: Longest detail of an event in a table (characters); the journal has all of it.
LINE_MAX = 300
_COLOURS = {
    Redundancy.FULL: "green",
    Redundancy.DEGRADED: "yellow",
    Redundancy.NONE: "red",
    Redundancy.DOWN: "bold red",
}


def console(stream: TextIO | None = None) -> Console:
    """Where tables are printed: as wide as the terminal; a pipe has no edge, and wrapped rows are for nobody."""
    out = stream or sys.stdout
    wide = out.isatty() or "COLUMNS" in os.environ
    return Console(file=out, width=None if wide else PIPE_WIDTH)


def age(since: float, now: float) -> str:
    """How long ago, in the two largest units."""
    seconds = max(0, int(now - since)) if since else 0
    for size, name, small, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            return f"{seconds // size}{name}{seconds % size // small}{small_name}"
    return f"{seconds}s"


def _now(shot: Snapshot) -> float:
    """Now by the clock that the run's times are of, if one of its agents is on this machine."""
    here = proc.boot_id()
    own = next((n.clock for n in shot.nodes if n.boot_id == here and n.clock), None)
    return time.time() if own is None else time.monotonic() + own


def status(shot: Snapshot, now: float | None = None) -> RenderableType:
    """The whole state of a run."""
    moment = _now(shot) if now is None else now
    head = Text.assemble(
        ("run ", "dim"),
        (shot.run, "bold"),
        ("   redundancy ", "dim"),
        ("starting", "yellow") if shot.starting else (shot.redundancy.value, _COLOURS[shot.redundancy]),
        ("   up ", "dim"),
        age(shot.created, moment),
        ("   frontend ", "dim"),
        shot.frontend_url,
        ("   stopping" if shot.stopping else "", "yellow"),
    )
    cohorts = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("COHORT", "ROLE", "PHASE", "FOR", "LIFE", "NODE", "PID", "NOTE"):
        cohorts.add_column(name)
    for c in shot.cohorts:
        note = "given up: " + c.why if c.given_up else tries(c, moment)
        doing = progress.note(c, shot, moment)
        for rank in c.ranks:
            # Only its own agent sees what becomes of a rank.
            old = (rank.node_rank == 0 and bool(shot.leader_silent)) or rank.node_rank in shot.missing
            asked, heard = (" ?", "not heard of since") if old else ("", "")
            left = f"cannot be killed: {', '.join(rank.left or map(str, rank.leftovers))}" if rank.leftovers else ""
            cohorts.add_row(
                str(c.cohort_id),
                (c.role or "-") + (asked if c.role else ""),
                rank.phase.value + asked,
                age(rank.since, moment),
                str(c.incarnation),
                str(rank.node_rank),
                str(rank.pid),
                left or "; ".join(filter(None, (heard, doing if rank.node_rank == 0 else "", note))) or rank.exit,
            )
        if not c.ranks:
            cohorts.add_row(str(c.cohort_id), c.role or "-", c.phase.value, "", str(c.incarnation), "", "", note)
    parts: list[RenderableType] = [head, cohorts]
    if shot.leader_silent:
        parts.insert(0, Text(f"as of {shot.reported_ago:.0f} s ago: {shot.leader_silent}", "bold red"))
    rest = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("NODE", "COMPONENT", "STATE", "PID", "STARTS", "NOTE"):
        rest.add_column(name)
    for node_rank in shot.missing:
        if node_rank in shot.lost:
            why = "its lease has run out: stopped, cut off or gone; its cohorts are fenced without it"
        elif shot.starting:
            why = "has not come yet"
        else:
            why = "its lease has run out: stopped (SIGSTOP), cut off or gone"
        rest.add_row(str(node_rank), "agent", Text("silent", "bold red"), "", "", why)
    for node in shot.nodes:
        rest.add_row(str(node.node_rank), f"agent on {node.host}", "running", str(node.agent_pid), "", node.address)
        for stray in node.strays:
            rest.add_row(str(node.node_rank), "stray", "cannot be killed", stray.partition(" ")[0], "", stray)
        if node.lock_holder.startswith("process"):
            rest.add_row(str(node.node_rank), "failover lock", "kept by a stray", "", "", node.lock_holder)
        for p in node.writing:
            lost = f", {p.dropped} entries and {p.dropped_bytes} bytes of logs dropped"
            rest.add_row(
                str(node.node_rank),
                p.name,
                p.state or "well again",
                "",
                "",
                p.path + (lost if p.dropped or p.dropped_bytes else ""),
            )
        if node.internal_errors:
            rest.add_row(
                str(node.node_rank), "internal errors", str(node.internal_errors), "", "", "see the agent's log"
            )
        for s in node.services:
            rest.add_row(str(node.node_rank), s.name, s.state, str(s.pid or ""), str(s.starts), s.detail)
        for g in node.gms:
            size = "" if g.allocated_bytes is None else f"{g.allocated_bytes / 2**30:.2f} GiB in "
            held = f"{size}{g.allocations} allocations"
            note = f"{held}, {numbered(g.ro_sessions, 'reader')}, written {numbered(g.loads, 'time')}"
            note += f"; has not answered the last {numbered(g.missed, 'look')}" if g.missed else ""
            rest.add_row(str(node.node_rank), f"gpu {g.device} {g.tag}", g.state.lower(), "", "", note)
        for gpu in node.gpu_memory:
            note = f"{gpu.used / 2**30:.1f} of {gpu.total / 2**30:.1f} GiB used"
            rest.add_row(str(node.node_rank), gpu.name, "", "", "", f"{note}, {gpu.uuid}")
            for h in gpu.holders:
                size = f"{h.used / 2**30:.2f} GiB" if h.used >= 0 else "size not told"
                rest.add_row(str(node.node_rank), f"  {h.who}", "", str(h.pid), "", size)
    parts.append(rest)
    return Group(*parts)


def tries(cohort: CohortStatus, now: float) -> str:
    """What is to be said of starts of a slot that failed; empty when none did of late."""
    if not cohort.failed_starts or cohort.phase in (Phase.PARKED, Phase.WAKING, Phase.ACTIVE):
        return ""  # a start has gone well since
    text = f"{cohort.failed_starts} of {cohort.start_limit} starts failed"
    if cohort.last_exit:
        text += f", {cohort.last_exit}"
    if cohort.next_start > now:
        text += f", next try in {cohort.next_start - now:.0f} s"
    return text


def failover(found: Failover) -> RenderableType:
    """One failover, step by step."""

    def name(life: tuple[int, int] | None) -> str:
        return "nobody" if life is None else f"cohort {life[0]} (life {life[1]})"

    victim, promoted = name(found.victim), name(found.promoted)
    head = Text.assemble(
        (stamp(found.time), "bold"), f"  {victim} -> {promoted}", ("  cause: ", "dim"), found.cause or "unknown"
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("STEP")
    table.add_column("AFTER", justify="right")
    table.add_column("MEANING")
    for step, meaning in sorted(STEPS.items(), key=lambda item: found.steps.get(item[0], float("inf"))):
        at = f"{found.steps[step] * 1000:.1f} ms" if step in found.steps else "-"
        table.add_row(step, at, meaning)
    silence = "a token came again at first_token; when the last one before it came is not known: nobody looked then"
    if found.silence is not None:
        silence = (
            f"at most {found.silence:.1f} s without a token (the frontend's counter is looked at every few seconds)"
        )
    elif "first_token" not in found.steps:
        silence = "no token yet"
    foot = Text.assemble(("0 ms: ", "dim"), ZEROS[found.zero], ("\nclients: ", "dim"), silence)
    said = [Text(text) for text in (requests(found), stood_still(found)) if text]
    return Group(head, table, foot, *said)


def stood_still(found: Failover) -> str:
    """What is to be said of an agent that did nothing meanwhile; empty when none did."""
    if found.stood_still is None:
        return ""
    seconds, until = found.stood_still
    return (
        f"the agent stood still for {seconds:.0f} s until {stamp(until)}: times and counts of this failover are those "
        "of its wake-up"
    )


def requests(found: Failover) -> str:
    """What became of the requests in flight, in words; empty when nothing was held."""
    if found.held is None:
        return ""
    moves = "an unknown number of moves" if found.moved is None else numbered(found.moved, "move")
    own = " (any of gms-launch's own probes included)" if found.moved else ""  # the frontend's counter cannot tell
    lost = "not known" if found.lost is None else str(found.lost)
    gap = "" if found.gap is None else f"; the next token after {found.gap * 1000:.0f} ms"
    held = numbered(found.held, "connection")
    return f"requests: {held} held, {moves} to another engine{own}, lost, by the frontend: {lost}{gap}"


def _in_a_line(text: str) -> str:
    """The first line of a text, no longer than a row may be."""
    line, more, _ = text.partition("\n")
    return f"{line[:LINE_MAX]} ..." if more or len(line) > LINE_MAX else line


def events(found: Sequence[EventRecord]) -> RenderableType:
    """Every event, one a line."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("TIME", "NODE", "EVENT", "COHORT", "DETAIL"):
        table.add_column(name)
    for e in found:
        who = f"{e.cohort_id}.{e.incarnation}" if e.cohort_id >= 0 else ""
        table.add_row(stamp(e.time), str(e.node_rank), e.kind, who, _in_a_line(e.detail))
    return table
