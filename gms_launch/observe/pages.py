"""The pages that people open in a browser: what a run has lived through, and how it is now. Pure: data in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from xml.etree.ElementTree import Element

from gms_launch.cohort.failover import CAUSES, Failover
from gms_launch.cohort.records import EventRecord
from gms_launch.numbers import numbered
from gms_launch.observe import drawing, words
from gms_launch.observe.drawing import duration
from gms_launch.observe.markup import Child, clean, document, el, scrolls, table
from gms_launch.observe.snapshot import Snapshot
from gms_launch.observe.stamp import stamp

#: So many failovers are drawn, the newest; the list has all.
DRAWN = 100
#: So many events are listed, the newest; the journal has all.
LISTED = 5000


@dataclass(frozen=True)
class Story:
    """What is known of a run. Times are Unix seconds; `end` is now while it lives, and `over` says how it ended.

    `links` lead to other pages: what they are called, and where they are. In a run of groups `group` is the one that it
    is about, empty for all, and `groups` has the node ranks of each under `nodes`.
    """

    run: str
    nnodes: int
    begin: float
    end: float
    over: str
    events: Sequence[EventRecord]
    failovers: Sequence[Failover]
    links: Sequence[tuple[str, str]] = field(default=())
    group: str = ""
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"run {self.run}" + (f", group {self.group}" if self.group else "")

    def nodes_of(self, failover: Failover) -> list[int]:
        """The node ranks that a failover is drawn for: those of its group, and whoever else told of it."""
        if not failover.group:
            return list(range(self.nnodes))
        said = {e.node_rank for _, e in drawing.told(failover, self.events)}
        return sorted(said.union(self.groups.get(failover.group, {}).get("nodes", ())))


def timeline(story: Story, made: float) -> str:
    """The run's history and every failover, drawn and in numbers. `made` is when (Unix seconds)."""
    known = story.failovers
    story = replace(story, events=sorted(story.events, key=lambda e: e.time))
    main = [_history(story), _list(known)]
    if len(known) > DRAWN:
        main.append(el("p", f"The newest {DRAWN} are drawn."))
    first = max(0, len(known) - DRAWN)
    main += [_failover(number, known[number - 1], story) for number in range(len(known), first, -1)]
    return _page(f"{story.name}: failovers", story.links, main, made, story.over)


def events(story: Story, made: float) -> str:
    """Everything that happened: the newest on top, where somebody who keeps it open looks."""
    left = len(story.events) - LISTED
    head = [el("p", f"The newest {LISTED}; {left} older ones are in the run's events.jsonl.")] if left > 0 else []
    rows = words.events(sorted(story.events, key=lambda e: e.time)[-LISTED:])[::-1]
    found = table("what happened, newest first, times in UTC", words.EVENTS, rows, (1,))
    return _page(f"{story.name}: events", story.links, [*head, found], made, story.over)


def status(shot: Snapshot, moment: float, made: float, links: Sequence[tuple[str, str]] = ()) -> str:
    """How the run is. `moment` is now by the clock that the run's times are of, `made` by that of this machine."""
    level = "starting" if shot.starting else shot.redundancy.value
    serving = shot.primary
    who = "nobody" if serving is None else words.life((serving.cohort_id, serving.incarnation))
    if shot.groups:
        who = f"in {sum(g.primary is not None for g in shot.groups)} of {numbered(len(shot.groups), 'group')}"
    facts: list[tuple[str, Child]] = [
        ("redundancy", el("span", level, class_=f"badge {level}")),
        ("primary", who),
        ("nodes", f"{len(shot.nodes)} of {shot.nnodes} report"),
        ("up", words.age(shot.created, moment)),
        ("frontend", words.frontend(shot)),
        ("model", shot.model_name),
    ]
    main: list[Element] = []
    if shot.leader_silent:
        main.append(el("p", f"as of {shot.reported_ago:.0f} s ago: {shot.leader_silent}", class_="alarm", role="alert"))
    if shot.stopping:
        main.append(el("p", "the run is being stopped", class_="alarm"))
    main += [el("p", alarm, class_="alarm", role="alert") for alarm in words.alarms(shot)]
    main += [el("p", lack, class_="alarm") for lack in ([] if shot.starting else words.short(shot))]
    if shot.over:
        main.append(el("p", f"this group is over: {shot.over}", class_="alarm"))
    main.append(el("dl", *(el("div", el("dt", name), el("dd", value)) for name, value in facts)))
    if shot.groups:
        main.append(table("groups", words.GROUPS, _with_links(words.groups(shot, moment)), (3,)))
    else:
        main.append(table("cohorts and their ranks", words.COHORTS, words.cohorts(shot, moment), (4, 5, 6)))
    main.append(table("nodes and what runs on them", words.PARTS, words.parts(shot), (0, 3, 4)))
    main += [_group(g, moment) for g in shot.groups]
    whose = f"run {shot.run}" + (f", group {shot.group}" if shot.group else "")
    return _page(f"{whose}: {level}", links, main, made)


def _with_links(rows: Sequence[words.Row]) -> list[list[Child]]:
    """Rows of groups, of which the name leads to what there is of each."""
    return [[el("a", name, href=f"#group-{name}"), *rest] for name, *rest in rows]


def _group(shot: Snapshot, moment: float) -> Element:
    """The ranks of one group, and its part of its nodes."""
    return el(
        "section",
        el("h2", f"Group {shot.group}"),
        table(f"cohorts and ranks of {shot.group}", words.COHORTS, words.cohorts(shot, moment), (4, 5, 6)),
        table(f"nodes of {shot.group}, with its part of them", words.PARTS, words.parts(shot), (0, 3, 4)),
        id=f"group-{shot.group}",
    )


def trouble(run: str, text: str, made: float, links: Sequence[tuple[str, str]] = ()) -> str:
    """Instead of a page that cannot be made: why."""
    return _page(f"run {run}", links, [el("p", text, class_="alarm", role="alert")], made)


def _page(title: str, links: Sequence[tuple[str, str]], main: Sequence[Element], made: float, over: str = "") -> str:
    head = el("header", el("h1", title), el("p", f"gms-launch, as of {stamp(made)}. {over}".strip(), class_="dim"))
    if links:
        head.append(el("nav", el("ul", *(el("li", el("a", text, href=to)) for text, to in links)), aria_label="pages"))
    return document(clean(title), [head, el("main", *main, id="main")])


def _history(story: Story) -> Element:
    found = drawing.spans(story.events, story.begin, story.end, (story.group,) if story.group else tuple(story.groups))
    whole = max(0.001, sum(s.end - s.begin for s in found))

    def link(number: int) -> str | None:
        return f"#failover-{number}" if number > len(story.failovers) - DRAWN else None

    rows = []
    for level, meaning in drawing.LEVELS.items():
        of = [s.end - s.begin for s in found if s.level == level]
        if of:
            share = f"{sum(of) / whole * 100:.3f} %"
            rows.append((meaning, str(len(of)), duration(sum(of)), share, duration(max(of))))
    return el(
        "section",
        el("h2", "History"),
        scrolls("history", drawing.history(found, story.failovers, stamp, link)),
        el("p", "Short times are drawn wider than they are, so that they can be seen. ", class_="dim"),
        table("time at each level", ("REDUNDANCY", "TIMES", "IN ALL", "SHARE", "LONGEST"), rows, (1, 2, 3, 4)),
    )


def _list(failovers: Sequence[Failover]) -> Element:
    if not failovers:
        return el("section", el("h2", "Failovers"), el("p", "There has been none."))
    head = ("NO.", "WHEN", "FROM", "TO", "CAUSE", "FIRST TOKEN", "RE-ARMED", "HELD", "MOVED", "LOST")
    drawn = len(failovers) - DRAWN
    rows: list[list[Child]] = []
    for number, f in enumerate(failovers, 1):
        link: Child = el("a", str(number), href=f"#failover-{number}") if number > drawn else str(number)
        after = [duration(f.steps[s]) if s in f.steps else "-" for s in ("first_token", "rearmed")]
        counts = ["-" if n is None else str(n) for n in (f.held, f.moved, f.lost)]
        cause = words.in_a_line(f.cause) or "unknown"
        lives = words.life(f.victim, f.group), words.life(f.promoted)
        rows.append([link, stamp(f.time), *lives, cause, *after, *counts])
    return el("section", el("h2", "Failovers"), table("every failover, oldest first", head, rows, (0, 5, 6, 7, 8, 9)))


def _failover(number: int, found: Failover, story: Story) -> Element:
    head = f"Failover {number}: {words.life(found.victim, found.group)} to {words.life(found.promoted)}"
    label = f"failover {number} on a time axis; the same as numbers in the tables below"
    cause = f"{stamp(found.time)}, cause: {words.in_a_line(found.cause) or 'unknown'} ({CAUSES[found.kind]})"
    said = [f"0 ms: {words.zero(found)}", f"Clients: {words.silence(found)}"]
    said += [text for text in (words.requests(found), words.stood_still(found)) if text]
    # A step is when the last node had done its part; what each saw is beside it.
    seen = [
        (duration(at), str(e.node_rank), e.kind, words.whom(e), words.in_a_line(e.detail))
        for at, e in drawing.told(found, story.events)
    ]
    return el(
        "section",
        el("h2", head),
        el("p", cause),
        scrolls(label, drawing.failover(found, story.events, story.nodes_of(found), label)),
        *(el("p", text, class_="dim") for text in said),
        table(f"steps of failover {number}", ("STEP", "AFTER", "MEANING"), words.steps(found), (1,)),
        table(
            f"what each node told of failover {number}", ("AFTER", "NODE", "EVENT", "COHORT", "DETAIL"), seen, (0, 1)
        ),
        id=f"failover-{number}",
    )
