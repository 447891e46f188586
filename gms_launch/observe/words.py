"""What is told of a run, in words and in the rows of tables, whichever way it is shown. Nothing is drawn here."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from gms_launch.cohort.failover import STEPS, ZEROS, Failover
from gms_launch.cohort.model import Phase
from gms_launch.cohort.records import EventRecord, NodeRecord, RankRecord
from gms_launch.numbers import numbered
from gms_launch.observe import progress
from gms_launch.observe.snapshot import CohortStatus, Snapshot
from gms_launch.observe.stamp import stamp
from gms_launch.process import proc
from gms_launch.urls import is_loopback

#: Longest detail of an event in a table (characters); the journal has all of it.
LINE_MAX = 300

COHORTS = ("COHORT", "ROLE", "PHASE", "FOR", "LIFE", "NODE", "PID", "NOTE")
GROUPS = ("GROUP", "REDUNDANCY", "PRIMARY", "PARKED", "NODES", "MODEL", "NOTE")
PARTS = ("NODE", "COMPONENT", "STATE", "PID", "STARTS", "NOTE")
EVENTS = ("TIME", "NODE", "EVENT", "COHORT", "DETAIL")
#: What an alarm of etcd's comes to.
ALARMS = {
    "NOSPACE": "it refuses writes, so what is shown may be old, and no engine can register",
    "CORRUPT": "it takes its data for corrupt and refuses writes, so what is shown may be old",
}
#: The state of an agent that is not heard of.
SILENT = "silent"

Row = tuple[str, ...]


def age(since: float, now: float) -> str:
    """How long ago, in the two largest units."""
    seconds = max(0, int(now - since)) if since else 0
    for size, name, small, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            return f"{seconds // size}{name}{seconds % size // small}{small_name}"
    return f"{seconds}s"


def now(shot: Snapshot) -> float:
    """Now by the clock that the run's times are of, if one of its agents is on this machine."""
    here = proc.boot_id()
    own = next((n.clock for n in shot.nodes if n.boot_id == here and n.clock), None)
    return time.time() if own is None else time.monotonic() + own


def number(node: NodeRecord) -> int:
    """The node rank in the run."""
    return node.node_rank if node.number < 0 else node.number


def place(shot: Snapshot, node_rank: int) -> str:
    """A node by its node rank in the run; of a group also its rank there, where that is another."""
    if not shot.group:
        return str(node_rank)
    known = dict(enumerate(shot.places)) | {n.node_rank: number(n) for n in shot.nodes}
    if node_rank not in known:
        return f"rank {node_rank}"
    return str(node_rank) if known[node_rank] == node_rank else f"{known[node_rank]} (rank {node_rank})"


def _loopback(url: str) -> bool:
    return is_loopback(urlsplit(url).hostname or "")


def _entrance(front: tuple[str, str], path: str = "") -> str:
    url, host = front
    return url + path + (f" (only on {host})" if _loopback(url) else "")


def entrances(shot: Snapshot, number: int) -> str:
    """Where clients ask for completions: at each of `number` frontends, as far as they are known here."""
    path = "/v1/completions"
    known = ", ".join(_entrance(front, path) for front in shot.fronts) or f"{shot.frontend_url}{path}"
    return known if len(shot.fronts) == number else f"{known} and others (`gms-launch status` has all {number})"


def frontend(shot: Snapshot) -> str:
    """Where clients come in; of a loopback address also whose, since it may be read on another machine."""
    if shot.fronts:
        return ", ".join(map(_entrance, shot.fronts))
    if shot.lead not in (None, 0) and 0 in shot.missing:
        return f"{shot.frontend_url} (its node is not here: nobody gets in)"
    if not _loopback(shot.frontend_url):
        return shot.frontend_url
    leader = shot.frontend_host or next((n.host for n in shot.nodes if number(n) == 0), "the leader's node")
    return f"{shot.frontend_url} (only on {leader})"


def cohorts(shot: Snapshot, moment: float) -> list[Row]:
    """A row for every rank of every slot, under `COHORTS`."""
    found: list[Row] = []
    for c in shot.cohorts:
        note = "given up: " + c.why if c.given_up else tries(c, moment)
        doing = progress.note(c, shot, moment)
        for rank in c.ranks:
            # Only its own agent sees what becomes of a rank.
            old = (rank.node_rank == 0 and bool(shot.leader_silent)) or rank.node_rank in shot.missing
            asked, heard = (" ?", "not heard of since") if old else ("", "")
            left = f"cannot be killed: {', '.join(rank.left or map(str, rank.leftovers))}" if rank.leftovers else ""
            found.append(
                (
                    str(c.cohort_id),
                    (c.role or "-") + (asked if c.role else ""),
                    _phase(c, rank) + asked,
                    age(rank.since, moment),
                    str(c.incarnation),
                    place(shot, rank.node_rank),
                    str(rank.pid),
                    left or "; ".join(filter(None, (heard, doing if rank.node_rank == 0 else "", note))) or rank.exit,
                )
            )
        if not c.ranks:
            found.append((str(c.cohort_id), c.role or "-", c.phase.value, "", str(c.incarnation), "", "", note))
    return found


def _phase(cohort: CohortStatus, rank: RankRecord) -> str:
    """What a rank is at. One without signs of its own stays `starting`, when its cohort has been up for long."""
    up = cohort.phase in (Phase.PARKED, Phase.WAKING, Phase.ACTIVE)
    return "headless" if up and rank.phase is Phase.STARTING else rank.phase.value


def groups(shot: Snapshot, moment: float) -> list[Row]:
    """A row for each group, under `GROUPS`."""
    found: list[Row] = []
    for g in shot.groups:
        serving = g.primary
        parked = sum(c.phase is Phase.PARKED for c in g.cohorts)
        state = "over" if g.over else "starting" if g.starting else g.redundancy.value
        nodes = ranges({*g.places, *(n.number for n in g.nodes)})
        # Only the agent that leads it says what becomes of its ranks.
        old = " ?" if g.leader_silent or 0 in g.missing else ""
        note = standing(g, shot, moment)
        who = f"cohort {serving.cohort_id}.{serving.incarnation}{old}" if serving else ""
        shadows = f"{parked} of {g.shadows}{old}" if g.cohorts else ""  # another node's agent knows no cohorts of it
        found.append((g.group, state, who, shadows, nodes, g.model_name, note))
    return found


def standing(group: Snapshot, run: Snapshot, moment: float) -> str:
    """What keeps a group of a run from being full, and what is done about it; empty when nothing does."""
    if group.over:
        return in_a_line(group.over)
    said = [group.leader_silent] if group.leader_silent else []
    if group.missing:
        nodes = ", ".join(place(group, r) for r in group.missing)
        who = f"{'node' if len(group.missing) == 1 else 'nodes'} {nodes} not here"
        said.append(who if group.starting else f"{who}: {_comes(run)}")
    if said:
        return "; ".join(said)
    down = sorted({place(group, n.node_rank) for n in group.nodes for g in n.gms if g.state == "DOWN"})
    said = [f"GMS is down on node {', '.join(down)}"] if down else []
    slots: dict[str, list[str]] = {}  # what several are at is told once
    for c in group.cohorts:
        ends = any(r.leftovers for r in c.ranks)
        what = "given up: " + c.why if c.given_up else "cannot be killed" if ends else tries(c, moment)
        what = what or progress.note(c, group, moment)
        if what:
            slots.setdefault(in_a_line(what), []).append(str(c.cohort_id))
    said += [f"{'cohort' if len(ids) == 1 else 'cohorts'} {', '.join(ids)}: {what}" for what, ids in slots.items()]
    if not said and group.records is not group.redundancy and group.primary is not None and not group.starting:
        return "not confirmed yet: a token is waited for"
    return "; ".join(said)


def _comes(run: Snapshot) -> str:
    """What is to come in the place of a node that is not here."""
    if run.spares:
        return "back, or a spare in its place after spare_wait"
    without = ", no spare is here" if run.wanted_spares else ""
    return f"waited for until node_wait is over{without}"


def alarms(shot: Snapshot) -> list[str]:
    """What etcd itself says is wrong with it."""
    return [f"etcd has raised the alarm {a}: {ALARMS.get(a, 'see its manual')}" for a in shot.alarms]


def short(shot: Snapshot) -> list[str]:
    """Of what a run has to bear the loss of nodes with, what is not there."""
    found = []
    if shot.members > 1 and shot.members_here < shot.members:
        rest = shot.members_here - shot.members // 2 - 1
        bears = f"the loss of {rest} more is borne" if rest > 0 else "no other may be lost"
        found.append(f"etcd has {shot.members_here} of {shot.members} members: {bears}")
    if len(shot.spares) < shot.wanted_spares:
        found.append(f"{len(shot.spares)} of {numbered(shot.wanted_spares, 'spare')} here")
    return found


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers in few letters: 0-3,7."""
    spans: list[list[int]] = []
    for n in sorted(numbers):
        if spans and spans[-1][1] == n - 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def parts(shot: Snapshot) -> list[Row]:
    """A row for everything else that a node has, under `PARTS`."""
    found: list[Row] = []
    for node_rank in shot.missing:
        if node_rank in shot.lost:
            why = "its lease has run out: stopped, cut off or gone; its cohorts are fenced without it"
        elif shot.starting:
            why = "has not come yet"
        else:
            why = "its lease has run out: stopped (SIGSTOP), cut off or gone"
        found.append((place(shot, node_rank), "agent", SILENT, "", "", why))
    for rank in range(shot.nnodes, shot.nnodes + shot.wanted_spares):
        if rank not in {n.node_rank for n in shot.spares}:
            what = "no spare is here: not come yet, stopped, cut off or gone"
            away = (
                "no spare is here: stopped or cut off, or in a lost node's place; that node's `gms-launch up` makes one"
            )
            found.append((str(rank), "agent", SILENT, "", "", what if shot.starting else away))
    for node in (*shot.nodes, *shot.spares):
        where = place(shot, node.node_rank)
        note = f"{node.address}, a spare" if node in shot.spares else node.address
        note += ", leads the run" if node.node_rank == shot.lead else ""
        found.append((where, f"agent on {node.host}", "running", str(node.agent_pid), "", note))
        for stray in node.strays:
            found.append((where, "stray", "cannot be killed", stray.partition(" ")[0], "", stray))
        if node.lock_holder.startswith("process"):
            found.append((where, "failover lock", "kept by a stray", "", "", node.lock_holder))
        for p in node.writing:
            lost = f", {p.dropped} entries and {p.dropped_bytes} bytes of logs dropped"
            found.append(
                (
                    where,
                    p.name,
                    p.state or "well again",
                    "",
                    "",
                    p.path + (lost if p.dropped or p.dropped_bytes else ""),
                )
            )
        if node.internal_errors:
            found.append((where, "internal errors", str(node.internal_errors), "", "", "see the agent's log"))
        for s in node.services:
            found.append((where, s.name, s.state, str(s.pid or ""), str(s.starts), s.detail))
        for g in node.gms:
            size = "" if g.allocated_bytes is None else f"{g.allocated_bytes / 2**30:.2f} GiB in "
            held = f"{size}{g.allocations} allocations"
            note = f"{held}, {numbered(g.ro_sessions, 'reader')}, written {numbered(g.loads, 'time')}"
            note += f"; has not answered the last {numbered(g.missed, 'look')}" if g.missed else ""
            found.append((where, f"gpu {g.device} {g.tag}", g.state.lower(), "", "", note))
        for gpu in node.gpu_memory:
            note = f"{gpu.used / 2**30:.1f} of {gpu.total / 2**30:.1f} GiB used"
            found.append((where, gpu.name, "", "", "", f"{note}, {gpu.uuid}"))
            for h in gpu.holders:
                size = f"{h.used / 2**30:.2f} GiB" if h.used >= 0 else "size not told"
                found.append((where, f"  {h.who}", "", str(h.pid), "", size))
    return found


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


def life(value: tuple[int, int] | None, group: str = "") -> str:
    """A life of a cohort, of a group's where there are several, or nobody."""
    whose = f"{group} " if group else ""
    return "nobody" if value is None else f"{whose}cohort {value[0]} (life {value[1]})"


def steps(found: Failover) -> list[Row]:
    """Each step, when it was and what it means, in the order of time; those that have not happened last."""
    order = sorted(STEPS.items(), key=lambda item: found.steps.get(item[0], float("inf")))
    return [(s, f"{found.steps[s] * 1000:.1f} ms" if s in found.steps else "-", meaning) for s, meaning in order]


def zero(found: Failover) -> str:
    """What the moment is that steps are counted from."""
    if found.kind == "node_lost":
        waited = "nothing had been heard of the node for its lease by then, and clients may have waited for all of it"
        return f"{ZEROS[found.zero]}; {waited}"
    return ZEROS[found.zero]


def silence(found: Failover) -> str:
    """For how long clients got no token."""
    if found.silence is not None:
        return f"at most {found.silence:.1f} s without a token (the frontend's counter is looked at every few seconds)"
    if "first_token" not in found.steps:
        return "no token yet"
    return "a token came again at first_token; when the last one before it came is not known: nobody looked then"


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


def in_a_line(text: str) -> str:
    """The first line of a text, no longer than a row may be."""
    line, more, _ = text.partition("\n")
    return f"{line[:LINE_MAX]} ..." if more or len(line) > LINE_MAX else line


def whom(event: EventRecord) -> str:
    """What an event is of: a life of a cohort, before it its group, or that alone."""
    life = f"{event.cohort_id}.{event.incarnation}" if event.cohort_id >= 0 else ""
    return "/".join(filter(None, (event.group, life)))


def events(found: Sequence[EventRecord]) -> list[Row]:
    """Every event, one a row, under `EVENTS`."""
    return [
        (
            stamp(e.time),
            str(e.node_rank),
            e.kind,
            whom(e),
            in_a_line(e.detail),
        )
        for e in found
    ]
