"""Drawings of a run, as SVG: a failover on a time axis with nodes as rows, and the run's history as a strip. Pure.

Whatever a drawing shows stands in a table beside it too, so it has a short description for those who do not see it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from gms_launch.cohort.failover import Failover
from gms_launch.cohort.records import EventRecord
from gms_launch.observe.markup import el

#: Of a drawing, and of the names at its left (pixels before it is scaled to the window).
WIDTH, LEFT, RIGHT = 1080.0, 150.0, 16.0
LANE, GAP, LEVEL = 20.0, 6.0, 16.0
#: A letter of a label takes about so much (pixels).
LETTER = 6.9
#: What is re-armed so many times later than the outage is over gets a scale of its own, in this part of the width.
FAR, AFTERWARDS = 1.3, 0.26

#: What belongs to a failover may be told so long before its zero (seconds).
EARLY = 1.0

#: What the colours of a failover say.
STATES = {
    "serves": "serves",
    "dying": "hit, not yet dead",
    "proof": "dead, being proved",
    "starting": "starts or wakes up",
    "parked": "parked as shadow",
    "held": "requests are held",
    "silence": "no token",
}
#: What the colours of the history say: redundancy.
LEVELS = {
    "full": "full: a shadow is parked",
    "degraded": "degraded: fewer shadows than wanted",
    "none": "none: it serves, and no shadow is parked",
    "down": "down: nobody serves",
    "begins": "first start",
}

Life = tuple[int, int]


def duration(seconds: float) -> str:
    """A time span for people: 17.9 ms, 4.21 s, 3m12s, 2h05m."""
    if abs(seconds) < 0.9995:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 59.95:
        return f"{seconds:.2f} s"
    minutes = round(seconds) // 60
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{round(seconds) % 60:02d}s"


@dataclass(frozen=True)
class Scale:
    """Seconds to pixels. Behind `seam`, which is at `seam_at`, a second is shorter; without one it never is."""

    low: float
    seam: float
    high: float
    seam_at: float

    @classmethod
    def of(cls, failover: Failover, last: float) -> Scale:
        """Wide enough for the outage, and for the re-arm where it is known."""
        outage = max((t for s, t in failover.steps.items() if s != "rearmed"), default=0.0)
        outage = max(outage, 0.001)
        end = max(failover.steps.get("rearmed", 0.0), min(last, outage * FAR))
        low, edge = -0.07 * outage, WIDTH - RIGHT
        if end <= outage * FAR:
            return cls(low, end * 1.07, end * 1.07, edge)
        return cls(low, outage * 1.09, end * 1.02, LEFT + (edge - LEFT) * (1 - AFTERWARDS))

    def __call__(self, seconds: float) -> float:
        at = min(max(seconds, self.low), self.high)
        if at <= self.seam:
            return LEFT + (at - self.low) / (self.seam - self.low) * (self.seam_at - LEFT)
        return self.seam_at + (at - self.seam) / (self.high - self.seam) * (WIDTH - RIGHT - self.seam_at)

    @property
    def ticks(self) -> list[float]:
        """Round moments."""
        edge = self.seam - 0.05 * (self.seam - self.low) if self.high > self.seam else self.seam
        found = _round(self.low, edge, 7)
        return found + (_round(self.seam, self.high, 2)[:3] if self.high > self.seam else [])


def _round(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers between two, about so many."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def told(failover: Failover, events: Sequence[EventRecord]) -> list[tuple[float, EventRecord]]:
    """What was told of the lives in a failover, with seconds after its zero, until its slot was filled again.

    `events` are in the order of time.
    """
    slot, life = failover.victim
    end = failover.steps.get("rearmed", math.inf)
    later = {(slot, life): _OF_THE_DEAD, failover.promoted: _OF_THE_NEXT}
    found = []
    # What another node tells may be a little early: its clock.
    for e in events[bisect_left(events, failover.time - EARLY, key=lambda e: e.time) :]:
        after = e.time - failover.time
        if after > end + 0.001:
            break
        if e.group != failover.group:
            continue
        kinds = later.get((e.cohort_id, e.incarnation), frozenset())
        if e.cohort_id == slot and e.incarnation > life:
            kinds = _OF_THE_NEW
        if e.kind in kinds:
            found.append((after, e))
    return found


_OF_THE_DEAD = frozenset(
    ("kill", "exit", "hung", "held", "dead", "left_behind", "unfenced", "fenced", "released", "hold_refused")
)
_OF_THE_NEXT = frozenset(("activated", "lock", "awake", "registered", "first_token"))
_OF_THE_NEW = frozenset(("started", "parked", "exit"))


def failover(found: Failover, events: Sequence[EventRecord], nodes: Sequence[int], label: str) -> Element:
    """One failover. `events` are the run's, `nodes` the node ranks that it is drawn for; `label` names the drawing."""
    marks = told(found, events)
    last = max((at for at, _ in marks), default=0.0)
    scale = Scale.of(found, last)
    steps = sorted(found.steps.items(), key=lambda item: item[1])
    texts = [(scale(t), f"{s.replace('_', ' ')} {duration(t)}") for s, t in steps]
    levels = _stagger(texts)
    top = LEVEL * (max(levels, default=0) + 1) + 10
    parts: list[Element] = []
    lines: list[tuple[str, list[tuple[str, Element]]]] = [("clients", [("", _clients(found, scale))])]
    # Whose rank takes the lock.
    leads = next((e.node_rank for _, e in marks if e.kind in ("lock", "awake", "registered")), min(nodes, default=0))
    for node in nodes:
        own = [(at, e) for at, e in marks if e.node_rank == node]
        lanes = [(f"cohort {found.victim[0]}", _dead_slot(found, own, scale))]
        if found.promoted is not None and node == leads:
            lanes.append((f"cohort {found.promoted[0]}", _next(found, own, scale)))
        lines.append((f"node {node}", lanes))
    y = top
    for name, lanes in lines:
        parts.append(el("text", name, x=0, y=y + 15, class_="row"))
        for cohort, lane in lanes:
            parts.append(el("rect", x=LEFT, y=y, width=WIDTH - RIGHT - LEFT, height=LANE, class_="lane"))
            parts.append(el("text", cohort, x=LEFT - 10, y=y + 15, class_="dim end"))
            lane.set("transform", f"translate(0 {y:g})")
            parts.append(lane)
            y += LANE + 2
        y += GAP
    where = [(x, text, 12 + level * LEVEL) for (x, text), level in zip(texts, levels, strict=True)]
    under = [el("line", x1=x, x2=x, y1=at - 9, y2=y, class_="step") for x, _, at in where]
    under += [el("text", text, x=_label_at(x, text), y=at, class_="label") for x, text, at in where]
    under += _axis(scale, y)
    height = y + 26
    size = {"viewBox": f"0 0 {WIDTH:g} {height + 24:g}", "role": "img", "aria_label": label}
    return el("svg", *under, *parts, _legend(STATES, height + 10), **size)


def _stagger(texts: Sequence[tuple[float, str]]) -> list[int]:
    """For each label, from left to right, the lowest line on which it does not run into another."""
    free: list[float] = []
    levels = []
    for x, text in texts:
        start = _label_at(x, text)
        level = next((k for k, end in enumerate(free) if end <= start), len(free))
        free[level : level + 1] = [start + len(text) * LETTER + 8]
        levels.append(level)
    return levels


def _label_at(x: float, text: str) -> float:
    return min(x + 3, WIDTH - len(text) * LETTER)


def _axis(scale: Scale, y: float) -> list[Element]:
    parts = [el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="line")]
    for tick in scale.ticks:
        x = scale(tick)
        parts.append(el("line", x1=x, x2=x, y1=y, y2=y + 5, class_="line"))
        parts.append(el("text", _tick(tick), x=x, y=y + 18, class_="dim middle"))
    if scale.high > scale.seam:
        at = scale.seam_at
        jump = el("title", "from here on another scale")
        parts.append(el("path", jump, d=f"M{at - 3:g} {y + 6:g} l4 -12 m2 12 l4 -12", class_="break"))
        parts.append(el("text", "other scale", x=at + 10, y=y + 18, class_="dim"))
    return parts


def _tick(seconds: float) -> str:
    return "0" if seconds == 0 else f"{seconds * 1000:g} ms" if abs(seconds) < 1 else f"{seconds:g} s"


def _bar(scale: Scale, low: float, high: float, state: str, say: str = "") -> Element:
    x, end = scale(low), scale(high)
    what = say or STATES[state]
    title = el("title", f"{what}, {duration(max(0.0, high - low))}" if math.isfinite(low + high) else what)
    return el("rect", title, x=x, y=2, width=max(1.0, end - x), height=LANE - 4, class_=state)


def _mark(scale: Scale, at: float, event: EventRecord) -> Element:
    x = scale(at)
    said = f"{event.kind} {duration(at)}" + (f": {event.detail[:200]}" if event.detail else "")
    return el("path", el("title", said), d=f"M{x:g} 4 l5 6 l-5 6 l-5 -6 z", class_=f"mark {event.kind}")


def _clients(found: Failover, scale: Scale) -> Element:
    token = found.steps.get("first_token", math.inf)
    lane = el("g", _bar(scale, -math.inf, 0.0, "serves"), _bar(scale, 0.0, token, "silence"))
    if (held := found.steps.get("held")) is not None:
        lane.append(_bar(scale, held, found.steps.get("released", token), "held"))
    if token < math.inf:
        lane.append(_bar(scale, token, math.inf, "serves"))
    return lane


def _dead_slot(found: Failover, own: Sequence[tuple[float, EventRecord]], scale: Scale) -> Element:
    """The slot of the dead one on one node: how it died there, and its next life."""

    def first(*kinds: str, old: bool = True, otherwise: float = math.inf) -> float:
        same = ((at, e) for at, e in own if (e.incarnation == found.victim[1]) is old)
        return next((at for at, e in same if e.kind in kinds and e.cohort_id == found.victim[0]), otherwise)

    hit = first("kill", "exit", "hung", otherwise=max(0.0, min(first("dead"), first("fenced"))))
    dead, fenced = first("dead"), first("fenced")
    dead = min(dead, fenced)
    began = first("started", old=False)
    lane = el("g", _bar(scale, -math.inf, hit, "serves", "part of the primary"))
    if hit < math.inf:
        lane.append(_bar(scale, hit, min(dead, began), "dying"))
    if dead < math.inf:
        lane.append(_bar(scale, dead, min(fenced, began), "proof"))
    if began < math.inf:
        parked = found.steps.get("rearmed", math.inf)
        lane.append(_bar(scale, began, parked, "starting", "the next life starts"))
        if parked < math.inf:
            lane.append(_bar(scale, parked, math.inf, "parked"))
    return _with_marks(lane, scale, [(at, e) for at, e in own if e.cohort_id == found.victim[0]])


def _next(found: Failover, own: Sequence[tuple[float, EventRecord]], scale: Scale) -> Element:
    """The cohort that takes over, on the node whose rank takes the lock."""
    lock = found.steps.get("lock", math.inf)
    serves = found.steps.get("registered", found.steps.get("first_token", math.inf))
    lane = el("g", _bar(scale, -math.inf, lock, "parked"))
    if lock < math.inf:
        lane.append(_bar(scale, lock, serves, "starting", "wakes up"))
    if serves < math.inf:
        lane.append(_bar(scale, serves, math.inf, "serves"))
    return _with_marks(lane, scale, [(at, e) for at, e in own if (e.cohort_id, e.incarnation) == found.promoted])


def _with_marks(lane: Element, scale: Scale, own: Iterable[tuple[float, EventRecord]]) -> Element:
    lane.extend(_mark(scale, at, event) for at, event in own if at <= scale.high)
    return lane


def _legend(entries: dict[str, str], y: float) -> Element:
    parts, x = [], 0.0
    for state, text in entries.items():
        parts += [el("rect", x=x, y=y, width=12, height=12, class_=state), el("text", text, x=x + 17, y=y + 11)]
        x += len(text) * LETTER + 34
    return el("g", *parts, class_="legend")


@dataclass(frozen=True)
class Span:
    """A time (Unix seconds) in which redundancy was `level`, one of `LEVELS`."""

    begin: float
    end: float
    level: str


def spans(events: Iterable[EventRecord], begin: float, end: float, groups: Sequence[str] = ()) -> list[Span]:
    """The run's redundancy over time, as its leader told it; before the first word of it the run begins.

    That of `groups` is the worst of theirs, once each has said something.
    """
    words = sorted((e for e in events if e.kind == "redundancy" and e.detail in LEVELS), key=lambda e: e.time)
    found, at, level = [], begin, "begins"
    said: dict[str, str] = {}
    for e in words:
        said[e.group] = e.detail
        now = level if set(groups) - said.keys() else max((said[g] for g in groups or ("",)), key=list(LEVELS).index)
        if now != level:
            if e.time > at:
                found.append(Span(at, e.time, level))
            at, level = max(at, e.time), now
    return [*found, Span(at, max(at, end), level)]


def history(
    found: Sequence[Span],
    failovers: Sequence[Failover],
    stamp: Callable[[float], str],
    leads: Callable[[int], str | None],
) -> Element:
    """The strip. `leads` to where the failover of a number is told, if anywhere; they count from 1."""
    begin, end = found[0].begin, max(found[-1].end, found[0].begin + 0.001)

    def at(moment: float) -> float:
        return (min(max(moment, begin), end) - begin) / (end - begin) * WIDTH

    parts = []
    # What is short and bad is drawn last, and wide enough to be seen.
    for span in sorted(found, key=lambda s: list(LEVELS).index(s.level) % (len(LEVELS) - 1)):
        title = el("title", f"{LEVELS[span.level]}, {duration(span.end - span.begin)} from {stamp(span.begin)}")
        wide = max(2.0, at(span.end) - at(span.begin))
        x = min(at(span.begin), WIDTH - wide)
        parts.append(el("rect", title, x=x, y=20, width=wide, height=28, class_=span.level))
    free = 0.0
    for number, failover in enumerate(failovers, 1):
        x, text = at(failover.time), str(number)
        parts.append(el("line", x1=x, x2=x, y1=14, y2=20, class_="step"))
        if x >= free:
            name = f"failover {number}, {stamp(failover.time)}"
            number_at = el("text", el("title", name), text, x=x, y=12, class_="middle")
            parts.append(el("a", number_at, href=to, aria_label=name) if (to := leads(number)) else number_at)
            free = x + len(text) * LETTER + 8
    parts.append(el("text", stamp(begin), x=0, y=64, class_="dim"))
    parts.append(el("text", f"{stamp(end)} ({duration(end - begin)})", x=WIDTH, y=64, class_="dim end"))
    label = "redundancy over time; the same as numbers in the table below"
    return el("svg", *parts, _legend(LEVELS, 76), viewBox=f"0 0 {WIDTH:g} 92", role="group", aria_label=label)
