"""The hook's queue: bounded, in order, and what it drops is told."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from gms_launch.cohort.records import EventRecord
from gms_launch.node import hook
from tests.support import eventually


def event(number: int) -> EventRecord:
    return EventRecord(float(number), 0, "exit", 0, 1, "", {"number": number})


async def heard_of(tmp_path: Path, count: int, leader: bool = True) -> tuple[list[dict[str, Any]], list[str]]:
    """What a hook was given that hangs until it has been told of `count` events, and what was told of it."""
    out, told = tmp_path / "out", []
    layout = SimpleNamespace(
        run="t-hook",
        settings=SimpleNamespace(
            on_event=f"cat >> {out}; until test -e {tmp_path}/go; do sleep 0.05; done", on_event_timeout=600.0
        ),
        topology=SimpleNamespace(node_rank=0),
        founds=leader,
        may_lead=leader,
        log_dir=tmp_path,
    )
    made = hook.Hook(
        cast(Any, layout), cast(Any, SimpleNamespace(append=lambda *_: None)), lambda kind, _: told.append(kind)
    )
    made.start(asyncio.get_running_loop())
    made.hear(event(0))
    if leader:
        eventually(lambda: out.exists() and out.read_text().endswith("\n"), what="the first call is under way")
    for number in range(1, count):
        made.hear(event(number))
    made.hear(EventRecord(0.0, 0, "hook_failed", -1, 0, "", {}))
    dropped = max(0, count - 1 - hook.QUEUE)
    assert not leader or (f"{dropped} events dropped" in made.status[0].detail) == bool(dropped)
    (tmp_path / "go").touch()
    if leader:  # the next call, which takes no time of what is given for the end
        eventually(lambda: out.read_text().count("\n") >= 2, what="the second call is under way")
    await asyncio.get_running_loop().run_in_executor(None, made.close, 3.0)
    await asyncio.sleep(0)
    text = out.read_text() if out.exists() else ""
    return [json.loads(line) for line in text.splitlines()], told


def test_events_are_handed_over_in_order(tmp_path: Path) -> None:
    given, told = asyncio.run(heard_of(tmp_path, 4))
    assert [g["data"]["number"] for g in given] == list(range(len(given))) and given
    assert told == [] and {g["dropped"] for g in given} == {0}


def test_what_a_full_queue_drops_is_counted_and_told(tmp_path: Path) -> None:
    given, told = asyncio.run(heard_of(tmp_path, hook.QUEUE + 8))
    assert given[1]["dropped"] == 7 and told[0] == "hook_dropped"


def test_only_the_leaders_agent_runs_it(tmp_path: Path) -> None:
    assert asyncio.run(heard_of(tmp_path, 4, leader=False)) == ([], [])
