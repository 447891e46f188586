"""Pages for a browser: whole, safe, and with everything in them. The failovers are those of a lab of three nodes."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gms_launch.cohort.failover import STEPS, Failover, fold
from gms_launch.cohort.model import Phase
from gms_launch.cohort.records import DesiredCohort, EventRecord, NodeRecord, RankRecord, RunRecord, Wanted
from gms_launch.control.mirror import Mirror
from gms_launch.observe import drawing, journal, markup, pages, snapshot
from gms_launch.observe.drawing import Scale, Span, duration
from gms_launch.observe.stamp import stamp

EVENTS = sorted(journal.read(Path(__file__).with_name("failovers.jsonl")), key=lambda e: e.time)
BEGIN = EVENTS[0].time
STORY = pages.Story("r1", 3, BEGIN, EVENTS[-1].time, "", EVENTS, fold(EVENTS, 3))
VOID = {"meta", "br", "hr", "img", "input", "link"}
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;]]>\x00\x1b[31m"


class Reader(HTMLParser):
    """Every element with its attributes, and a complaint where one is not closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.found if name == tag]


def safe(text: str) -> Reader:
    """The page, which must be whole and need, run and send nothing."""
    page = Reader(text)
    assert not {"script", "img", "link", "iframe", "object", "form", "base", "foreignobject"} & {
        t for t, _ in page.found
    }
    for _, attrs in page.found:
        assert not [a for a in attrs if a.startswith("on") or a in ("style", "src", "srcset", "xlink:href")]
        assert not re.match(r"\w+:|//", attrs.get("href") or "")
    (policy,) = (m["content"] for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy")
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style and not re.search(r"url\(|@import", style[1])
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy == markup.policy(digest) and policy.startswith("default-src 'none'; ")
    names = [attrs["id"] for _, attrs in page.found if "id" in attrs]
    assert len(names) == len(set(names))
    for link in page.of("a"):
        target = link["href"] or ""
        assert not target.startswith("#") or target[1:] in names, target
    return page


def test_everything_of_a_failover_is_drawn_and_stands_in_a_table() -> None:
    text = pages.timeline(STORY, BEGIN)
    page = safe(text)
    assert len(STORY.failovers) == 3 and len(page.of("svg")) == 4, "a strip, and a drawing of each"
    for number, found in enumerate(STORY.failovers, 1):
        assert set(found.steps) == set(STEPS)
        part = text.split(f'id="failover-{number}"')[1].split("</section>")[0]
        image, tables = part.split("</svg>")
        for node in range(3):
            assert f">node {node}<" in image
        for step, after in found.steps.items():
            assert f">{step.replace('_', ' ')} {duration(after)}<" in image, step
            assert f'<td>{step}</td><td class="number">{after * 1000:.1f} ms</td>' in tables, step
        told = drawing.told(found, EVENTS)
        kinds = [e.kind for _, e in told]
        for kind in ("kill", "exit", "dead", "fenced", "started"):
            assert {e.node_rank for _, e in told if e.kind == kind} >= ({0} if kind == "kill" else {0, 1, 2})
            assert image.count(f'class="mark {kind}"') == kinds.count(kind)
        for kind in ("held", "released", "lock", "awake", "registered", "first_token", "parked"):
            assert image.count(f'class="mark {kind}"') == kinds.count(kind) == 1, kind
            assert f"<td>{kind}</td>" in tables
        for state in ("serves", "dying", "proof", "starting", "parked", "held", "silence"):
            assert image.count(f'class="{state}"') >= 2, f"{state}: in the legend and in a lane"


def test_the_keyboard_reaches_what_scrolls_and_every_failover() -> None:
    page = safe(pages.timeline(STORY, BEGIN))
    regions = [a for _, a in page.found if a.get("class") == "scrolls"]
    assert len(regions) == 12 and all(
        a["tabindex"] == "0" and a["aria-label"] and a["role"] == "region" for a in regions
    )
    links = [a["href"] for a in page.of("a")]
    assert links[0] == "#main"
    assert [links.count(f"#failover-{n}") for n in (1, 2, 3)] == [2, 2, 2], "from the strip and from the list"
    assert all(a["aria-label"] for a in page.of("svg"))
    assert page.of("html")[0]["lang"] == "en" and len(page.of("h1")) == 1


def test_groups_are_told_apart() -> None:
    """Twice the same failovers, in another group 100 s later, whose nodes are others."""
    shift = 100.0
    a = [replace(e, group="a") for e in EVENTS]
    b = [replace(e, group="b", time=e.time + shift, node_rank=e.node_rank + 3) for e in EVENTS]
    both = sorted([*a, *b], key=lambda e: e.time)
    groups = {"a": {"nodes": [0, 1, 2]}, "b": {"nodes": [3, 4, 5]}}
    folded = fold(both, sizes={"a": 3, "b": 3})
    assert [f.group for f in folded].count("a") == len(folded) / 2 == len(STORY.failovers)
    story = replace(STORY, nnodes=6, events=both, failovers=folded, groups=groups, end=STORY.end + shift)
    text = pages.timeline(story, BEGIN)
    safe(text)
    for number, found in enumerate(folded, 1):
        part = text.split(f'id="failover-{number}"')[1].split("</section>")[0]
        assert f"Failover {number}: {found.group} cohort" in part
        assert [n for n in range(6) if f">node {n}<" in part] == groups[found.group]["nodes"]
        assert {e.group for _, e in drawing.told(found, both)} == {found.group}
    one = replace(story, events=b, failovers=[f for f in folded if f.group == "b"], group="b")
    assert "<h1>run r1, group b: failovers</h1>" in pages.timeline(one, BEGIN)
    assert ">b/0.1<" in pages.events(one, BEGIN)


def test_redundancy_of_groups_is_that_of_the_worst_once_each_has_said_something() -> None:
    def said(at: float, group: str, level: str) -> EventRecord:
        return EventRecord(at, 0, "redundancy", detail=level, group=group)

    events = [said(1, "a", "full"), said(3, "b", "none"), said(5, "b", "full"), said(6, "a", "down")]
    levels = [(s.begin, s.level) for s in drawing.spans(events, 0.0, 9.0, ("a", "b"))]
    assert levels == [(0.0, "begins"), (3, "none"), (5, "full"), (6, "down")]
    assert [(s.begin, s.level) for s in drawing.spans(events, 0.0, 9.0, ("b",))] == [
        (0.0, "begins"),
        (3, "none"),
        (5, "full"),
    ]


def test_what_a_run_says_is_only_ever_text() -> None:
    bad = [replace(e, detail=EVIL) if e.kind != "redundancy" else e for e in EVENTS]
    story = replace(STORY, run=EVIL, events=bad, failovers=fold(bad, 3), over=EVIL, links=((EVIL, "./"),))
    for text in (pages.timeline(story, BEGIN), pages.events(story, BEGIN), pages.trouble(EVIL, EVIL, BEGIN)):
        page = safe(text)
        assert "\x00" not in text and "\x1b" not in text
        assert any("<script>alert(1)</script>" in t for t in page.text), "told, as text"
    assert safe(pages.trouble("\ud800", "\udfff", 0.0)), "not even a lone surrogate"


def test_a_failover_that_is_not_over_is_drawn_as_far_as_it_is_known() -> None:
    for known in range(1, len(EVENTS), 4):
        events = EVENTS[:known]
        story = replace(STORY, events=events, failovers=fold(events, 3), end=events[-1].time)
        safe(pages.timeline(story, BEGIN))
    bare = Failover(BEGIN, "x", (0, 1))
    assert "<svg" in (page := pages.timeline(replace(STORY, events=[], failovers=[bare]), BEGIN)) and safe(page)
    assert "There has been none." in pages.timeline(replace(STORY, events=[], failovers=[]), BEGIN)


def test_a_long_life_makes_no_endless_page() -> None:
    many = [replace(STORY.failovers[0], time=BEGIN + 10 * k) for k in range(3000)]
    text = pages.timeline(replace(STORY, failovers=many, end=BEGIN + 30_000), BEGIN)
    page = safe(text)
    assert len(page.of("svg")) == 1 + pages.DRAWN and len(text) < 4_000_000
    assert 'id="failover-3000"' in text and 'id="failover-2900"' not in text
    events = pages.events(replace(STORY, events=EVENTS * 100), BEGIN)
    assert events.count("<tr>") == pages.LISTED + 1 and "older ones are in the run's events.jsonl" in events
    told = re.findall(r"<td>(\d{4}-\S+Z)</td>", events)
    assert len(told) == pages.LISTED and told == sorted(told, reverse=True), "the newest is on top"


@pytest.mark.parametrize("rearmed", [0.3, 0.36, 4.0, 43.0, 1800.0])
def test_time_runs_to_the_right_whatever_the_re_arm_takes(rearmed: float) -> None:
    found = Failover(0.0, "x", (0, 1), (1, 1), {"held": 0.002, "first_token": 0.35, "rearmed": rearmed})
    scale = Scale.of(found, rearmed)
    at = [scale(t) for t in (scale.low, 0.0, 0.002, 0.35, 0.37, max(0.38, rearmed / 2), max(0.4, rearmed))]
    assert at == sorted(at) and at[0] >= drawing.LEFT and at[-1] <= drawing.WIDTH - drawing.RIGHT
    assert scale(0.35) - scale(0.0) > 400, "the outage has most of the room"
    assert 2 <= len(scale.ticks) <= 12


def test_labels_do_not_run_into_each_other() -> None:
    texts = [(200.0 + k, "registered 244.7 ms") for k in range(6)] + [(800.0, "lock 1 s")]
    assert drawing._stagger(texts) == [0, 1, 2, 3, 4, 5, 0]


def test_the_strip_has_the_runs_redundancy_from_its_begin_to_its_end() -> None:
    def said(at: float, level: str) -> EventRecord:
        return EventRecord(at, 0, "redundancy", detail=level)

    found = drawing.spans([said(10, "full"), said(20, "down"), said(21, "none"), said(25, "none")], 1.0, 30.0)
    assert found == [Span(1.0, 10, "begins"), Span(10, 20, "full"), Span(20, 21, "down"), Span(21, 30.0, "none")]
    assert drawing.spans([], 5.0, 5.0) == [Span(5.0, 5.0, "begins")]
    assert drawing.spans([said(1, "nonsense")], 0.0, 2.0) == [Span(0.0, 2.0, "begins")]
    row = r"<td>down: nobody serves</td>" + r'<td class="number">(.*?)</td>' * 4
    times, whole, share, longest = re.findall(row, pages.timeline(STORY, BEGIN))[0]
    assert (times, whole, longest) == ("3", "741.8 ms", "256.0 ms") and share.endswith(" %")


def test_how_it_is_now() -> None:
    mirror = Mirror("r")
    keys = mirror.keys
    mirror.replace(
        {
            keys.run: RunRecord(EVIL, "d", "h", "0", 1.0, nnodes=2, shadows=1, redundancy="full").encode(),
            keys.node(0): NodeRecord(0, EVIL, "127.0.0.1", "b", 1, 1).encode(),
            keys.cohort(0): DesiredCohort(0, 1, Wanted.RUNNING, 1).encode(),
            keys.rank(0, 0): RankRecord(0, 0, 1, Phase.ACTIVE, pid=7, since=90.0).encode(),
        }
    )
    shot = replace(snapshot.build(mirror), leader_silent=EVIL)
    text = pages.status(shot, 100.0, 100.0)
    page = safe(text)
    assert {"cohorts and their ranks", "nodes and what runs on them"} <= set(page.text)
    assert "1 of 2 report" in page.text and any("its lease has run out" in t for t in page.text)
    assert stamp(100.0) in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0179, "17.9 ms"), (0.99999, "1.00 s"), (4.214, "4.21 s"), (59.99, "1m00s"), (192, "3m12s"), (7500, "2h05m")],
)
def test_a_time_span_reads_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text
